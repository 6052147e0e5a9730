"""The names of the diffusion objectives, for configurations, which import nothing heavy."""

from __future__ import annotations

from typing import Literal, get_args

DiffusionObjective = Literal["dpo", "dspo", "dspo_official_sdxl", "dspo_rm", "mapo", "sft"]
NAMES: tuple[DiffusionObjective, ...] = get_args(DiffusionObjective)
NEEDS_REFERENCE = frozenset({"dpo", "dspo", "dspo_official_sdxl", "dspo_rm"})
NEEDS_RESIDUALS = frozenset({"dspo", "dspo_official_sdxl"})
