"""NIXL and Mooncake Transfer Engine for bench/kv_handoff.py: the receiver reads the sender's registered memory. Runs in the peers' own environment."""

from __future__ import annotations

import argparse
import base64
import importlib
import importlib.metadata
import os
import time
from typing import Any

import kv_lines
import numpy as np

BUFFER_BYTES = 256 << 20
_TIMEOUT_S = 60.0


class Nixl:
    """Reads over UCX. A transfer is prepared once and posted again and again, as its users do for fixed blocks."""

    def __init__(self) -> None:
        from nixl._api import nixl_agent, nixl_agent_config

        self.buffer = np.ones(BUFFER_BYTES, np.uint8)
        self._name = f"agent-{os.getpid()}"
        self._agent = nixl_agent(self._name, nixl_agent_config(backends=["UCX"]))
        self._agent.register_memory([(self.buffer.ctypes.data, BUFFER_BYTES, 0, "")], "DRAM")
        self._peer: dict[str, Any] = {}

    def on_listen(self) -> dict[str, Any]:
        metadata = base64.b64encode(self._agent.get_agent_metadata()).decode()
        return {"name": self._name, "address": self.buffer.ctypes.data, "metadata": metadata}

    def on_connect(self, peer: dict[str, Any]) -> dict[str, Any]:
        self._agent.add_remote_agent(base64.b64decode(peer["metadata"]))
        self._peer = peer
        return {}

    def on_measure(self, shape: str, num_bytes: int, repeats: int) -> dict[str, Any]:
        places = max(1, min(8, BUFFER_BYTES // num_bytes))
        handles = []
        for place in range(places):
            offset = place * num_bytes
            mine = self._agent.get_xfer_descs([(self.buffer.ctypes.data + offset, num_bytes, 0)], "DRAM")
            theirs = self._agent.get_xfer_descs([(self._peer["address"] + offset, num_bytes, 0)], "DRAM")
            handles.append(self._agent.initialize_xfer("READ", mine, theirs, self._peer["name"]))

        def once(turn: int) -> float:
            handle = handles[turn % places]
            started = time.perf_counter()
            state = self._agent.transfer(handle)
            while state == "PROC":
                if time.perf_counter() - started > _TIMEOUT_S:
                    break
                state = self._agent.check_xfer_state(handle)
            if state != "DONE":
                raise RuntimeError(f"a read ended as {state}")
            return time.perf_counter() - started

        result = kv_lines.timed(once, repeats)
        for handle in handles:
            self._agent.release_xfer_handle(handle)
        return result


class Mooncake:
    """Synchronous reads over its TCP transport."""

    def __init__(self) -> None:
        from mooncake.engine import TransferEngine

        self.buffer = np.ones(BUFFER_BYTES, np.uint8)
        self._engine = TransferEngine()
        if self._engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", ""):
            raise RuntimeError("the engine cannot be initialized")
        if self._engine.register_memory(self.buffer.ctypes.data, BUFFER_BYTES):
            raise RuntimeError("memory cannot be registered")
        self._peer: dict[str, Any] = {}

    def on_listen(self) -> dict[str, Any]:
        return {"name": f"127.0.0.1:{self._engine.get_rpc_port()}", "address": self.buffer.ctypes.data}

    def on_connect(self, peer: dict[str, Any]) -> dict[str, Any]:
        self._peer = peer
        return {}

    def on_measure(self, shape: str, num_bytes: int, repeats: int) -> dict[str, Any]:
        places = max(1, min(8, BUFFER_BYTES // num_bytes))

        def once(turn: int) -> float:
            offset = turn % places * num_bytes
            started = time.perf_counter()
            mine, theirs = self.buffer.ctypes.data + offset, self._peer["address"] + offset
            if self._engine.transfer_sync_read(self._peer["name"], mine, theirs, num_bytes):
                raise RuntimeError("a read failed")
            return time.perf_counter() - started

        return kv_lines.timed(once, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=("nixl", "mooncake"))
    parser.add_argument("--ucx-tls", help="the UCX transports that NIXL may use; all by default")
    args = parser.parse_args()
    if args.ucx_tls:
        os.environ["UCX_TLS"] = args.ucx_tls
    importlib.import_module({"nixl": "nixl._api", "mooncake": "mooncake.engine"}[args.kind])  # says what is missing
    if args.kind == "nixl":
        kv_lines.serve(f"NIXL {importlib.metadata.version('nixl')}", Nixl)
    else:
        kv_lines.serve(
            f"Mooncake Transfer Engine {importlib.metadata.version('mooncake-transfer-engine-non-cuda')}", Mooncake
        )


if __name__ == "__main__":
    main()
