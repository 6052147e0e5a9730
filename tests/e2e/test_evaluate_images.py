"""evaluate_images: win rates by hand, what it writes, going on after a kill, and scorers that may not judge."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from image_pair_artifacts import make_sdxl
from PIL import Image
from reward_artifacts import make_clip, make_reward, make_samples, run_stage
from training_artifacts import content

from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError, PipelineError
from prefmill.core.files import digest_path
from prefmill.core.image_rows import HEADS, ImagePrompt
from prefmill.core.statistics import Resampling
from prefmill.demo.tiny_models import build
from prefmill.families.sdxl.generator import GeneratorSource, open_pipeline
from prefmill.images.evaluate import compare, conclusion, source_of, trained_prompts
from prefmill.report.image_sections import _doubts
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import read_jsonl, write_jsonl
from stages.evaluate_images import STAGE, EvaluateImagesConfig

TUNING: dict[str, Any] = {
    "objective": "dpo", "resolution": 32, "precision": "fp32", "lora": {"r": 4}, "learning_rate": 1e-2, "max_steps": 4,
    "per_device_train_batch_size": 4, "effective_batch_size": 8, "logging_steps": 1, "save_steps": 100, "report_to": [],
}  # fmt: skip
KEYS: dict[str, Any] = {
    "precision": "fp32", "num_inference_steps": 2, "guidance_scale": 1.0, "num_resamples": 1000, "batch_size": 4,
    "num_grid_prompts": 2, "drift_draws": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Artifact]:
    """A base, pairs, two reward models of disjoint prompts, and the base tuned on the pairs by the first of them."""
    folder = tmp_path_factory.mktemp("given")
    model, clip = make_sdxl(folder / "sdxl"), make_clip(folder)
    pairs = make_samples(folder / "pairs", num_prompts=14)
    rewards = {half: make_reward(folder / half, pairs, clip, prompt_half=half) for half in ("policy", "judge")}
    tuning = {**TUNING, "objective": "dspo_rm"}
    run_stage("sdxl_dpo", folder / "tuned", tuning, model=model, pairs=pairs, reward=rewards["policy"])
    inputs = {"reward": [rewards["policy"].manifest.content_digest]}
    origin = Provenance("sdxl_dpo", "all", "f", {}, {}, "0", inputs)
    tuned = publish(folder / "tuned" / "out", "image_checkpoint", origin, {})
    return {"model": model, "pairs": pairs, "tuned": tuned, "scorer": rewards["judge"], "policy": rewards["policy"]}


def evaluate(folder: Path, given: Mapping[str, Artifact], **keys: Any) -> dict[str, Any]:
    inputs = {name: artifact for name, artifact in given.items() if name in STAGE.reads}
    return run_stage("evaluate_images", folder, {**KEYS, **keys}, **inputs)


@pytest.mark.slow
def test_what_it_writes_and_that_it_goes_on_after_a_kill(tmp_path: Path, given: Mapping[str, Artifact]) -> None:
    told = evaluate(tmp_path / "a", given)
    out = tmp_path / "a" / "out"
    measured = json.loads((out / "metrics.json").read_text())
    rows = list(read_jsonl(out / "scores.jsonl"))
    held_out = {row["prompt_id"] for row in read_jsonl(given["pairs"].file("pairs.jsonl")) if row["split"] != "train"}
    assert {row["prompt_id"] for row in rows} == held_out
    assert len(rows) == 2 * len(held_out)
    assert list(measured["dimensions"]) == [*HEADS, "mean"]
    assert measured["scorer_shares_training_prompts"], "the model was tuned on all prompts"
    wins = np.mean([[row["tuned"][name] > row["base"][name] for name in HEADS] for row in rows], axis=0)
    found = [measured["dimensions"][name]["win_rate"]["value"] for name in HEADS]
    np.testing.assert_allclose(found, wins, atol=1e-6)
    assert told["win_rate"] == measured["dimensions"]["mean"]["win_rate"]["value"]
    assert any((out / "base" / name).read_bytes() != (out / "tuned" / name).read_bytes() for name in _images(out))
    for side in ("winner", "loser"):
        drift = measured["drift"][side]
        assert drift["low"] <= drift["value"] <= drift["high"]
        assert drift["value"] != 0
    with Image.open(out / "grids" / "000.png") as grid:
        assert grid.width > 4 * 192
        assert grid.height > 2 * 192

    whole = content(tmp_path / "a")
    for name in ("metrics.json", "scores.jsonl", "grids/000.png", "tuned/" + _images(out)[0]):
        (out / name).unlink()
    shutil.rmtree(out / "work")
    evaluate(tmp_path / "a", given)
    assert content(tmp_path / "a") == whole


def test_keys_without_effect_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="resolution has no effect"):
        evaluate(tmp_path, {}, resolution=64, drift_draws=0)


def _images(out: Path) -> list[str]:
    return sorted(path.relative_to(out / "base").as_posix() for path in (out / "base").rglob("*.png"))


@pytest.mark.slow
def test_scorers_that_may_not_judge_are_refused(tmp_path: Path, given: Mapping[str, Artifact]) -> None:
    with pytest.raises(ConfigError, match="the reward that the model was tuned by"):
        evaluate(tmp_path / "a", {**given, "scorer": given["policy"]})
    with pytest.raises(ConfigError, match="trained on prompts that it is to judge"):
        evaluate(tmp_path / "b", given, splits=["train", "val"])
    # The same words under ids of the table's own.
    learnt = json.loads(given["scorer"].file("trained_on.json").read_text())["prompts"][0]
    renamed = tmp_path / "renamed.csv"
    renamed.write_text(f"prompt_id,prompt\none,{learnt.upper()}\ntwo,a red circle\n")
    with pytest.raises(ConfigError, match=r"trained on prompts that it is to judge[\s\S]*1 of 2, such as one"):
        evaluate(tmp_path / "e", given, prompts=str(renamed))
    prompts = tmp_path / "prompts.csv"
    prompts.write_text("prompt_id,prompt\none,a red circle\n")
    with pytest.raises(InputError, match="too few held-out prompts"):
        evaluate(tmp_path / "c", given, prompts=str(prompts))
    with pytest.raises(PipelineError, match="no model to start from"):
        evaluate(tmp_path / "d", {name: item for name, item in given.items() if name != "model"})
    assert not list(tmp_path.glob("*/out/base")), "nothing was drawn before it was refused"


@pytest.mark.slow
def test_a_published_scorer_judges_by_its_one_score(tmp_path: Path, given: Mapping[str, Artifact]) -> None:
    """A plain CLIP's folder, read as PickScore is; the report names it and doubts it."""
    clip = build("clip", tmp_path / "pickscore")
    inputs = {name: item for name, item in given.items() if name != "scorer"}
    told = evaluate(tmp_path / "a", inputs, published_scorer=str(clip), drift_draws=0)
    measured = json.loads((tmp_path / "a" / "out" / "metrics.json").read_text())
    assert list(measured["dimensions"]) == ["mean"]
    assert (measured["published_scorer"], measured["scorer"]) == ("pickscore", digest_path(clip))
    rows = list(read_jsonl(tmp_path / "a" / "out" / "scores.jsonl"))
    wins = np.mean([(row["tuned"]["score"] > row["base"]["score"]) for row in rows])
    assert told["win_rate"] == pytest.approx(wins, abs=1e-6)
    assert "pickscore, from elsewhere" in _doubts(measured, None)[0]
    with pytest.raises(ConfigError, match="two scorers to judge with"):
        evaluate(tmp_path / "b", given, published_scorer=str(clip))
    with pytest.raises(ConfigError, match="no scorer to judge with"):
        evaluate(tmp_path / "c", inputs)


