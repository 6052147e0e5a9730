"""The pipeline's own tests run on toy stages."""

from __future__ import annotations

import pytest
from toys import RUNS, STAGES

from prefmill.pipeline import plan


@pytest.fixture(autouse=True)
def _toy_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "load_stage", STAGES.__getitem__)
    monkeypatch.setattr(plan, "stage_names", lambda: sorted(STAGES))
    RUNS.clear()
