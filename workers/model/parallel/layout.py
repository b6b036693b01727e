"""Decides which part of a model each rank of a group owns: heads, columns, vocabulary rows, expert slots. Integers only.

A group has `size` ranks. Attention is tensor-parallel within runs of `tensor` consecutive ranks and data-parallel
between them: each such run serves its own sequences from its own KV pools. Experts are spread over all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

from workers.config import ParallelConfig
from workers.errors import InvalidConfig
from workers.model.checkpoint.ernie_config import ErnieConfig


@dataclass(frozen=True, slots=True)
class Share:
    """Elements first .. first+count-1 of a dimension of `total`."""

    first: int
    count: int
    total: int

    @property
    def is_whole(self) -> bool:
        return self.count == self.total


@dataclass(frozen=True, slots=True)
class Layout:
    """Where rank `rank` stands in a group of `size`; `tensor` divides `size`."""

    size: int = 1
    tensor: int = 1
    rank: int = 0

    @staticmethod
    def of(parallel: ParallelConfig, model: ErnieConfig, rank: int = 0) -> Layout:
        """The layout that the settings ask for. Raises InvalidConfig with the reason when the model cannot be cut so."""
        check(parallel, model)
        if not 0 <= rank < parallel.size:
            raise InvalidConfig(f"rank {rank} does not exist in a group of {parallel.size}")
        return Layout(parallel.size, parallel.tensor_parallel, rank)

    @property
    def num_pools(self) -> int:
        """Data-parallel parts, each with KV pools and sequences of its own."""
        return self.size // self.tensor

    @property
    def pool(self) -> int:
        return self.rank // self.tensor

    @property
    def tensor_rank(self) -> int:
        """Place among the ranks that share this rank's sequences."""
        return self.rank % self.tensor

    @property
    def is_pool_head(self) -> bool:
        """Whether this rank answers for its pool: all ranks of a pool draw the same tokens."""
        return self.tensor_rank == 0

    def share(self, total: int) -> Share:
        """This rank's part of a dimension that tensor parallelism divides."""
        count = total // self.tensor
        return Share(self.tensor_rank * count, count, total)

    def rows(self, num_rows: int) -> tuple[int, int]:
        """First and last+1 of the rows of a step that this rank brings to the experts; the ranks of a pool share them."""
        step = -(-num_rows // self.tensor)
        return min(self.tensor_rank * step, num_rows), min((self.tensor_rank + 1) * step, num_rows)


SINGLE = Layout()


def check(parallel: ParallelConfig, model: ErnieConfig) -> None:
    """Raises InvalidConfig with the reason when a model cannot be laid out as asked."""
    experts, tensor = parallel.expert_parallel, parallel.tensor_parallel
    moe = model.moe
    if moe is None and experts > 1:
        raise InvalidConfig(
            f"worker.parallel.expert_parallel {experts} needs a mixture of experts, and this model is dense: use tensor_parallel"
        )
    if moe is None and parallel.redundant_experts:
        raise InvalidConfig("worker.parallel.redundant_experts needs a mixture of experts, and this model is dense")
    if moe is not None and experts % tensor:
        raise InvalidConfig(
            f"worker.parallel.tensor_parallel {tensor} must divide expert_parallel {experts}: a mixture's experts are spread "
            "over all ranks of the group, and attention is tensor-parallel within equal parts of it"
        )
    divided = (
        (model.num_kv_heads, "key-value heads"),
        (model.num_heads, "attention heads"),
        (model.intermediate_size, "columns of the dense feed-forward layers"),
        (model.vocab_size, "rows of the vocabulary"),
    )
    for count, what in divided:
        if count % tensor:
            raise InvalidConfig(f"worker.parallel.tensor_parallel {tensor} does not divide the model's {count} {what}")
    if moe is None:
        return
    slots = moe.num_experts + parallel.redundant_experts
    if slots % experts:
        raise InvalidConfig(
            f"{moe.num_experts} experts and {parallel.redundant_experts} redundant ones do not spread evenly over "
            f"{experts} ranks: worker.parallel.redundant_experts {-moe.num_experts % experts} would"
        )
    if slots // experts > moe.num_experts:
        raise InvalidConfig(
            f"worker.parallel.redundant_experts {parallel.redundant_experts} gives each of {experts} ranks "
            f"{slots // experts} slots for {moe.num_experts} experts: no rank needs an expert twice"
        )
