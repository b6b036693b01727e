"""Settings from files, flags and --set; what is wrong is said with the place and a way out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from cluster.config import ClusterConfig, load_config, schema
from cluster.pools import Pools
from workers.errors import InvalidConfig
from workers.status import Role

MODEL = {"worker.model": "m"}


def load(*assignments: str, **flags: Any) -> ClusterConfig:
    return load_config(None, {**MODEL, **flags}, assignments)


def test_flags_win_over_the_file_and_set_wins_over_both(tmp_path: Path) -> None:
    file = tmp_path / "baton.yaml"
    file.write_text("worker: {model: m, max_num_seqs: 1, max_queue: 1, max_batch_tokens: 1}\n")
    flags = {"worker.max_queue": 2, "worker.max_batch_tokens": 2, "worker.dtype": None}
    worker = load_config(file, flags, ["worker.max_batch_tokens=3"]).worker
    assert (worker.max_num_seqs, worker.max_queue, worker.max_batch_tokens) == (1, 2, 3)
    assert worker.dtype == "float32"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "worker:\n  model: m\npools:\n  decode: 3\n"),
        ("a.json", '{"worker": {"model": "m"}, "pools": {"decode": 3}}'),
        ("a.toml", '[worker]\nmodel = "m"\n[pools]\ndecode = 3\n'),
    ],
)
def test_three_formats_say_the_same(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    assert load_config(tmp_path / name, {}).pools.decode == 3


def test_texts_become_what_the_setting_is() -> None:
    config = load(
        "worker.kv_memory_bytes=64MiB",
        "worker.transports=grpc",
        "worker.prefix_cache=off",
        "store.lease_ttl_s=2.5",
        "router.api.api_keys=a, b",
        "router.api.sampling_defaults.seed=none",
        "router.api.sampling_defaults.logit_bias=[[5, 0.5]]",
    )
    assert config.worker.kv_memory_bytes == 64 * 2**20
    assert config.worker.transports == ("grpc",)
    assert config.worker.prefix_cache is False
    assert config.store.lease_ttl_s == 2.5
    assert config.router.api.api_keys == ("a", "b")
    assert config.router.api.sampling_defaults.seed is None
    assert config.router.api.sampling_defaults.logit_bias == ((5, 0.5),)


def test_the_router_reads_the_workers_model_unless_it_names_its_own() -> None:
    assert load().router.model == "m"
    assert load("router.model=n").router.model == "n"


def test_workers_are_named_by_pool_and_routers_get_ports_of_their_own() -> None:
    config = load("pools.prefill=2", "pools.mixed=1", "pools.routers=2")
    assert config.pools.workers == (
        ("prefill-0", Role.PREFILL),
        ("prefill-1", Role.PREFILL),
        ("decode-0", Role.DECODE),
        ("mixed-0", Role.MIXED),
    )
    assert [config.router_at(at).port for at in range(2)] == [8000, 8001]
    assert load("router.port=0").router_at(1).port == 0


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("worker.max_num_seq=3", "unknown setting worker.max_num_seq; did you mean worker.max_num_seqs?"),
        ("wroker.dtype=float32", "unknown setting wroker; did you mean worker?"),
        ("qqq=1", "unknown setting qqq; known here: worker, router, pools"),
        ("worker.max_num_seqs=many", "worker.max_num_seqs must be a whole number; it is 'many'"),
        ("worker.max_num_seqs=2GiB", "worker.max_num_seqs must be a whole number"),
        ("worker.max_num_seqs=0", "worker.max_num_seqs must be at least 1"),
        ("worker.transfer_timeout_s=soon", "worker.transfer_timeout_s must be a number"),
        ("worker.prefix_cache=maybe", "worker.prefix_cache must be true or false"),
        ("worker=5", "worker must be a group of settings"),
        ("store.url=etcd://x", "store.url must be memory, redis"),
        ("store.cluster=a b", "store.cluster takes letters"),
        ("pools.prefill=0", "no worker could prefill"),
        ("ray.object_store_bytes=1MiB", "ray.object_store_bytes must be at least"),
        ("ray.worker_gpus=0", "ray.worker_gpus must be above 0"),
        ("worker.max_num_seqs", "--set takes NAME=VALUE"),
        ("router.api.sampling_defaults.logit_bias=[[1]]", r"logit_bias\[0\] must be a list of 2 values"),
    ],
)
def test_a_wrong_setting_is_named_with_a_way_out(assignment: str, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        load(assignment)


def test_a_missing_model_is_named() -> None:
    with pytest.raises(InvalidConfig, match=r"worker\.model is required"):
        load_config(None, {})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "worker: [unclosed", "cannot parse"),
        ("a.yaml", "- a list", "must be a mapping"),
        ("a.json", "{", "cannot parse"),
        ("a.toml", "= 3", "cannot parse"),
        ("a.ini", "", "ends in .yaml, .json or .toml"),
        ("a.yaml", None, "cannot read the configuration"),
    ],
)
def test_a_broken_file_is_one_sentence(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InvalidConfig, match=message) as caught:
        load_config(tmp_path / name, {})
    assert "\n" not in str(caught.value)


def test_the_schema_is_valid_and_agrees_with_the_reader() -> None:
    written = schema()
    jsonschema.Draft202012Validator.check_schema(written)
    validator = jsonschema.Draft202012Validator(written)
    good: dict[str, Any] = {
        "worker": {"model": "m", "dtype": "bfloat16"},
        "router": {"port": 9000},
        "pools": {"mixed": 1},
    }
    validator.validate(good)
    for bad in ({"worker": {"max_num_seq": 1}}, {"worker": {"model": 3}}, {"pools": {"decode": "two"}}):
        assert not validator.is_valid(bad), bad
    described = written["properties"]["worker"]["properties"]["max_num_seqs"]
    assert described == {"type": "integer", "description": "Sequences that run at once.", "default": 64}
    assert json.dumps(written)


def test_workers_reserve_a_gpu_only_where_they_compute_on_one() -> None:
    assert "num_gpus" not in Pools(load())._worker_options("decode-0")
    assert Pools(load("worker.device=cuda"))._worker_options("decode-0")["num_gpus"] == 1
    shared = Pools(load("worker.device=cuda", "ray.worker_gpus=0.5"))
    assert shared._worker_options("decode-0")["num_gpus"] == 0.5
    assert "num_gpus" not in shared._options("router-0")
