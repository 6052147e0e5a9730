"""Several raters at once and a server that is killed: every answer is kept once, about the pair that was shown."""

from __future__ import annotations

import json

import pytest

from benchmarks import rating_load


@pytest.mark.slow
def test_no_answer_is_lost_or_doubled(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rating_load, "BOUND_SECONDS", 60.0)  # tests share their machine: times are the benchmark's
    assert rating_load.main(["--raters", "8", "--answers", "100", "--kills", "2", "--pause", "0"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["lost"], found["doubled"]) == (0, 0)
    assert found["answers"] >= 100
