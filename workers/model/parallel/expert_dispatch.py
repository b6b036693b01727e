"""Brings each token's row to the ranks of the experts that it chose, and their outputs back; knows no weights.

`dispatch` returns a receipt, which `arrive` and `combine` take. Local: all experts live in this process. AllToAll:
they are spread over ranks; a row travels once to a rank however many of its experts live there. The same with split sizes
that stay on the device: workers.model.parallel.direct_dispatch.

Shapes: T tokens, k experts of a token, A = T*k assignments, D hidden, E experts, G ranks, S expert slots of a rank, N
rows that travel (a token and a rank each), M rows that arrived, B assignments that arrived.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from workers.model.parallel.collectives import Links, Pending, Stages
from workers.model.parallel.expert_placement import Slots


@dataclass(frozen=True, slots=True)
class Receipt:
    """What `combine` needs to bring expert outputs home: where each (token, choice) landed among the dispatched rows."""

    place_A: Tensor
    num_choices: int


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows sorted by expert; expert e owns those before `ends_E[e]` (int32) that none before it owns."""

    rows_AD: Tensor
    ends_E: Tensor
    receipt: Any

    @property
    def counts_E(self) -> list[int]:
        """Rows of each expert, as numbers of the host: on a GPU this waits."""
        ends: list[int] = self.ends_E.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


Add = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""(rows, the place among them of each (token, choice), weights [T, k], what else is added [T, D]) gives sums [T, D]."""


class Exchange(Protocol):
    """How rows reach experts. `Any` is the exchange's own receipt."""

    def dispatch(self, x_TD: Tensor, weights_Tk: Tensor, experts_Tk: Tensor) -> Stages[Any]:
        """Sends the rows off."""

    def arrive(self, receipt: Any) -> Stages[Dispatched]:
        """The rows that this rank's experts compute, from wherever they come."""

    def combine(
        self, outputs_AD: Tensor, weights_Tk: Tensor, receipt: Any, shared_TD: Tensor | None = None
    ) -> Stages[Tensor]:
        """Brings outputs home: the weighted sum of each token's experts and `shared_TD`, [T, D], summed in fp32."""


