"""The pipeline's own tests run on toy stages."""

from __future__ import annotations

import pytest
from toys import RUNS, STAGES

from prefmill.pipeline import manual_submission, plan


@pytest.fixture(autouse=True)
def _toy_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    for room in (plan, manual_submission):
        monkeypatch.setattr(room, "load_stage", STAGES.__getitem__)
    monkeypatch.setattr(plan, "stage_names", lambda: sorted(STAGES))
    RUNS.clear()
