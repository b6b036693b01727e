"""Identities and their certificates: names, files, rotation without a restart."""

from __future__ import annotations

import os
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest

from cluster.cli import main
from cluster.identity.authority import Authority, Pair
from cluster.identity.folder import add, check_owner, config_of, make_folder, members
from workers.errors import InvalidConfig
from workers.trust.channels import bind, make_server, open_channel
from workers.trust.config import TlsConfig
from workers.trust.credentials import Credentials, credentials_of
from workers.trust.gate import callers
from workers.trust.parties import ADMIN, OBSERVER, Kind, Party, parties_called, party_called, router, worker

DESCRIBE = "/baton.workers.Worker/Describe"


def test_a_name_in_a_certificate_stands_for_one_party() -> None:
    for party in (worker("decode-3"), worker("a.b_C-9"), router("router-0"), OBSERVER, ADMIN):
        assert party_called(party.dns_name) == party
    for stranger in (
        "decode-3.worker.example",
        "baton",
        "worker.baton",
        ".worker.baton",
        "x.admin.baton",
        "*.worker.baton",
        "a/b.worker.baton",
        "decode-3.engine.baton",
        "",
    ):
        assert party_called(stranger) is None
    assert parties_called(["router-0.router.baton", "admin.baton", "localhost"]) == {router("router-0"), ADMIN}


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", "-a", "a-", "x" * 64, "ü"])
def test_an_id_that_no_file_and_no_certificate_can_carry_is_refused(name: str) -> None:
    with pytest.raises(InvalidConfig):
        worker(name)
    with pytest.raises(InvalidConfig):
        Party(Kind.ADMIN, "x")


def test_settings_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="go together"):
        TlsConfig(cert="a")
    with pytest.raises(InvalidConfig, match=r"tls\.mode"):
        TlsConfig("off", "a", "b", "c")
    TlsConfig("off").check_host("127.0.0.1")
    TlsConfig("insecure").check_host("10.0.0.1")
    TlsConfig().check_host("10.0.0.1")
    with pytest.raises(InvalidConfig, match="insecure"):
        TlsConfig("off").check_host("10.0.0.1")
    assert credentials_of(TlsConfig("off"), ADMIN) is None
    with pytest.raises(InvalidConfig, match="baton tls init"):
        credentials_of(TlsConfig(), worker("decode-0"))


def test_files_are_their_owners_alone(tmp_path: Path) -> None:
    folder = tmp_path / "tls"
    make_folder(folder, members(["decode-0"], ["router-0"]), 10)
    names = {
        "ca.crt",
        "ca.key",
        "worker.decode-0.crt",
        "worker.decode-0.key",
        "router.router-0.crt",
        "router.router-0.key",
    }
    assert set(os.listdir(folder)) == names
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    with pytest.raises(InvalidConfig, match="has an authority"):
        make_folder(folder, (), 10)
    folder.chmod(0o750)
    with pytest.raises(InvalidConfig, match="nobody else"):
        add(folder, members(["decode-1"], []), 10)
    with pytest.raises(InvalidConfig, match="there is no folder"):
        check_owner(tmp_path / "elsewhere")
    link = tmp_path / "link"
    folder.chmod(0o700)
    link.symlink_to(folder)
    with pytest.raises(InvalidConfig, match="must be a folder"):
        check_owner(link)


def test_files_that_hold_no_certificate_are_named(tmp_path: Path) -> None:
    make_folder(tmp_path / "tls", members(["decode-0"], []), 10)
    with pytest.raises(InvalidConfig, match=r"cannot read .*worker\.decode-1\.crt"):
        Credentials(config_of(tmp_path / "tls"), worker("decode-1"))
    (tmp_path / "tls" / "worker.decode-0.crt").write_text("nothing")
    with pytest.raises(InvalidConfig, match="no certificate"):
        Credentials(config_of(tmp_path / "tls"), worker("decode-0"))
    os.unlink(tmp_path / "tls" / "worker.decode-0.crt")
    os.mkfifo(tmp_path / "tls" / "worker.decode-0.crt")
    with pytest.raises(InvalidConfig, match="no certificate"):
        Credentials(config_of(tmp_path / "tls"), worker("decode-0"))


