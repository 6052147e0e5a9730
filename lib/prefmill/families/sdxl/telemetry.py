"""What every image pair did at every step, with what only denoising errors tell."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from prefmill.families.sdxl.objectives import DspoFactors, cosine_to_sft
from prefmill.training.objectives import Objective, PairScores, Settings
from prefmill.training.telemetry import Telemetry


class ErrorTelemetry(Telemetry):
    """Adds the winner's change of error over the reference, m_w - m_w_ref, and for DSPO its cosine to fine-tuning."""

    def __init__(self, folder: Path, rank: int, factors: DspoFactors | None) -> None:
        super().__init__(folder, rank)
        self._factors = factors

    def columns(self, scores: PairScores, objective: Objective, settings: Settings) -> dict[str, Tensor]:
        """The values of every pair by name, [N] each."""
        columns = super().columns(scores, objective, settings)
        if scores.ref_chosen is not None:
            columns["winner_error_change"] = scores.ref_chosen - scores.chosen
        if self._factors is not None:
            columns["sft_cosine"] = cosine_to_sft(scores, settings, self._factors)
        return columns

    def means(self) -> dict[str, float]:
        """Means over the pairs since the last call."""
        rows = self._window
        added = [name for name in ("winner_error_change", "sft_cosine") if rows and name in rows[0]]
        return {**{name: sum(row[name] for row in rows) / len(rows) for name in added}, **super().means()}
