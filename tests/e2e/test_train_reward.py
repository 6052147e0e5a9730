"""train_reward: what it writes, resuming, halves, controls, refusals, and a known answer on real photographs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from photo_pairs import make_photo_pairs
from reward_artifacts import SMALL, make_clip, make_samples, run_stage
from training_artifacts import content, executed_steps, kill_after, publish_as

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.image_rows import HEADS
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from stages.train_reward import TrainRewardConfig

KNOWN: dict[str, Any] = {
    **SMALL, "num_train_epochs": 4, "per_device_train_batch_size": 32, "effective_batch_size": 32, "save_steps": 1000,
    "logging_steps": 100,
}  # fmt: skip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_samples(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, pairs: Artifact, clip: Artifact) -> Path:
    folder = tmp_path_factory.mktemp("reward")
    run_stage("train_reward", folder, SMALL, pairs=pairs, clip=clip)
    return folder


def with_rows(folder: Path, pairs: Artifact, change: Any) -> Artifact:
    """The pairs with every row put through `change`; images stay where they are."""
    (folder / "images").symlink_to(pairs.path / "images")
    write_jsonl(folder / "pairs.jsonl", [change(row) for row in read_jsonl(pairs.file("pairs.jsonl"))])
    return publish_as(folder, "image_pairs")


def test_it_learns_from_ln_2_on_and_writes_what_the_page_says(undisturbed: Path, pairs: Artifact) -> None:
    curve = [row for row in read_curve(undisturbed / "logs" / STEPS) if "loss" in row]
    assert curve[0]["loss"] == pytest.approx(math.log(2), abs=0.2)
    assert curve[-1]["loss"] < curve[0]["loss"]
    names = set(content(undisturbed))
    expected = {"config.json", "model.safetensors", "metrics.json", "predictions.jsonl", "trained_on.json", "README.md"}
    assert expected <= names
    metrics = json.loads((undisturbed / "out" / "metrics.json").read_text())
    for split in ("val", "test"):
        found = metrics["splits"][split]
        assert list(found) == list(HEADS)
        assert found["spatial"]["num_prompts"] == 3
        assert found["spatial"]["accuracy"]["low"] <= found["spatial"]["accuracy"]["value"]
    config = json.loads((undisturbed / "out" / "config.json").read_text())
    assert config["temperatures"] == list(metrics["temperatures"].values())
    trained_on = json.loads((undisturbed / "out" / "trained_on.json").read_text())["prompt_ids"]
    rows = list(read_jsonl(pairs.file("pairs.jsonl")))
    assert trained_on == sorted({row["prompt_id"] for row in rows if row["split"] == "train"})
    predicted = list(read_jsonl(undisturbed / "out" / "predictions.jsonl"))
    assert len(predicted) == sum(row["split"] != "train" for row in rows)
    assert str(undisturbed) not in "".join(path.read_text() for path in (undisturbed / "out").glob("*.json"))


def test_scores_are_those_it_was_measured_by(undisturbed: Path, pairs: Artifact) -> None:
    from prefmill.families.reward.scoring import score_images

    rows = {row["pair_id"]: row for row in read_jsonl(pairs.file("pairs.jsonl"))}
    predicted = list(read_jsonl(undisturbed / "out" / "predictions.jsonl"))[:4]
    temperatures = np.array(json.loads((undisturbed / "out" / "config.json").read_text())["temperatures"])
    for row in predicted:
        pair = rows[row["pair_id"]]
        paths = [pairs.path / pair["preferred"], pairs.path / pair["rejected"]]
        better, worse = score_images(undisturbed / "out", [pair["prompt"]] * 2, paths)
        np.testing.assert_allclose((better - worse) * temperatures, list(row["margins"].values()), atol=2e-5)


@pytest.mark.timing
@pytest.mark.slow
def test_killed_and_rerun_it_ends_with_the_same_bytes(
    tmp_path: Path, undisturbed: Path, pairs: Artifact, clip: Artifact
) -> None:
    folder = tmp_path / "killed"
    kill_after(3, folder, lambda: run_stage("train_reward", folder, SMALL, pairs=pairs, clip=clip))
    run_stage("train_reward", folder, SMALL, pairs=pairs, clip=clip)
    assert content(folder) == content(undisturbed)
    assert sorted(set(executed_steps(folder))) == [1, 2, 3, 4]


@pytest.mark.slow
def test_halves_share_no_prompt(tmp_path: Path, pairs: Artifact, clip: Artifact) -> None:
    seen = {}
    for half in ("policy", "judge"):
        keys = {**SMALL, "num_train_epochs": 1, "prompt_half": half, "trainable": "heads"}
        run_stage("train_reward", tmp_path / half, keys, pairs=pairs, clip=clip)
        seen[half] = set(json.loads((tmp_path / half / "out" / "trained_on.json").read_text())["prompt_ids"])
    assert not seen["policy"] & seen["judge"]
    assert len(seen["policy"] | seen["judge"]) == 14


@pytest.mark.slow
def test_what_is_frozen_stays(tmp_path: Path, pairs: Artifact, clip: Artifact) -> None:
    from safetensors.torch import load_file

    before = load_file(clip.path / "model.safetensors")
    for trainable in ("heads", "vision"):
        keys = {**SMALL, "num_train_epochs": 1, "trainable": trainable}
        run_stage("train_reward", tmp_path / trainable, keys, pairs=pairs, clip=clip)
        after = load_file(tmp_path / trainable / "out" / "model.safetensors")
        moved = {name for name, value in before.items() if (value != after[f"clip.{name}"]).any()}
        assert bool(moved) == (trainable == "vision")
        assert all(name.startswith(("vision_model", "visual_projection")) for name in moved)


@pytest.mark.slow
def test_missing_and_overall_labels(tmp_path: Path, pairs: Artifact, clip: Artifact) -> None:
    def only(name: str) -> Any:
        return lambda row: {**row, "labels": {**dict.fromkeys(row["labels"]), name: row["labels"][name]}}

    one = with_rows(_made(tmp_path / "one"), pairs, only("style"))
    found = run_stage("train_reward", tmp_path / "a", {**SMALL, "num_train_epochs": 1}, pairs=one, clip=clip)
    assert found["pairs"] > 0
    heads = json.loads((tmp_path / "a" / "out" / "metrics.json").read_text())["splits"]["test"]
    assert [name for name, value in heads.items() if value is not None] == ["style"]
    overall = with_rows(_made(tmp_path / "overall"), pairs, only("overall"))
    with pytest.raises(InputError, match="no pair has a label that a head could learn"):
        run_stage("train_reward", tmp_path / "b", SMALL, pairs=overall, clip=clip)
    keys = {**SMALL, "num_train_epochs": 1, "overall_for_missing": True}
    assert run_stage("train_reward", tmp_path / "c", keys, pairs=overall, clip=clip)["pairs"] == 28


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": {"style": 1.5}}, "a label is no probability"),
        ({"weight": 0.0}, "a pair's weight must be above 0"),
        ({"labels": 3}, "not an image pair"),
        ({"preferred": "images/absent.png"}, "missing image"),
        ({"split": "val"}, "no pairs to train on"),
        ({"prompt_id": "one"}, "a prompt is held out and trained on"),
    ],
)
def test_bad_pairs_are_refused(
    change: dict[str, Any], message: str, tmp_path: Path, pairs: Artifact, clip: Artifact
) -> None:
    broken = with_rows(_made(tmp_path / "pairs"), pairs, lambda row: {**row, **change})
    with pytest.raises(InputError, match=message):
        run_stage("train_reward", tmp_path / "t", SMALL, pairs=broken, clip=clip)


def test_an_adapter_and_a_model_that_is_not_there_are_refused(tmp_path: Path, pairs: Artifact) -> None:
    with pytest.raises(ConfigError, match="trained without an adapter"):
        validate(TrainRewardConfig, {"lora": {"r": 4}})
    with pytest.raises(ConfigError, match="max_length: a key of text models"):
        validate(TrainRewardConfig, {"max_length": 77})
    with pytest.raises(InputError, match="cannot load the CLIP processor"):
        run_stage("train_reward", tmp_path, {**SMALL, "model_name_or_path": str(tmp_path / "absent")}, pairs=pairs)


def photo_of(prompt_id: str) -> str:
    """The photograph that a crop is of."""
    return prompt_id.rpartition("-")[0]


def sign_test(wins: int, num: int) -> float:
    """The probability of at least `wins` of `num` if heads and tails were alike."""
    return sum(math.comb(num, count) for count in range(wins, num + 1)) / 2**num


@pytest.mark.slow
def test_it_prefers_photographs_to_degraded_copies_and_not_with_shuffled_labels(
    tmp_path: Path, shared_data: Path, clip: Artifact
) -> None:
    """Two pictures left out at a time: trained on the others, on how many of fourteen does it prefer the original?"""
    listed = json.loads((shared_data / "images" / "manifest.json").read_text())
    photos = {
        Path(row["file"]).stem: (shared_data / "images" / row["file"], row["prompt_by_scout"])
        for row in listed
        if row["file"].startswith("photos/")
    }
    made = make_photo_pairs(tmp_path / "all", photos, held_out=(), crops=12)
    wins = {}
    for shuffled in (False, True):
        shares = {}
        for names in zip(sorted(photos)[::2], sorted(photos)[1::2], strict=True):
            folder = tmp_path / f"{names[0]}-{shuffled}"

            def held(row: Any, names: tuple[str, ...] = names) -> Any:
                return {**row, "split": "test" if photo_of(row["prompt_id"]) in names else "train"}

            left_out = with_rows(_made(folder), made, held)
            keys = {**KNOWN, "shuffle_labels": shuffled}
            run_stage("train_reward", folder / "t", keys, pairs=left_out, clip=clip)
            predicted = list(read_jsonl(folder / "t" / "out" / "predictions.jsonl"))
            for name in names:
                margins = [list(row["margins"].values()) for row in predicted if photo_of(row["prompt_id"]) == name]
                shares[name] = float((np.mean(margins, axis=1) > 0).mean())
        wins[shuffled] = sum(share > 0.5 for share in shares.values())
        print(f"shuffled={shuffled}:", {name: round(share, 2) for name, share in shares.items()})
    assert len(photos) == 14
    assert sign_test(wins[False], 14) < 0.01
    assert sign_test(wins[True], 14) > 0.05
