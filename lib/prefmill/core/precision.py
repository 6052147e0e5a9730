"""The precisions that models are computed in, and their torch dtypes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


Precision = Literal["bf16", "fp16", "fp32"]
Quantization = Literal["4bit"]


def torch_dtype(precision: Precision) -> torch.dtype:
    """The torch dtype of a precision's name."""
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
