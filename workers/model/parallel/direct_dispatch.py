"""Brings rows to experts and back with the numbers of rows that travel kept on the device, so that the host never waits.

The contract is that of workers.model.parallel.expert_dispatch.AllToAll, and so are the bits. Rows go through buffers that all ranks
reach, by torch's `symm_mem.all_to_all_vdev_2d` and `all_to_all_vdev_2d_offset`, which copy from the sender's buffer what
its splits say. They are used with one "expert" a rank: a row travels once to a rank however many of its experts live
there, and neither the number of slots nor an empty expert's padding matters. What cannot be known on the host is bounded:
no rank receives more rows than the group has tokens in a pass (`DirectBuffers.expect`).

The two operations themselves have never run here; tests put an emulation in their place.

Shapes: T tokens, k experts of a token, A = T*k, D hidden, G ranks, S slots of a rank, L rows that may be sent, M that may
arrive, B assignments that may arrive; what is beyond the true numbers is never read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.model.parallel.collectives import Links, Stages
from workers.model.parallel.expert_dispatch import Add, Dispatched, ExpertTable, as_bytes, from_bytes

_ROW_ALIGNMENT = 16
"""Rows are padded to a multiple of this many bytes, as copies between devices like it."""


class SymmetricMemory(Protocol):
    """Buffers that every rank of a group allocates alike, and the exchanges among them. Both return before they are done."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """All ranks call this with the same arguments, in the same order."""

    def scatter(self, rows: Tensor, out: Tensor, splits: Tensor, out_splits_offsets: Tensor) -> None:
        """`splits` int64 [G]: rows for each rank, in order of rank. `out` gets those of all ranks for this one, in order of rank,
        and `out_splits_offsets` int64 [2, G] how many came from each and where they begin."""

    def give_back(self, rows: Tensor, out: Tensor, splits_offsets: Tensor, out_splits_offsets: Tensor) -> None:
        """As `scatter`, where row 1 of `splits_offsets` says where in `rows` those for each rank begin."""


class DirectBuffers:
    """The buffers of a rank, which its layers use in turn.

    A rank that has left an exchange may still be read by others. It writes into a buffer again only after the exchange of
    the other kind, which nobody passes who has not finished the one before: so there are two sets, and the kinds alternate.
    """

    def __init__(
        self,
        memory: SymmetricMemory,
        *,
        num_ranks: int,
        num_slots: int,
        num_choices: int,
        hidden_size: int,
        dtype: torch.dtype,
        max_tokens: int,
        exact: bool,
    ) -> None:
        G, k, D = num_ranks, num_choices, hidden_size
        self.memory, self.exact = memory, exact
        self._max_tokens = max_tokens
        num_sent, num_chosen = max_tokens * min(G, k), max_tokens * min(k, num_slots)
        row_bytes = D * dtype.itemsize + 2 * k + (0 if exact else 4 * k)
        width = -(-row_bytes // _ROW_ALIGNMENT) * _ROW_ALIGNMENT
        self.leaving_LX = memory.empty((num_sent, width), torch.uint8)
        self.arrived_MX = memory.empty((max_tokens, width), torch.uint8)
        self.leaving_G = memory.empty((G,), torch.int64)
        self.arrived_2G = memory.empty((2, G), torch.int64)
        # exact: an output a choice, and one row more for what is no choice
        self.returning_BD = memory.empty((num_chosen + 1 if exact else max_tokens, D), dtype)
        self.home_AD = memory.empty((max_tokens * k if exact else num_sent, D), dtype)
        self.returning_2G = memory.empty((2, G), torch.int64)
        self.home_2G = memory.empty((2, G), torch.int64)
        self.num_expected = 0

    def expect(self, num_tokens: int) -> None:
        """The coming pass has this many tokens, over all ranks. Raises ValueError when that is more than the buffers hold."""
        if num_tokens > self._max_tokens:
            raise ValueError(f"a pass of {num_tokens} tokens is above worker.max_batch_tokens {self._max_tokens}")
        self.num_expected = num_tokens


@dataclass(frozen=True, slots=True)
class Outbound:
    """Receipt of a dispatch, at the rank that the tokens live on."""

    place_A: Tensor
    """Where each (token, choice) comes back, in order of rank, then token, then choice."""
    place_GT: Tensor
    wanted_TG: Tensor
    """Which tokens went to which ranks, and where among the rows sent."""
    x_TD: Tensor
    """For its shape and type."""
    num_choices: int


@dataclass(frozen=True, slots=True)
class Inbound:
    """A dispatch, and what the rows that arrived ask of this rank's experts."""

    outbound: Outbound
    arrived_G: Tensor
    is_asked_Mk: Tensor
    order_B: Tensor
    """The (row, choice) of each assignment, in the order in which experts compute them."""
    weights_Mk: Tensor | None


