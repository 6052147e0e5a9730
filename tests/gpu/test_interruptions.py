"""Point 9: a training that is asked to stop goes on to the same end; one out of memory runs in smaller microbatches.

The request is what a worker leaves when SIGUSR1 comes; that the signal comes through is tests/slurm's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prefmill.core.graceful_stop import Stopped, clear_request, request_stop
from prefmill.slurm.failures import _SIGNATURES, POLICIES
from tests.gpu.training import losses, task_in, train

pytestmark = pytest.mark.slow


def test_a_stopped_training_goes_on(
    device: torch.device, tiny_model: Path, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefmill.training.callbacks import StageCallback

    plain = StageCallback.on_step_end

    def asks(self: Any, args: Any, state: Any, control: Any, **given: Any) -> None:
        if state.global_step == 2:
            request_stop(self.task.logs, 100.0)
        plain(self, args, state, control, **given)

    train(tmp_path / "calm", tiny_model, pairs_file)
    with monkeypatch.context() as patched:
        patched.setattr(StageCallback, "on_step_end", asks)
        with pytest.raises(Stopped, match="step 2 of 4"):
            train(tmp_path / "asked", tiny_model, pairs_file)
    clear_request(task_in(tmp_path / "asked").logs)
    train(tmp_path / "asked", tiny_model, pairs_file)
    assert losses(tmp_path / "asked") == pytest.approx(losses(tmp_path / "calm"), abs=1e-4)


def test_smaller_microbatches_take_the_same_steps(
    device: torch.device, tiny_model: Path, pairs_file: Path, tmp_path: Path
) -> None:
    for size in (4, 1):
        train(tmp_path / str(size), tiny_model, pairs_file, per_device_train_batch_size=size, layout="pairwise")
    assert losses(tmp_path / "1") == pytest.approx(losses(tmp_path / "4"), abs=1e-4)


@pytest.mark.gpu
def test_running_out_of_memory_is_known_by_its_words() -> None:
    """No CPU form: the words are CUDA's allocator's."""
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.01)
    try:
        with pytest.raises(torch.OutOfMemoryError) as raised:
            torch.empty(2**34, dtype=torch.uint8, device="cuda")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    kinds = [kind for kind, pattern in _SIGNATURES if pattern.search(str(raised.value))]
    assert kinds[:1] == ["gpu_memory"]
    assert kinds[0] in POLICIES
