"""Embedding and logits where each of some ranks has a share of the vocabulary's rows; knows no layers.

Shapes: T rows of a step, D hidden, R rows that are sampled, V vocabulary, G ranks that share it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workers.model.parallel.collectives import Links, Stages, add_up, gather
from workers.model.parallel.layout import Layout


def embed_share(
    links: Links, layout: Layout, embedding_VD: Tensor, first_token: int, token_ids_T: Tensor
) -> Stages[Tensor]:
    """Embeddings [T, D] in the table's type; `embedding_VD` are the rows from `first_token` on."""
    if layout.tensor == 1:
        return embedding_VD.index_select(0, token_ids_T)
    count = len(embedding_VD)
    local_T = token_ids_T - first_token
    is_mine_T = (local_T >= 0) & (local_T < count)
    x_TD = embedding_VD.index_select(0, local_T.clamp(0, count - 1)).masked_fill_(~is_mine_T[:, None], 0)
    total_TD = yield from add_up(links, x_TD)
    return total_TD


def gather_logits(links: Links, layout: Layout, logits_RV: Tensor) -> Stages[Tensor]:
    """All logits [R, V] from those of each rank's share."""
    if layout.tensor == 1:
        return logits_RV
    parts_GRV = yield from gather(links, logits_RV)
    return parts_GRV.transpose(0, 1).flatten(1)


def most_likely(links: Links, layout: Layout, logits_RV: Tensor) -> Stages[list[int]]:
    """The most likely token of each row, of equals the lowest, from the logits of this rank's share."""
    best_R, token_R = logits_RV.max(-1)
    tokens = yield from best_of_shares(links, layout, best_R, token_R, logits_RV.shape[1])
    return tokens


def best_of_shares(links: Links, layout: Layout, best_R: Tensor, token_R: Tensor, num_tokens: int) -> Stages[list[int]]:
    """The same from each share's largest logits and their places in a share of `num_tokens`."""
    if layout.tensor > 1:
        parts_GR2 = yield from gather(links, torch.stack((best_R.double(), token_R.double()), 1))
        best_GR, token_GR = parts_GR2.unbind(2)
        first = best_GR.argmax(0)  # ranks in order of vocabulary, so of equals the lowest
        token_R = token_GR.gather(0, first[None])[0].long() + first * num_tokens
    tokens: list[int] = token_R.tolist()
    return tokens