def scores(values: list[float]) -> np.ndarray[Any, Any]:
    return np.tile(np.array(values, dtype=np.float32)[:, None], (1, len(HEADS)))


def test_prompts_that_the_pairs_train_on_are_known_by_their_words(tmp_path: Path) -> None:
    rows = [{"prompt": "A  red circle", "split": "train"}, {"prompt": "a square", "split": "test"}]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    pairs: Any = SimpleNamespace(file=lambda name: tmp_path / name)
    asked = [ImagePrompt(prompt_id=name, prompt=name) for name in ("a red Circle", "a square", "a star")]
    assert trained_prompts(asked, pairs) == ["a red Circle"]
    assert trained_prompts(asked, None) == []
    measured = {"num_prompts": 30, "num_trained_prompts": 1, "scorer_shares_training_prompts": False, "drift": None}
    doubts = _doubts({**measured, "published_scorer": "p"}, None)
    assert any("1 of the 30 prompts are trained on" in doubt for doubt in doubts)


def test_win_rates_by_hand() -> None:
    """Two prompts of two images: three wins and a tie of four."""
    sides = {"base": scores([0.0, 1.0, 2.0, 3.0]), "tuned": scores([1.0, 1.0, 3.0, 4.0])}
    found = compare(["a", "a", "b", "b"], sides, Resampling(1000))
    assert found["mean"]["win_rate"]["value"] == pytest.approx(7 / 8)
    assert found["style"]["difference"]["value"] == pytest.approx(3 / 4)


