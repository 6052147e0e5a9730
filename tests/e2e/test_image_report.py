"""The report of tuned image models: its verdicts and doubts, that nothing is run, sweeps, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import started
from PIL import Image
from training_artifacts import make_task

from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.config import identity, validate
from prefmill.core.errors import PipelineError
from prefmill.core.image_rows import HEADS
from prefmill.core.statistics import Resampling
from prefmill.families.reward.measures import measure_head
from prefmill.images.evaluate import compare, conclusion
from prefmill.report.background import training_section
from prefmill.report.facts import facts
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import write_jsonl
from prefmill.sweep.config import StudyConfig
from stages.report import STAGE, ReportConfig

HOSTILE = "<script>alert(1)</script>{{ 7*7 }}"
RESAMPLING = Resampling(1000)


def make(
    folder: Path, kind: str, stage: str, metrics: dict[str, Any], config: dict[str, Any] | None = None
) -> Artifact:
    given = config or {}
    return publish(folder, kind, Provenance(stage, "all", "f", {"config": given}, given, "0", {}), metrics)


def make_reward(folder: Path) -> Artifact:
    """As train_reward writes it: a head that is right nine times of ten, and four that nobody answered for."""
    generator = np.random.default_rng(0)
    margins = np.where(np.arange(40) < 36, 1.0, -1.0)
    prompts = [f"p{n // 2}" for n in range(40)]
    head = measure_head(margins, np.ones(40), generator.random(40) < 0.5, prompts, 1.0, 0.0, RESAMPLING)
    splits = {split: {**dict.fromkeys(HEADS), "style": head} for split in ("val", "test")}
    written = {"heads": list(HEADS), "temperatures": dict.fromkeys(HEADS, 1.0), "splits": splits}
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(written))
    return make(folder, "reward_model", "train_reward", {"pairs": 40})


def make_evaluation(folder: Path, scorer: Artifact, shift: float, drift: float | None = None) -> Artifact:
    """As evaluate_images writes it, with tuned images better by `shift`."""
    generator = np.random.default_rng(1)
    base, noise = (generator.normal(size=(60, len(HEADS))).astype(np.float32) for _ in range(2))
    prompts = [f"p{n // 2}" for n in range(60)]
    side = {"base": 1.0, "value": drift or 0.0, "low": (drift or 0.0) - 0.01, "high": (drift or 0.0) + 0.01}
    measured = {
        "scorer": scorer.manifest.content_digest,
        "scorer_shares_training_prompts": drift is None,
        "num_prompts": 30,
        "num_images": 60,
        "dimensions": compare(prompts, {"base": base, "tuned": base + shift + noise * 0.5}, RESAMPLING),
        "drift": None if drift is None else {"num_pairs": 8, "num_prompts": 8, "winner": side, "loser": side},
    }
    (folder / "grids").mkdir(parents=True)
    Image.new("RGB", (8, 8), "red").save(folder / "grids" / "000.png")
    (folder / "metrics.json").write_text(json.dumps(measured))
    return make(folder, "image_evaluation", "evaluate_images", {"conclusion": [conclusion(measured)]})


def make_sweep(folder: Path) -> Artifact:
    keys = {
        "stage": "train_reward", "metric": "val_f1", "study_name": "study",
        "space": {
            "learning_rate": {"low": 1e-5, "high": 1e-3, "log": True}, "trainable": {"choices": ["all", "heads"]},
        },
    }  # fmt: skip
    config = validate(StudyConfig, keys)
    rows = [
        {"number": n, "state": "complete" if n else "fail", "value": 0.5 + n / 10 if n else None,
         "params": {"learning_rate": 10.0 ** -(3 + n / 4), "trainable": ("all", "heads")[n % 2]}}
        for n in range(5)
    ]  # fmt: skip
    folder.mkdir()
    write_jsonl(folder / "trials.jsonl", rows)
    told = {"best_trial": 4, "failed": 1, "conclusion": [f"Best of 4 trials: {HOSTILE}"]}
    return make(folder, "sweep", "sweep", told, identity(config))


def report(folder: Path, **inputs: Artifact) -> str:
    STAGE.run(validate(ReportConfig, {"title": HOSTILE}), make_task("report", folder, **inputs))
    return (folder / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("shift", "verdict", "words"),
    [(1.0, "helped", "is preferred to the base"), (-1.0, "hurt", "is WORSE than"), (0.0, "unclear", "No difference")],
)
def test_the_verdict_is_that_of_the_interval(tmp_path: Path, shift: float, verdict: str, words: str) -> None:
    reward = make_reward(tmp_path / "reward")
    html = report(tmp_path, images=make_evaluation(tmp_path / "e", reward, shift), rewards=reward)
    assert f'class="verdict {verdict}"' in html
    assert words in html
    assert "90%" in html.split('id="doubts"')[1].split("</section>")[0], "the scorer's own accuracy is told"
    comparison = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(comparison["evaluations"]["evaluate_images:all"]["dimensions"]) == [*HEADS, "mean"]


def test_doubts_are_raised_where_they_are_due(tmp_path: Path) -> None:
    reward = make_reward(tmp_path / "reward")
    for name, drift, doubted in (("worse", 0.1, True), ("better", -0.1, False), ("unclear", 0.001, False)):
        html = report(tmp_path / name, images=make_evaluation(tmp_path / f"e-{name}", reward, 1.0, drift))
        assert ("denoises held-out winners worse" in html) == doubted, name
        assert "prompt_half=judge for the scorer" not in html
    html = report(tmp_path / "none", images=make_evaluation(tmp_path / "e-none", reward, 1.0))
    assert "drift of the denoising error was not measured" in html
    assert "prompt_half=judge for the scorer" in html


def test_sweeps_are_drawn_and_nothing_given_is_run(tmp_path: Path) -> None:
    reward, sweep = make_reward(tmp_path / "reward"), make_sweep(tmp_path / "sweep")
    html = report(tmp_path, images=make_evaluation(tmp_path / "e", reward, 1.0), sweeps=sweep)
    section = html.split('id="sweeps"')[1].split("</section>")[0]
    assert section.count("<svg") == 3
    assert "1 trial failed" in section
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;{{ 7*7 }}" in html
    assert 'src="data:image/png;base64,' in html
    assert report(tmp_path / "again", images=make_evaluation(tmp_path / "e2", reward, 1.0), sweeps=sweep) == html


def test_a_report_is_on_one_kind_of_evaluation(tmp_path: Path) -> None:
    with pytest.raises(PipelineError, match="one kind of evaluation"):
        report(tmp_path)
    evaluation = make_evaluation(tmp_path / "e", make_reward(tmp_path / "reward"), 1.0)
    with pytest.raises(PipelineError, match="evaluations and images"):
        report(tmp_path, images=evaluation, evaluations=evaluation)


def test_the_page_opens_with_the_pairs_trained_on_not_with_all_that_were_built(tmp_path: Path) -> None:
    for name in ("pairs", "rated", "shuffled"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "written").touch()
    built = make(tmp_path / "pairs", "image_pairs", "build_image_pairs", {"num_pairs": 1348})
    tuned = [make(tmp_path / name, "image_checkpoint", "sdxl_dpo", {"pairs": 1078}) for name in ("rated", "shuffled")]
    told = [line for line in facts([built, *tuned], None, False) if "trained on" in line]
    assert told == ["trained on 1\u202f078 image pairs"]


@pytest.mark.slow
@pytest.mark.timing
def test_tables_keep_inside_their_cards_on_a_phone(tmp_path: Path, chromium: str) -> None:
    reward = make_reward(tmp_path / "reward")
    report(tmp_path, images=make_evaluation(tmp_path / "e", reward, 1.0, -0.01), rewards=reward)
    with started(chromium, tmp_path / "profile") as browser, browser.tab() as page:
        page.resize(390, 844)
        page.open(f"file://{tmp_path / 'out' / 'report.html'}")
        page.wait("document.readyState === 'complete'")
        wide = page.read(
            "[...document.querySelectorAll('.card')].filter(card => card.scrollWidth > card.clientWidth).length"
        )
        assert wide == 0


def test_the_page_opens_with_what_was_tuned_and_what_judges(tmp_path: Path) -> None:
    """Two folders called alike are two models; the numbers of an adapter are not its base's."""
    import torch
    from safetensors.torch import save_file

    (tmp_path / "clip").mkdir()
    save_file({"w": torch.zeros(3, 2)}, tmp_path / "clip" / "model.safetensors")
    clip = make(tmp_path / "clip", "checkpoint", "tiny_image_model", {}, {"model_name_or_path": "/a/base"})
    for name in ("reward", "tuned"):
        (tmp_path / name).mkdir()
        save_file({"w": torch.zeros(1000, 2)}, tmp_path / name / "pytorch_lora_weights.safetensors")
    origin = Provenance("train_reward", "all", "f", {}, {}, "0", {"clip": [clip.manifest.content_digest]})
    reward = publish(tmp_path / "reward", "reward_model", origin, {})
    tuned = make(tmp_path / "tuned", "image_checkpoint", "sdxl_dpo", {}, {"model_name_or_path": "/b/base"})
    assert facts([clip, reward, tuned], None, False) == ["base: base", "reward model's base: base, 6 parameters"]


def test_a_margin_of_pictures_is_of_errors_and_no_review_is_named(tmp_path: Path) -> None:
    folder, logs = tmp_path / "checkpoints" / "r" / "sdxl_dpo" / "all", tmp_path / "logs" / "r" / "sdxl_dpo" / "all"
    for path in (folder, logs):
        path.mkdir(parents=True)
    (folder / "written").touch()
    steps = [{"step": step, "margin": step / 1e4, "accuracy": 0.5} for step in (1, 2)]
    (logs / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    charts = str(training_section([make(folder, "image_checkpoint", "sdxl_dpo", {"pairs": 6})]))
    assert "squared error" in charts
    assert "nats" not in charts
    assert "review" not in charts
