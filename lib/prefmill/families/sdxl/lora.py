"""peft's LoRA and DoRA on linear layers, with fewer passes over the activations; weights and names stay peft's.

peft adds s B(A x) to the base layer's result in three passes over tensors of the layer's size, and copies x to fp32
under autocast. Here s goes to the small A x, and one addmm adds. Where B is 0 the result is the base's to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from torch.nn.functional import linear

from prefmill.families.sdxl.dora import ExactDora


class LeanLinear(Linear):
    """peft's layer; what it does beyond one active adapter, not merged, is left to peft."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """W x + b + s B A x, for DoRA its rows scaled by m / |W + s B A|."""
        names = self.active_adapters
        if args or kwargs or self.disable_adapters or self.merged or len(names) != 1 or not self._fits(x, names[0]):
            result: Tensor = super().forward(x, *args, **kwargs)
            return result
        name = names[0]
        base: Tensor = self.base_layer(x)
        dora = self.lora_magnitude_vector[name] if self.lora_magnitude_vector else None
        a, b, scaling = self.lora_A[name], self.lora_B[name], self.scaling[name]
        if dora is not None and self.base_layer.bias is not None:
            added = dora(x, lora_A=a, lora_B=b, scaling=scaling, base_layer=self.base_layer, base_result=base)
            return torch.add(base, added).to(base.dtype)  # the bias is not scaled, and must come back to the bit
        low = linear(x, a.weight) * scaling
        result = torch.addmm(base.flatten(0, -2), low.flatten(0, -2), b.weight.T).view_as(base)
        if dora is not None:
            # In fp32: bf16 would round a scale that has learnt a little back to 1.
            result = (result * (dora.weight / dora.norm(self.base_layer, a, b, scaling))).to(base.dtype)
        return result

    def _fits(self, x: Tensor, name: str) -> bool:
        is_ours = not self.lora_magnitude_vector or isinstance(self.lora_magnitude_vector[name], ExactDora)
        # Without autocast addmm refuses two dtypes; peft casts x itself.
        same = x.dtype == self.lora_A[name].weight.dtype or x.is_meta or torch.is_autocast_enabled(x.device.type)
        return is_ours and same and x.dim() > 1


def make_lean(model: nn.Module) -> None:
    """Have peft's adapted linear layers of a model compute as above."""
    for layer in model.modules():
        if type(layer) is Linear:
            # The class and not the object: hooks, names and parameters stay where peft and checkpoints expect them.
            layer.__class__ = LeanLinear