def test_other_seeds_show_how_far_a_model_moved() -> None:
    """Two prompts of three seeds: what hardly moves ties, where the same seed would win everywhere."""
    base = scores([0.0, 1.0, 2.0, 10.0, 11.0, 12.0])
    names, by = ["a", "a", "a", "b", "b", "b"], Resampling(1000)
    # Prompt b as it was. Of prompt a, moved by 1.5: 1.5 beats 1 not 2, 2.5 beats 0 and 2, 3.5 beats 0 and 1; 5 of 6.
    for shift, same, other in ((0.01, 3 / 4, 1 / 2), (1.5, 3 / 4, (5 / 6 + 1 / 2) / 2)):
        tuned = base + scores([shift] * 3 + [0.0] * 3)
        for how, expected in (("same_seed", same), ("other_seeds", other)):
            found = compare(names, {"base": base, "tuned": tuned}, by, how)["mean"]  # type: ignore[arg-type]
            assert found["win_rate"]["value"] == pytest.approx(expected, abs=1e-6), (shift, how)
            assert found["difference"]["value"] == pytest.approx(shift / 2, abs=1e-6)
    with pytest.raises(ConfigError, match="needs two seeds"):
        validate(EvaluateImagesConfig, {"compare_with": "other_seeds", "seeds": [3]})


def test_the_same_images_are_a_tie_and_better_ones_a_win() -> None:
    generator = np.random.default_rng(0)
    base, prompts = generator.normal(size=(60, 5)).astype(np.float32), [f"p{n // 2}" for n in range(60)]
    same = compare(prompts, {"base": base, "tuned": base}, Resampling(1000))["mean"]
    assert same["win_rate"] == {"value": 0.5, "low": 0.443243, "high": 0.556757}
    assert same["p_value"] == 1.0
    for shift, words in ((1.0, "preferred"), (-1.0, "WORSE"), (0.0, "No difference")):
        noise = generator.normal(size=base.shape).astype(np.float32)
        measured = compare(prompts, {"base": base, "tuned": base + shift + noise}, Resampling(1000))
        assert words in conclusion({"dimensions": measured, "num_prompts": 30})
        assert (measured["spatial"]["p_holm"] < 0.05) == (shift != 0)


def test_a_tuned_pipeline_is_opened_by_its_own_variant(tmp_path: Path) -> None:
    """It was looked for without one, and refused by telling to set the variant that was set."""
    folder = build("sdxl", tmp_path / "tuned")
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    tuned = publish(
        folder, "image_checkpoint", Provenance("sdxl_dpo", "all", "f", {}, {"variant": "fp16"}, "0", {}), {}
    )
    open_pipeline(source_of(GeneratorSource("base", "base", "fp32"), "tuned", tuned))
