"""Changes one row of logits before it is drawn from: biases, bans and penalties; knows no other row."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.request import SamplingParams
from workers.sampling.device import on_device
from workers.sampling.edits import LogitEdits


def adjust(row_V: Tensor, edits: LogitEdits, params: SamplingParams) -> None:
    """Changes fp32 logits [V] in place: logit_bias, bad words and suppressed tokens, then penalties."""
    device = row_V.device
    if len(edits.bias_ids):
        row_V[on_device(edits.bias_ids, device)] += on_device(edits.biases, device)
    if len(edits.banned_ids):
        row_V[on_device(edits.banned_ids, device)] = -torch.inf
    if not len(edits.seen_ids):
        return
    seen = on_device(edits.seen_ids, device)
    logits = row_V[seen]
    if (
        params.repetition_penalty != 1
    ):  # Keskar et al. 2019, CTRL: positive logits are divided, negative ones multiplied
        penalty = on_device([params.repetition_penalty], device, torch.float32)
        logits = torch.where(logits > 0, logits / penalty, logits * penalty)
    if params.presence_penalty or params.frequency_penalty:
        penalties = params.frequency_penalty * edits.seen_counts + params.presence_penalty * (edits.seen_counts > 0)
        logits = logits - on_device(penalties, device, torch.float32)
    row_V[seen] = logits