def dispatch(x_TD: Tensor, experts_Tk: Tensor, num_experts: int) -> Dispatched:
    """Sorts the rows of x by chosen expert, tokens in order within one."""
    num_choices = experts_Tk.shape[1]
    flat_A = experts_Tk.flatten()
    order_A = torch.argsort(flat_A, stable=True)
    ends_E = torch.bincount(flat_A, minlength=num_experts).cumsum(0, dtype=torch.int32)
    return Dispatched(
        x_TD.index_select(0, order_A // num_choices), ends_E, Receipt(torch.argsort(order_A), num_choices)
    )


def combine(outputs_AD: Tensor, weights_Tk: Tensor, receipt: Receipt) -> Tensor:
    """Weighted sum of each token's expert outputs, fp32 [T, D].

    Adds in the order of the token's choices, never in the order experts finished, so it does not depend on the batch.
    """
    home_TkD = torch.unflatten(outputs_AD.index_select(0, receipt.place_A).float(), 0, (-1, receipt.num_choices))
    weighted_TkD = home_TkD * weights_Tk[..., None]
    total_TD = weighted_TkD[:, 0]
    for choice in range(1, receipt.num_choices):
        total_TD = total_TD + weighted_TkD[:, choice]
    return total_TD


def add_choices(outputs_AD: Tensor, place_A: Tensor, weights_Tk: Tensor, shared_TD: Tensor | None) -> Tensor:
    """As Add says, on the CPU."""
    total_TD = combine(outputs_AD, weights_Tk, Receipt(place_A, weights_Tk.shape[1]))
    if shared_TD is not None:
        total_TD = total_TD + shared_TD
    return total_TD.to(outputs_AD.dtype)


class Local:
    """All experts live here, expert e in slot e."""

    def __init__(self, num_experts: int) -> None:
        self._num_experts = num_experts

    def dispatch(self, x_TD: Tensor, weights_Tk: Tensor, experts_Tk: Tensor) -> Stages[Dispatched]:
        yield from ()
        return dispatch(x_TD, experts_Tk, self._num_experts)

    def arrive(self, receipt: Dispatched) -> Stages[Dispatched]:
        yield from ()
        return receipt

    def combine(
        self, outputs_AD: Tensor, weights_Tk: Tensor, receipt: Receipt, shared_TD: Tensor | None = None
    ) -> Stages[Tensor]:
        yield from ()
        return add_choices(outputs_AD, receipt.place_A, weights_Tk, shared_TD)


class ExpertTable:
    """Where one layer's experts are: for each the global slots (rank * S + slot) of its copies."""

    def __init__(self, slots: Slots, num_experts: int, num_ranks: int, device: torch.device) -> None:
        self.slots = slots
        self.slots_per_rank = len(slots) // num_ranks
        copies: list[list[int]] = [[] for _ in range(num_experts)]
        for slot, expert in enumerate(slots):
            copies[expert].append(slot)
        most = max(map(len, copies))
        padded = [[*held, *[held[0]] * (most - len(held))] for held in copies]
        self._slot_EC = torch.tensor(padded, device=device)
        self._count_E = torch.tensor([len(held) for held in copies], device=device)

    def choose(self, experts_Tk: Tensor, first: int) -> Tensor:
        """A global slot for each choice; the copies of an expert take turns over the tokens, from `first` on.

        All copies have the same bits, so which one is taken changes no result.
        """
        turns_T1 = torch.arange(first, first + experts_Tk.shape[0], device=experts_Tk.device)[:, None]
        return self._slot_EC[experts_Tk, turns_T1 % self._count_E[experts_Tk]]


@dataclass(frozen=True, slots=True)
class Travel:
    """Receipt of a dispatch between ranks, at the rank that the tokens live on."""

    arriving: Tensor
    pending: Pending
    arrived_G: list[int]
    """Rows that come from each rank."""
    token_N: Tensor
    """Which token each row sent was, in order of rank, then token."""
    sent_G: list[int]
    chosen_G: list[int]
    """Choices that each rank was sent."""
    place_A: Tensor
    x_TD: Tensor
    """For its shape and type."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A travel, and what its rows ask of this rank's experts."""

    travel: Travel
    row_B: Tensor
    """The arrived row of each assignment, in order of row, then choice."""
    choice_B: Tensor
    sorted_B: Tensor
    """The assignments in the order in which experts compute them."""
    weight_B: Tensor | None


class AllToAll:
    """Experts are spread over the ranks of `links.world`. All ranks must call with the same sequence of layers and batches.

    With `exact`, outputs travel back one a choice and are added at home, by `add`, in the order of choices: the very
    additions of `combine`. Otherwise each rank adds a row's outputs first and sends one row back for each that came.
    """

    def __init__(self, links: Links, table: ExpertTable, exact: bool = True, add: Add = add_choices) -> None:
        self._links, self.table, self._exact, self._add = links, table, exact, add

    def dispatch(self, x_TD: Tensor, weights_Tk: Tensor, experts_Tk: Tensor) -> Stages[Travel]:
        world, size = self._links.world, self.table.slots_per_rank
        slot_Tk = self.table.choose(experts_Tk, world.rank)
        rank_Tk = slot_Tk // size
        wanted_TG = torch.zeros(len(x_TD), world.size, dtype=torch.bool, device=x_TD.device)
        wanted_TG.scatter_(1, rank_Tk, True)
        rank_N, token_N = wanted_TG.T.nonzero().unbind(1)
        counts_2G = torch.stack((wanted_TG.sum(0), torch.bincount(rank_Tk.flatten(), minlength=world.size)))
        arrived, pending = world.all_to_all(counts_2G[0], [1] * world.size, [1] * world.size)
        mine_Nk = rank_Tk[token_N] == rank_N[:, None]
        slot_Nk = torch.where(mine_Nk, slot_Tk[token_N] % size, -1).to(torch.int16)
        columns = [as_bytes(x_TD[token_N]), as_bytes(slot_Nk)]
        if not self._exact:
            columns.append(as_bytes(weights_Tk[token_N]))
        yield pending
        sent_G, chosen_G, arrived_G = world.read(torch.cat((counts_2G, arrived[None])))
        arriving, pending = world.all_to_all(torch.cat(columns, dim=1), sent_G, arrived_G)
        # what comes back stands in order of rank, then token, then choice
        place_A = torch.argsort(torch.argsort(rank_Tk.flatten(), stable=True))
        return Travel(arriving, pending, arrived_G, token_N, sent_G, chosen_G, place_A, x_TD)

    def arrive(self, receipt: Travel) -> Stages[Dispatched]:
        x_MD, ends_S, arrival = yield from self.receive(receipt)
        return Dispatched(x_MD.index_select(0, arrival.row_B[arrival.sorted_B]), ends_S, arrival)

    def receive(self, receipt: Travel) -> Stages[tuple[Tensor, Tensor, Arrival]]:
        """The rows as they arrived [M, D], and where each slot's assignments end among those sorted by slot."""
        yield receipt.pending
        x_TD = receipt.x_TD
        row_bytes, arriving = x_TD.shape[1] * x_TD.element_size(), receipt.arriving
        weight_bytes = 0 if self._exact else 4
        num_choices = (arriving.shape[1] - row_bytes) // (2 + weight_bytes)
        x_MD = from_bytes(arriving[:, :row_bytes], x_TD.dtype)
        slot_Mk = from_bytes(arriving[:, row_bytes : row_bytes + 2 * num_choices], torch.int16)
        row_B, choice_B = (slot_Mk >= 0).nonzero().unbind(1)
        slots_B, sorted_B = torch.sort(slot_Mk[row_B, choice_B], stable=True)
        each_S = torch.arange(self.table.slots_per_rank, dtype=slots_B.dtype, device=slots_B.device)
        ends_S = torch.searchsorted(slots_B, each_S, right=True, out_int32=True)
        weight_B = None
        if not self._exact:
            weight_Mk = from_bytes(arriving[:, row_bytes + 2 * num_choices :], torch.float32)
            weight_B = weight_Mk[row_B, choice_B]
        return x_MD, ends_S, Arrival(receipt, row_B, choice_B, sorted_B, weight_B)

    def combine(
        self, outputs_AD: Tensor, weights_Tk: Tensor, receipt: Arrival, shared_TD: Tensor | None = None
    ) -> Stages[Tensor]:
        outputs_BD = torch.empty_like(outputs_AD).index_copy_(0, receipt.sorted_B, outputs_AD)
        y_TD = yield from self.bring_home(outputs_BD, weights_Tk, receipt, shared_TD)
        return y_TD

    def bring_home(
        self, outputs_BD: Tensor, weights_Tk: Tensor, receipt: Arrival, shared_TD: Tensor | None
    ) -> Stages[Tensor]:
        """As `combine`, of outputs in the order in which their assignments arrived."""
        world, travel = self._links.world, receipt.travel
        if receipt.weight_B is None:
            ends_G = torch.tensor(travel.arrived_G).cumsum(0)
            row_ends = world.read(torch.searchsorted(receipt.row_B, ends_G.to(receipt.row_B.device)))
            counts_G = [end - start for start, end in zip([0, *row_ends], row_ends, strict=False)]
            home, pending = world.all_to_all(outputs_BD, counts_G, travel.chosen_G)
            yield pending
            return self._add(home, travel.place_A, weights_Tk, shared_TD)
        partial_MD = torch.zeros(sum(travel.arrived_G), outputs_BD.shape[1], device=outputs_BD.device)
        weighted_BD = outputs_BD.float() * receipt.weight_B[:, None]
        for choice in range(weights_Tk.shape[1]):  # one addition a row at a time: a GPU keeps no order among more
            is_this_B = receipt.choice_B == choice
            partial_MD.index_add_(0, receipt.row_B[is_this_B], weighted_BD[is_this_B])
        home, pending = world.all_to_all(partial_MD.to(outputs_BD.dtype), travel.arrived_G, travel.sent_G)
        yield pending
        total_TD = torch.zeros(travel.x_TD.shape, device=home.device)
        for token_N, rows_ND in zip(
            torch.split(travel.token_N, travel.sent_G), torch.split(home, travel.sent_G), strict=True
        ):
            total_TD.index_add_(0, token_N, rows_ND.float())
        if shared_TD is not None:
            total_TD = total_TD + shared_TD
        return total_TD.to(outputs_BD.dtype)


def as_bytes(rows: Tensor) -> Tensor:
    """Rows as uint8, to travel beside other things."""
    rows = rows.contiguous()
    if rows.numel() == 0:
        return torch.empty(rows.shape[0], rows.shape[1] * rows.element_size(), dtype=torch.uint8, device=rows.device)
    return rows.view(torch.uint8)


def from_bytes(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `as_bytes`, of some columns of what arrived."""
    if columns.numel() == 0:
        return torch.empty(columns.shape[0], columns.shape[1] // dtype.itemsize, dtype=dtype, device=columns.device)
    # a copy always: one row of a wider tensor counts as contiguous, at an odd stride or offset
    return torch.empty(columns.shape, dtype=torch.uint8, device=columns.device).copy_(columns).view(dtype)
