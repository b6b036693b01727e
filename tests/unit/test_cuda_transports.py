"""KV between GPUs, as far as a machine without one can tell: addresses, handles and nonces against a runtime whose devices are host memory."""

from __future__ import annotations

import ctypes
import importlib
import json
import secrets

import numpy as np
import pytest
from transport_ends import HOST, LAYOUT, whole_blocks

from workers.errors import InvalidConfig, TransferFailed
from workers.kv_memory.memory import KvMemory
from workers.status import WorkerAddress
from workers.transports.contract import View
from workers.transports.cuda_ipc import CudaIpcTransport
from workers.transports.factory import make_transports

SOURCE, TARGET = WorkerAddress("prefill-0", 1, "127.0.0.1:1"), WorkerAddress("decode-0", 1, "127.0.0.1:2")


class Machine:
    """The allocations that all processes of a host export, by handle."""

    def __init__(self) -> None:
        self.allocations: dict[bytes, View] = {}


class HostRuntime:
    """A CudaRuntime whose device memory is arrays, and whose copies happen at `wait`, as on a stream."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.pending: list[tuple[int, int, int]] = []
        self.opened: list[int] = []
        self.streams = 0

    def reserve(self, num_bytes: int) -> View:
        allocation = np.zeros(num_bytes, np.uint8)
        self.machine.allocations[secrets.token_bytes(64)] = allocation
        return allocation

    def use_device(self, index: int) -> None:
        assert index == 0

    def allocate(self, content: bytes) -> int:
        allocation = self.reserve(len(content))
        allocation[:] = np.frombuffer(content, np.uint8)
        return allocation.ctypes.data

    def free(self, address: int) -> None:
        (handle,) = [h for h, a in self.machine.allocations.items() if a.ctypes.data == address]
        del self.machine.allocations[handle]

    def export(self, address: int) -> tuple[bytes, int]:
        for handle, allocation in self.machine.allocations.items():
            if 0 <= address - allocation.ctypes.data < allocation.nbytes:
                return handle, address - allocation.ctypes.data
        raise TransferFailed("no such allocation")

    def open(self, handle: bytes) -> int:
        if handle not in self.machine.allocations:
            raise TransferFailed("invalid handle")
        self.opened.append(self.machine.allocations[handle].ctypes.data)
        return self.opened[-1]

    def close(self, address: int) -> None:
        self.opened.remove(address)

    def make_stream(self) -> int:
        self.streams += 1
        return 7

    def destroy_stream(self, stream: int) -> None:
        assert stream == 7
        self.streams -= 1

    def copy_on_device(self, target: int, source: int, num_bytes: int, stream: int) -> None:
        self.pending.append((target, source, num_bytes))

    copy_to_host = copy_on_device

    def wait(self, stream: int) -> None:
        for target, source, num_bytes in self.pending:
            ctypes.memmove(target, source, num_bytes)
        self.pending.clear()


class Gpu:
    """One worker with a pool in the middle of an allocation, and its mirror."""

    def __init__(self, machine: Machine) -> None:
        self.runtime = HostRuntime(machine)
        self.memory = KvMemory(LAYOUT)
        room = self.runtime.reserve(LAYOUT.pool_bytes + 512)
        self.pool = room[256 : 256 + LAYOUT.pool_bytes]
        self.memory.device_address = self.pool.ctypes.data
        self.transport = CudaIpcTransport(self.memory, HOST, lambda: self.runtime)


async def test_pieces_are_copied_into_the_pool_and_its_mirror_and_nowhere_else() -> None:
    machine = Machine()
    source, target = Gpu(machine), Gpu(machine)
    source.pool[:] = np.random.default_rng(0).integers(0, 256, source.pool.nbytes, np.uint8)
    offer = source.transport.offer(TARGET, HOST)
    assert offer is not None
    channel = await target.transport.connect(SOURCE, LAYOUT, offer)
    pieces = whole_blocks([3, 9, 99])
    homes = {0: 5, 1: 1, 2: 2}
    inbox = channel.inbox("t", lambda piece: target.memory.block(homes[piece], 0, LAYOUT.num_layers))
    assert await inbox.collect(pieces) == ((0, 1), (2,))
    expected = np.zeros_like(target.pool)
    size = LAYOUT.block_bytes
    expected[5 * size : 6 * size], expected[size : 2 * size] = (
        source.pool[3 * size : 4 * size],
        source.pool[9 * size : 10 * size],
    )
    assert np.array_equal(target.pool, expected) and np.array_equal(target.memory.bytes, expected)
    await inbox.close()
    await target.transport.close()
    await source.transport.close()
    assert not target.runtime.opened and not target.runtime.streams and len(machine.allocations) == 2


async def test_memory_of_somebody_else_is_refused() -> None:
    machine = Machine()
    source, target = Gpu(machine), Gpu(machine)
    offer = source.transport.offer(TARGET, HOST)
    assert offer is not None
    fields = json.loads(offer)
    for wrong in ({"nonce": "00" * 16}, {"pool": "AAAA"}, {"nonce_at": fields["pool"]}, {"pool": "*"}):
        with pytest.raises(TransferFailed):
            await target.transport.connect(SOURCE, LAYOUT, json.dumps(fields | wrong).encode())
    assert not target.runtime.opened
    await target.transport.close()
    await source.transport.close()


async def test_device_memory_is_not_offered_to_another_host_or_from_a_pool_on_the_host() -> None:
    machine = Machine()
    gpu = Gpu(machine)
    assert gpu.transport.offer(TARGET, "another-host") is None
    gpu.memory.device_address = 0
    assert gpu.transport.offer(TARGET, HOST) is None
    await gpu.transport.close()


async def test_a_worker_without_a_gpu_leaves_out_what_needs_one() -> None:
    memory = KvMemory(LAYOUT)
    names = ["cuda_ipc", "nccl", "shm"]
    made = make_transports(names, memory, worker_id="w", host=HOST, listen_host="127.0.0.1", timeout_s=5.0)
    assert list(made) == ["shm"]
    with pytest.raises(InvalidConfig, match="pigeon"):
        make_transports(["pigeon"], memory, worker_id="w", host=HOST, listen_host="127.0.0.1", timeout_s=5.0)
    await made["shm"].close()


async def test_nccl_is_not_offered_without_cuda() -> None:
    nccl = importlib.import_module("workers.transports.nccl")
    if nccl.torch.cuda.is_available():
        pytest.skip("says what happens without a GPU")
    memory = KvMemory(LAYOUT)
    memory.device_address = 4096
    transport = nccl.NcclTransport(memory, "127.0.0.1", 5.0)
    assert transport.offer(TARGET, HOST) is None
    await transport.close()
