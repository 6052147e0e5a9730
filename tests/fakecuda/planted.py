"""Faults planted into the library, each with the case that must fail for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest

from prefmill.families.causal import scorer
from prefmill.families.causal.varlen_attention import VarlenIndex
from prefmill.training.telemetry import Telemetry
from tests.fakecuda.cases import CASES

Plant = Callable[[pytest.MonkeyPatch], None]


def scores_on_the_cpu(patch: pytest.MonkeyPatch) -> None:
    """A `.cpu()` in the scorer."""
    plain = scorer.token_logps
    patch.setattr(scorer, "token_logps", lambda *given: plain(*given).cpu())


def there_and_back(patch: pytest.MonkeyPatch) -> None:
    """A `.cpu()` that is undone at once: no mix, but the GPU waits."""
    plain = scorer.token_logps
    patch.setattr(scorer, "token_logps", lambda *given: plain(*given).cpu().to("cuda"))


def targets_left_behind(patch: pytest.MonkeyPatch) -> None:
    """A batch that moves to the device but for one of its tensors."""
    plain = scorer.Batch.to
    patch.setattr(scorer.Batch, "to", lambda batch, device: replace(plain(batch, device), target=batch.target))


def index_left_behind(patch: pytest.MonkeyPatch) -> None:
    """The variable-length kernel's cumulative lengths stay on the CPU."""
    patch.setattr(VarlenIndex, "to", lambda index, device: index)


def a_number_read(patch: pytest.MonkeyPatch) -> None:
    """Telemetry that reads its values in every microbatch."""
    patch.setattr(Telemetry, "add", lambda telemetry, ids, scores, *_: scores.margin.detach().tolist())


PLANTED: Mapping[str, tuple[Plant, str, str]] = {
    "scores on the CPU": (scores_on_the_cpu, "causal group bfloat16", "cuda to the CPU"),
    "there and back": (there_and_back, "causal pairwise float32 autocast", "cuda to the CPU"),
    "targets left behind": (targets_left_behind, "causal group bfloat16", "two devices"),
    "index left behind": (index_left_behind, "causal group float32 autocast", "same device"),
    "a number read": (a_number_read, "trainer step", "_local_scalar_dense"),
}
"""Name: the fault, the case that meets it, and a part of the error."""


def run(name: str) -> None:
    """The case of a planted fault."""
    plant, case, _ = PLANTED[name]
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        CASES[case]()
