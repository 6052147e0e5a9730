"""DoRA (Liu et al. 2024, arXiv 2402.09353) whose step 0 is the base model to the bit, in any precision.

peft computes the norm of W + s B A in the precision of the activations, the magnitude in that of the weights: in bf16
they differ, and the policy is not the reference before its first step. Here both are in fp32, by one function, and
no product of B and A the size of W is made.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn


class ExactDora(DoraLinearLayer):
    """peft's layer with its norm in fp32; `base_layer` is a linear layer, `base_result` what it gave for x."""

    _squares: Tensor | None = None

    def norm(self, base_layer: Any, lora_a: Any, lora_b: Any, scaling: float) -> Tensor:
        """The norm of every row of W + s B A, [out], fp32, without a gradient (section 4.3)."""
        weight = base_layer.weight
        if self._squares is None or self._squares.device != weight.device:
            self._squares = weight.detach().float().square().sum(1)  # the base is frozen: once
        return row_norms(weight.detach(), lora_a.weight.detach(), lora_b.weight.detach(), scaling, self._squares)

    def forward(  # the names are peft's
        self, x: Tensor, *, lora_A: Any, lora_B: Any, scaling: float, base_layer: Any,  # noqa: N803
        base_result: Tensor | None = None, adapter_name: str = "default",
    ) -> Tensor:  # fmt: skip
        """What is added to the base layer's result: (m / norm - 1) W x + (m / norm) s B A x."""
        assert base_result is not None, "dropout must be off: policy and reference see the same input"
        scale = self.weight / self.norm(base_layer, lora_A, lora_B, scaling)
        without_bias = base_result if base_layer.bias is None else base_result - base_layer.bias
        added: Tensor = (scale - 1) * without_bias + scale * scaling * lora_B(lora_A(x))
        return added


def row_norms(weight: Tensor, lora_a: Tensor, lora_b: Tensor, scaling: float, squares: Tensor) -> Tensor:
    """sqrt(|W|^2 + 2 s rowsum(W A^T * B) + s^2 rowsum(B (A A^T) * B)), [out]; W is [out, in], `squares` its |W|^2."""
    # Autocast would take these products in bf16 or fp16, though the factors are fp32.
    # `prefmill estimate` comes here on the meta device, which has no autocast.
    with nullcontext() if weight.is_meta else torch.autocast(weight.device.type, enabled=False):
        a, b = lora_a.float(), lora_b.float()
        cross = ((weight.float() @ a.T) * b).sum(1)
        own = ((b @ (a @ a.T)) * b).sum(1)
        # Rounding can bring a sum near 0 below it, and its root would be nan.
        return (squares + 2 * scaling * cross + scaling**2 * own).clamp_min(0).sqrt()


def make_exact(model: nn.Module) -> None:
    """Have every DoRA layer of a peft model on a linear layer compute as above, its magnitude that of the base."""
    layers: list[Any] = [layer for layer in model.modules() if len(getattr(layer, "lora_magnitude_vector", ()))]
    for layer in layers:
        for name, dora in layer.lora_magnitude_vector.items():
            if type(dora) is DoraLinearLayer:
                # The class and not the object: peft holds the layer in its own dictionaries, under its own names.
                dora.__class__ = ExactDora
                norm = dora.norm(layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name], layer.scaling[name])
                dora.weight = nn.Parameter(norm.clone())
