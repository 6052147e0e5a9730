"""transformers' names of schedules and optimizers, for configurations: its own lists load torch."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from prefmill.core.errors import nearest

SCHEDULES = (
    "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt",
    "reduce_lr_on_plateau", "cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay", "greedy",
)  # fmt: skip
OPTIMIZERS = (
    "adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused", "adamw_torch_4bit",
    "adamw_torch_8bit", "adamw_bnb_8bit", "adamw_8bit", "adamw_anyprecision", "paged_adamw_8bit", "paged_adamw_32bit",
    "stable_adamw", "grokadamw", "adafactor", "ademamix", "ademamix_8bit", "paged_ademamix_8bit",
    "paged_ademamix_32bit", "lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit", "sgd", "adagrad",
    "rmsprop", "rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit", "galore_adamw", "galore_adamw_8bit",
    "galore_adafactor", "galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise",
    "apollo_adamw", "apollo_adamw_layerwise", "lomo", "adalomo", "schedule_free_adamw", "schedule_free_radam",
    "schedule_free_sgd",
)  # fmt: skip


def _known(what: str, names: tuple[str, ...]) -> AfterValidator:
    def check(name: str) -> str:
        if name not in names:
            raise ValueError(f"no {what} of transformers{nearest(name, list(names))}; it has {', '.join(names)}")
        return name

    return AfterValidator(check)


Schedule = Annotated[str, _known("schedule", SCHEDULES)]
Optimizer = Annotated[str, _known("optimizer", OPTIMIZERS)]