def test_the_command_makes_them_and_says_what_to_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made"
    assert main(["tls", "init", "--out", str(out), "--worker", "decode-0", "--router", "router-0", "--no-admin"]) == 0
    assert f"tls.cert={out}/{{name}}.crt" in capsys.readouterr().out
    assert {"worker.decode-0.key", "observer.crt", "admin.crt", "router.router-0.crt"} <= set(os.listdir(out))
    before = (out / "worker.decode-0.crt").read_bytes()
    assert main(["tls", "add", "--out", str(out), "--worker", "decode-0"]) == 0
    assert (out / "worker.decode-0.crt").read_bytes() != before
    assert main(["tls", "add", "--out", str(out)]) == 2
    assert main(["tls", "init", "--out", str(out)]) == 2
    assert main(["tls", "add", "--out", str(tmp_path), "--worker", "a/b"]) == 2


class Answering:
    """A server with one method that anybody in the cluster may call; it answers who the caller is."""

    def __init__(self, credentials: Credentials) -> None:
        self._server = make_server((), credentials)

        async def describe(request: bytes, context: grpc.aio.ServicerContext) -> bytes:
            return " ".join(sorted(party.dns_name for party in callers(context))).encode()

        methods = {"Describe": grpc.unary_unary_rpc_method_handler(describe)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("baton.workers.Worker", methods),))
        self.target = f"127.0.0.1:{bind(self._server, '127.0.0.1', 0, credentials)}"

    async def __aenter__(self) -> Answering:
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)

    async def ask(self, credentials: Credentials, peer: Party) -> str:
        async with open_channel(self.target, (("grpc.use_local_subchannel_pool", 1),), credentials, peer) as channel:
            return (await channel.unary_unary(DESCRIBE)(b"", timeout=20)).decode()


async def test_new_files_are_used_without_a_restart_and_an_old_authority_is_forgotten(tmp_path: Path) -> None:
    """The authorities change one after the other, as an operator does it: both believed, then new certificates, then one believed."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        make_folder(folder, members(["decode-0"], ["router-0"]), 10)
    used = tmp_path / "used"
    used.mkdir()

    def use(name: str, content: bytes) -> None:
        (used / "coming").write_bytes(content)
        (used / "coming").rename(used / name)

    for name in os.listdir(old):
        use(name, (old / name).read_bytes())
    server, client = (Credentials(config_of(used), party) for party in (worker("decode-0"), router("router-0")))
    stays_old = Credentials(config_of(old), router("router-0"))
    async with Answering(server) as answering:
        assert await answering.ask(client, worker("decode-0")) == "admin.baton router-0.router.baton"
        use("ca.crt", (old / "ca.crt").read_bytes() + (new / "ca.crt").read_bytes())
        for name in ("worker.decode-0.key", "worker.decode-0.crt", "router.router-0.key", "router.router-0.crt"):
            use(name, (new / name).read_bytes())
        assert await answering.ask(client, worker("decode-0"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # the server's certificate is the new authority's already
            await answering.ask(stays_old, worker("decode-0"))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        use("ca.crt", (new / "ca.crt").read_bytes())
        assert await answering.ask(client, worker("decode-0"))
        # Files that cannot be read leave things as they are.
        use("worker.decode-0.crt", b"half a fi")
        assert await answering.ask(client, worker("decode-0"))


async def test_certificates_that_do_not_hold_now_are_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "tls", members(["decode-0"], ["router-0"]), 10)
    files = tmp_path / "tls"
    good = Credentials(config_of(files), worker("decode-0"))
    signer = Authority(Pair((files / "ca.crt").read_bytes(), (files / "ca.key").read_bytes()))
    async with Answering(good) as answering:
        for when in (datetime.now(UTC) - timedelta(days=30), datetime.now(UTC) + timedelta(days=30)):
            pair = signer.issue((router("router-0"),), 5, when)
            (files / "router.router-0.crt").write_bytes(pair.cert)
            (files / "router.router-0.key").write_bytes(pair.key)
            with pytest.raises(grpc.aio.AioRpcError):
                await answering.ask(Credentials(config_of(files), router("router-0")), worker("decode-0"))


def test_an_authoritys_key_must_be_its_own() -> None:
    one, other = Authority.make(10).pair, Authority.make(10).pair
    for pair in (Pair(one.cert, other.key), Pair(b"x", one.key), Pair(one.cert, b"x")):
        with pytest.raises(InvalidConfig):
            Authority(pair)
