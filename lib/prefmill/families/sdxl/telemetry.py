"""What every image pair did at every step, with what only denoising errors tell."""

from __future__ import annotations

import torch
from torch import Tensor

from prefmill.training.objectives import Objective, PairScores, Settings, residual_and_drift
from prefmill.training.telemetry import Telemetry


class ErrorTelemetry(Telemetry):
    """Adds the winner's change of error over the reference, m_w - m_w_ref, and for DSPO its cosine to fine-tuning."""

    def columns(self, scores: PairScores, objective: Objective, settings: Settings) -> dict[str, Tensor]:
        """The values of every pair by name, [N] each."""
        columns = super().columns(scores, objective, settings)
        if scores.ref_chosen is not None:
            columns["winner_error_change"] = scores.ref_chosen - scores.chosen
        if scores.chosen_residual is not None:
            columns["sft_cosine"] = cosine_to_sft(scores, settings)
        return columns

    def means(self) -> dict[str, float]:
        """Means over the pairs since the last call."""
        rows = self._window
        added = [name for name in ("winner_error_change", "sft_cosine") if rows and name in rows[0]]
        return {**{name: sum(row[name] for row in rows) / len(rows) for name in added}, **super().means()}


def cosine_to_sft(scores: PairScores, settings: Settings) -> Tensor:
    """The cosine, [N], between the gradients of `dspo` and `sft` at the prediction: 1 where DSPO is fine-tuning."""
    residual, drift = (value.detach() for value in residual_and_drift(scores))
    factor = settings.dspo_lambda * (1 - torch.sigmoid(settings.beta / 2 * scores.margin)).detach()
    return torch.cosine_similarity(residual - factor[:, None] * drift, residual, dim=1)
