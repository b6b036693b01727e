"""Kernels run in Triton's interpreter on machines without a GPU; Triton reads the variable when it is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