class DirectAllToAll:
    """Implements Exchange among the ranks of `links.world`. All ranks must call with the same sequence of layers and passes."""

    def __init__(self, links: Links, table: ExpertTable, buffers: DirectBuffers, add: Add) -> None:
        self._links, self.table, self._buffers, self._add = links, table, buffers, add

    def dispatch(self, x_TD: Tensor, weights_Tk: Tensor, experts_Tk: Tensor) -> Stages[Outbound]:
        yield from ()
        world, size, buffers = self._links.world, self.table.slots_per_rank, self._buffers
        world.require_alive()
        T, k = experts_Tk.shape
        slot_Tk = self.table.choose(experts_Tk, world.rank)
        rank_Tk = slot_Tk // size
        wanted_TG = torch.zeros(T, world.size, dtype=torch.bool, device=x_TD.device).scatter_(1, rank_Tk, True)
        wanted_GT = wanted_TG.T.contiguous()
        # rows that travel come first, in order of rank, then token
        order_L = torch.argsort(wanted_GT.flatten().to(torch.int8), descending=True, stable=True)
        order_L = order_L[: T * min(world.size, k)]
        token_L, rank_L = order_L % max(T, 1), order_L // max(T, 1)
        is_mine_Lk = rank_Tk[token_L] == rank_L[:, None]
        slot_Lk = torch.where(is_mine_Lk, slot_Tk[token_L] % size, -1).to(torch.int16)
        columns = [as_bytes(x_TD[token_L]), as_bytes(slot_Lk)]
        if not buffers.exact:
            columns.append(as_bytes(weights_Tk[token_L]))
        rows_LX = torch.cat(columns, dim=1)
        buffers.leaving_LX[: len(rows_LX), : rows_LX.shape[1]] = rows_LX
        buffers.leaving_G.copy_(wanted_TG.sum(0))
        buffers.memory.scatter(buffers.leaving_LX, buffers.arrived_MX, buffers.leaving_G, buffers.arrived_2G)
        place_A = torch.argsort(torch.argsort(rank_Tk.flatten(), stable=True))
        place_GT = (wanted_GT.flatten().cumsum(0) - 1).clamp_(min=0).view(world.size, T)
        return Outbound(place_A, place_GT, wanted_TG, x_TD, k)

    def arrive(self, receipt: Outbound) -> Stages[Dispatched]:
        yield from ()
        buffers, size, k = self._buffers, self.table.slots_per_rank, receipt.num_choices
        M, row_bytes = buffers.num_expected, receipt.x_TD.shape[1] * receipt.x_TD.element_size()
        arrived_MX, arrived_G = buffers.arrived_MX[:M], buffers.arrived_2G[0].clone()
        x_MD = from_bytes(arrived_MX[:, :row_bytes], receipt.x_TD.dtype)
        slot_Mk = from_bytes(arrived_MX[:, row_bytes : row_bytes + 2 * k], torch.int16)
        is_row_M = torch.arange(M, device=x_MD.device) < arrived_G.sum()
        is_asked_Mk = (slot_Mk >= 0) & (slot_Mk < size) & is_row_M[:, None]
        slots_B, order_B = torch.sort(torch.where(is_asked_Mk, slot_Mk, size).flatten(), stable=True)
        each_S = torch.arange(size, dtype=slots_B.dtype, device=slots_B.device)
        ends_S = torch.searchsorted(slots_B, each_S, right=True, out_int32=True)
        order_B = order_B[: M * min(k, size)]
        weights_Mk = None
        if not buffers.exact:
            stored_Mk = from_bytes(arrived_MX[:, row_bytes + 2 * k : row_bytes + 6 * k], torch.float32)
            weights_Mk = torch.where(is_asked_Mk, stored_Mk, 0.0)
        inbound = Inbound(receipt, arrived_G, is_asked_Mk, order_B, weights_Mk)
        return Dispatched(x_MD.index_select(0, order_B // k), ends_S, inbound)

    def combine(
        self, outputs_AD: Tensor, weights_Tk: Tensor, receipt: Inbound, shared_TD: Tensor | None = None
    ) -> Stages[Tensor]:
        yield from ()
        self._links.world.require_alive()
        buffers, outbound = self._buffers, receipt.outbound
        if receipt.weights_Mk is None:
            counts_G = self._return_choices(outputs_AD, receipt)
        else:
            self._return_sums(outputs_AD, receipt)
            counts_G = receipt.arrived_G
        buffers.returning_2G[0] = counts_G
        buffers.returning_2G[1] = counts_G.cumsum(0) - counts_G
        buffers.memory.give_back(buffers.returning_BD, buffers.home_AD, buffers.returning_2G, buffers.home_2G)
        if receipt.weights_Mk is None:
            home_AD = buffers.home_AD[: outbound.place_A.shape[0]]
            return self._add(home_AD, outbound.place_A, weights_Tk, shared_TD)
        total_TD = torch.zeros(outbound.x_TD.shape, device=outbound.x_TD.device)
        for rank, place_T in enumerate(outbound.place_GT):
            rows_TD = buffers.home_AD.index_select(0, place_T).float()
            total_TD = total_TD + rows_TD.masked_fill_(~outbound.wanted_TG[:, rank, None], 0)
        if shared_TD is not None:
            total_TD = total_TD + shared_TD
        return total_TD.to(outputs_AD.dtype)

    def _return_choices(self, outputs_AD: Tensor, receipt: Inbound) -> Tensor:
        """Puts outputs in order of row, then choice, and returns how many go to each rank."""
        k, is_asked_A = receipt.outbound.num_choices, receipt.is_asked_Mk.flatten()
        upto_A = is_asked_A.cumsum(0)
        unread = self._buffers.returning_BD.shape[0] - 1
        place_B = torch.where(is_asked_A, upto_A - 1, unread).index_select(0, receipt.order_B)
        self._buffers.returning_BD.index_copy_(0, place_B, outputs_AD)
        before_A = torch.nn.functional.pad(upto_A, (1, 0))
        ends_G = before_A.index_select(0, receipt.arrived_G.cumsum(0) * k)
        return ends_G.diff(prepend=ends_G.new_zeros(1))

    def _return_sums(self, outputs_AD: Tensor, receipt: Inbound) -> None:
        """Puts the weighted sum of each row's outputs where the row arrived."""
        assert receipt.weights_Mk is not None
        if not outputs_AD.shape[0]:
            return
        is_asked_Mk = receipt.is_asked_Mk
        place_A = torch.zeros(is_asked_Mk.numel(), dtype=torch.int64, device=outputs_AD.device)
        place_A.index_copy_(0, receipt.order_B, torch.arange(len(receipt.order_B), device=outputs_AD.device))
        place_Mk = place_A.view(is_asked_Mk.shape)
        sums_MD = torch.zeros(len(place_Mk), outputs_AD.shape[1], device=outputs_AD.device)
        # products are rounded before they are added, as AllToAll's are; `add` may fuse the two
        for asked_M, place_M, weight_M in zip(is_asked_Mk.T, place_Mk.T, receipt.weights_Mk.T, strict=True):
            weighted_MD = outputs_AD.index_select(0, place_M).float() * weight_M[:, None]
            sums_MD += weighted_MD.masked_fill_(~asked_M[:, None], 0)
        self._buffers.returning_BD[: len(sums_MD)] = sums_MD.to(outputs_AD.dtype)


class Nvshmem:
    """Implements SymmetricMemory with torch's operations. Made by `nvshmem`."""

    def __init__(self, group_name: str, device: torch.device) -> None:
        self._group_name, self._device = group_name, device

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        symm_mem = _symm_mem()
        tensor: Tensor = symm_mem.empty(shape, dtype=dtype, device=self._device)
        symm_mem.rendezvous(tensor, self._group_name)
        return tensor

    def scatter(self, rows: Tensor, out: Tensor, splits: Tensor, out_splits_offsets: Tensor) -> None:
        torch.ops.symm_mem.all_to_all_vdev_2d(rows, out, splits, out_splits_offsets, self._group_name)

    def give_back(self, rows: Tensor, out: Tensor, splits_offsets: Tensor, out_splits_offsets: Tensor) -> None:
        torch.ops.symm_mem.all_to_all_vdev_2d_offset(rows, out, splits_offsets, out_splits_offsets, self._group_name)


def is_available() -> bool:
    """Whether torch was built with NVSHMEM and finds its library."""
    return bool(_symm_mem().is_nvshmem_available())


def nvshmem(store: Any, rank: int, size: int, device: torch.device) -> Nvshmem:
    """Joins the ranks that meet in `store`; once in a process's life, as NVSHMEM's world cannot take another process."""
    from torch._C._distributed_c10d import PrefixStore, _SymmetricMemory

    _symm_mem().set_backend("NVSHMEM")
    for name in ("0", _GROUP_NAME):  # torch bootstraps NVSHMEM's world from the group of that name
        _SymmetricMemory.set_group_info(name, rank, size, PrefixStore(f"symmetric-{name}", store))
    return Nvshmem(_GROUP_NAME, device)


_GROUP_NAME = "baton"


def _symm_mem() -> Any:
    import torch.distributed._symmetric_memory as symm_mem  # takes a while to import, and is only needed on GPUs

    return symm_mem
