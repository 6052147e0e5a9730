"""The image pipeline in one command, whose tuned model wins; and photographs whose better copy is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_checks import browse, opens_cleanly
from photo_pairs import write_photo_ratings
from reward_artifacts import make_clip, make_reward, run_stage
from training_artifacts import publish_as

from prefmill.cli.main import main
from prefmill.core.artifact import Artifact
from prefmill.store.artifacts import read_manifest
from prefmill.store.jsonl import read_jsonl
from tests.documented_runs import DocumentedRun

pytestmark = pytest.mark.slow
STAGES = {
    "tiny_image_model": 2, "generate_images": 2, "rate_images": 1, "build_image_pairs": 1, "train_reward": 2,
    "sdxl_dpo": 2, "evaluate_images": 2, "report": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def photos(shared_data: Path) -> dict[str, tuple[Path, str]]:
    listed = json.loads((shared_data / "images" / "manifest.json").read_text())
    return {
        Path(row["file"]).stem: (shared_data / "images" / row["file"], row["prompt_by_scout"])
        for row in listed
        if row["file"].startswith("photos/")
    }


@pytest.fixture(scope="module")
def workspace(documented_images: DocumentedRun) -> Path:
    """A finished run of `make all`."""
    assert documented_images.returncode == 0, documented_images.printed
    return documented_images.checkout


def artifact(workspace: Path, stage: str, name: str = "all") -> Artifact:
    (path,) = workspace.glob(f"*/images/{stage}/{name}/manifest.json")
    manifest = read_manifest(path.parent)
    assert manifest is not None
    return Artifact(path.parent, manifest)


def test_every_stage_is_done_and_a_second_run_does_nothing(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {stage: len(list(workspace.glob(f"*/images/{stage}/*/manifest.json"))) for stage in STAGES}
    assert found == STAGES
    assert main(["plan", str(workspace / "configs/pipelines/images.yaml"), f"workspace={workspace}"]) == 0
    assert capsys.readouterr().out.count("  complete  ") == sum(STAGES.values())


def test_the_two_halves_and_the_held_out_prompts_stay_apart(workspace: Path) -> None:
    seen = {
        half: set(
            json.loads(artifact(workspace, "train_reward", half).file("trained_on.json").read_text())["prompt_ids"]
        )
        for half in ("policy", "judge")
    }
    judged = {
        row["prompt_id"] for row in read_jsonl(artifact(workspace, "evaluate_images", "rated").file("scores.jsonl"))
    }
    assert seen["policy"]
    assert seen["judge"]
    assert not seen["policy"] & seen["judge"]
    assert not judged & (seen["policy"] | seen["judge"])
    tuned, judge = artifact(workspace, "sdxl_dpo", "rated"), artifact(workspace, "train_reward", "judge")
    assert tuned.manifest.inputs["reward"] == [artifact(workspace, "train_reward", "policy").manifest.content_digest]
    metrics = json.loads(artifact(workspace, "evaluate_images", "rated").file("metrics.json").read_text())
    assert metrics["scorer"] == judge.manifest.content_digest
    assert not metrics["scorer_shares_training_prompts"]


def test_the_tuned_model_wins_and_the_control_stays_at_chance(
    workspace: Path, documented_images: DocumentedRun
) -> None:
    """Held-out prompts, a judge that took no part: above 1/2 with its interval; with shuffled labels about 1/2."""
    told = {}
    for labels in ("rated", "shuffled"):
        measured = json.loads(artifact(workspace, "evaluate_images", labels).file("metrics.json").read_text())
        assert measured["shuffled_labels"] == (labels == "shuffled")
        told[labels] = measured["dimensions"]["mean"]["win_rate"]
    assert told["rated"]["low"] > 0.5, told
    # Prompts share the noise of their seeds, so chance is wider than the interval over prompts: a standard error of
    # 76 independent comparisons is 0.057.
    assert abs(told["shuffled"]["value"] - 0.5) < 0.057, told
    assert told["shuffled"]["high"] < told["rated"]["low"], told
    assert "The tuned model is preferred to the base" in documented_images.printed


def test_photographs_are_preferred_to_their_degraded_copies(
    tmp_path: Path, photos: dict[str, tuple[Path, str]]
) -> None:
    """Ratings of one's own, by two reward models: held-out pictures of which the right answer is known."""
    given = tmp_path / "photos"
    write_photo_ratings(given, photos, crops=12, kinds=["blur"])
    sources = [{"format": "ratings", "ratings": str(given / "ratings.csv"), "images": str(given)}]
    splits = {"train": 0.6, "val": 0.2, "test": 0.2, "seed": 5}
    run_stage("build_image_pairs", tmp_path / "pairs", {"sources": sources, "splits": splits})
    pairs, clip = publish_as(tmp_path / "pairs" / "out", "image_pairs"), make_clip(tmp_path)
    right: list[bool] = []
    for half in ("policy", "judge"):
        made = make_reward(tmp_path / half, pairs, clip, prompt_half=half, num_train_epochs=16)
        margins = [row["margins"].values() for row in read_jsonl(made.file("predictions.jsonl"))]
        right += [float(np.mean(list(values))) > 0 for values in margins]
    assert len(right) >= 2 * 2 * 12
    assert np.mean(right) > 0.65


@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_opens_in_a_browser_without_a_complaint(
    workspace: Path, chromium: str, tmp_path: Path, width: int
) -> None:
    html = artifact(workspace, "report").file("report.html").read_text()
    opens_cleanly(chromium, tmp_path, html, width)
    dumped = browse(chromium, tmp_path / "page.html", "--dump-dom").stdout
    for words in (
        "What to doubt", "Win rate", "Drift of the denoising error", "train_reward:judge", "data:image/png",
        "Every task was complete at its first attempt.",
    ):  # fmt: skip
        assert words in dumped
    comparison: dict[str, Any] = json.loads(artifact(workspace, "report").file("comparison.json").read_text())
    assert set(comparison) == {"evaluations", "reward_models"}
