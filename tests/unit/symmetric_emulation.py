"""torch's all_to_all_vdev_2d and all_to_all_vdev_2d_offset on host memory over Gloo, written from their documentation.

Buffers begin as noise, and what an exchange does not write stays as it was: rows of an earlier one, which look like rows. Splits are int64 [G * ne]; chunk
(peer, expert) of the first operation's input is number peer * ne + expert, chunk (expert, source) of its output number
expert * G + source; the second operation goes the other way round, with offsets of its input given.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore

from workers.model.parallel.collectives import Communicator
from workers.model.parallel.process_groups import make_group


def emulated(store: Any, rank: int, size: int, device: torch.device) -> EmulatedMemory:
    group = make_group(PrefixStore("emulated", store), rank, size, "cpu", "127.0.0.1")
    return EmulatedMemory(Communicator(group, rank, size, threading.Event()))


class EmulatedMemory:
    """Implements workers.model.parallel.direct_dispatch.SymmetricMemory."""

    def __init__(self, ranks: Communicator) -> None:
        self._ranks = ranks

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return noise(torch.empty(shape, dtype=dtype))

    def scatter(self, rows: Tensor, out: Tensor, splits: Tensor, out_splits_offsets: Tensor) -> None:
        all_to_all_vdev_2d(self._ranks, rows, out, splits, out_splits_offsets)

    def give_back(self, rows: Tensor, out: Tensor, splits_offsets: Tensor, out_splits_offsets: Tensor) -> None:
        all_to_all_vdev_2d_offset(self._ranks, rows, out, splits_offsets, out_splits_offsets)


def all_to_all_vdev_2d(
    ranks: Communicator, rows: Tensor, out: Tensor, splits: Tensor, out_splits_offsets: Tensor, major_align: int = 1
) -> None:
    G, ne = ranks.size, len(splits) // ranks.size
    offsets = splits.cumsum(0) - splits
    assert int(splits.sum()) <= len(rows), "the splits are longer than the input"
    order = [peer * ne + expert for peer in range(G) for expert in range(ne)]
    chunks = _exchange(ranks, rows, splits, offsets, order, ne)
    at, splits_of, offset_of = 0, [], []
    for expert in range(ne):
        first = at
        for source in range(G):
            part = chunks[source][expert]
            splits_of.append(len(part))
            offset_of.append(at)
            assert at + len(part) <= len(out), "more arrives than the output holds"
            out[at : at + len(part)] = part
            at += len(part)
        at = first + max(-(-(at - first) // major_align), 1) * major_align  # an empty expert is padded too
    out_splits_offsets.copy_(torch.tensor([splits_of, offset_of]))


def all_to_all_vdev_2d_offset(
    ranks: Communicator, rows: Tensor, out: Tensor, splits_offsets: Tensor, out_splits_offsets: Tensor
) -> None:
    G, ne = ranks.size, splits_offsets.shape[1] // ranks.size
    order = [expert * G + peer for peer in range(G) for expert in range(ne)]
    chunks = _exchange(ranks, rows, splits_offsets[0], splits_offsets[1], order, ne)
    at, splits_of, offset_of = 0, [], []
    for source in range(G):
        for part in chunks[source]:
            splits_of.append(len(part))
            offset_of.append(at)
            assert at + len(part) <= len(out), "more arrives than the output holds"
            out[at : at + len(part)] = part
            at += len(part)
    out_splits_offsets.copy_(torch.tensor([splits_of, offset_of]))


def noise(values: Tensor) -> Tensor:
    """Fills with what nobody may read: not-a-numbers, splits beyond any buffer, and as bytes zeros, which look like slots."""
    if values.dtype is torch.uint8:
        return values.zero_()
    return values.fill_(float("nan") if values.dtype.is_floating_point else 1 << 40)


def _exchange(
    ranks: Communicator, rows: Tensor, splits: Tensor, offsets: Tensor, order: list[int], ne: int
) -> list[list[Tensor]]:
    """The chunks of each rank for this one, [source][expert]; `order` lists the own chunks by peer, then expert."""
    G = ranks.size
    lengths = splits[torch.tensor(order)].view(G, ne)
    theirs, pending = ranks.all_to_all(lengths, [1] * G, [1] * G)
    pending.wait()
    leaving = torch.cat([rows[int(offsets[i]) : int(offsets[i]) + int(splits[i])] for i in order])
    arriving, pending = ranks.all_to_all(leaving, lengths.sum(1).tolist(), theirs.sum(1).tolist())
    pending.wait()
    found = arriving.split(theirs.flatten().tolist())
    return [list(found[source * ne : (source + 1) * ne]) for source in range(G)]
