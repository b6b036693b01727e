"""The yardsticks of bench/kv_handoff.py: one memcpy, one blocking TCP socket, one raw Gloo pair. No checksums, no protocol."""

from __future__ import annotations

import argparse
import platform
import socket
import struct
import threading
import time
from datetime import timedelta
from typing import Any

import kv_lines
import numpy as np

BUFFER_BYTES = 256 << 20
_ASK = struct.Struct("<Q")


class Memcpy:
    """Both ends in one process."""

    def __init__(self) -> None:
        self._source, self._target = np.ones(BUFFER_BYTES, np.uint8), np.full(BUFFER_BYTES, 2, np.uint8)

    def on_listen(self) -> dict[str, Any]:
        return {}

    def on_connect(self, peer: dict[str, Any]) -> dict[str, Any]:
        return {}

    def on_measure(self, shape: str, num_bytes: int, repeats: int) -> dict[str, Any]:
        def once(turn: int) -> float:
            first = turn * num_bytes % (BUFFER_BYTES - num_bytes + 1)
            started = time.perf_counter()
            np.copyto(self._target[first : first + num_bytes], self._source[first : first + num_bytes])
            return time.perf_counter() - started

        return kv_lines.timed(once, repeats)


class Ends:
    """The receiver asks over a socket for so many bytes; `give` and `take` say how they travel."""

    def __init__(self) -> None:
        self.buffer = np.ones(BUFFER_BYTES, np.uint8)
        self._listener: socket.socket | None = None
        self.connection: socket.socket

    def on_listen(self) -> dict[str, Any]:
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()
        return {"port": self._listener.getsockname()[1]}

    def on_connect(self, peer: dict[str, Any]) -> dict[str, Any]:
        self.connection = socket.create_connection(("127.0.0.1", peer["port"]))
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return {}

    def _serve(self) -> None:
        """Gives until the receiver hangs up."""
        assert self._listener is not None
        self.connection, _ = self._listener.accept()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ready(True)
        while asked := self.connection.recv(_ASK.size, socket.MSG_WAITALL):
            (num_bytes,) = _ASK.unpack(asked)
            self.give(self.buffer[:num_bytes])

    def on_measure(self, shape: str, num_bytes: int, repeats: int) -> dict[str, Any]:
        view = self.buffer[:num_bytes]

        def once(turn: int) -> float:
            started = time.perf_counter()
            self.connection.sendall(_ASK.pack(num_bytes))
            self.take(view)
            return time.perf_counter() - started

        return kv_lines.timed(once, repeats)

    def ready(self, is_sender: bool) -> None:
        """Called once both sides are connected."""

    def give(self, view: Any) -> None:
        self.connection.sendall(view.data)

    def take(self, view: Any) -> None:
        rest = view.data
        while rest.nbytes:
            rest = rest[self.connection.recv_into(rest, rest.nbytes, socket.MSG_WAITALL) :]


class RawGloo(Ends):
    """One tensor a message."""

    def on_listen(self) -> dict[str, Any]:
        from torch._C._distributed_c10d import TCPStore

        self._store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=30), False)
        return {**super().on_listen(), "store": self._store.port}

    def on_connect(self, peer: dict[str, Any]) -> dict[str, Any]:
        from torch._C._distributed_c10d import TCPStore

        super().on_connect(peer)
        self._store = TCPStore("127.0.0.1", peer["store"], None, False, timedelta(seconds=30), False)
        self.ready(False)
        return {}

    def ready(self, is_sender: bool) -> None:
        import torch
        import torch.distributed as dist

        self._group: Any = dist.ProcessGroupGloo(self._store, int(not is_sender), 2, timedelta(seconds=30))
        self._tensor = torch.from_numpy(self.buffer)

    def give(self, view: Any) -> None:
        self._group.send([self._tensor[: view.nbytes]], 1, 0).wait()

    def take(self, view: Any) -> None:
        self._group.recv([self._tensor[: view.nbytes]], 0, 0).wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("memcpy", "socket", "gloo"))
    kind = parser.parse_args().kind
    version = f"Python {platform.python_version()}"
    if kind == "gloo":
        import torch

        version = f"torch {torch.__version__}"
    kv_lines.serve(version, {"memcpy": Memcpy, "socket": Ends, "gloo": RawGloo}[kind])


if __name__ == "__main__":
    main()
