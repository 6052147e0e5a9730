"""A program rates images: by sharpness or by a reward model, from the pipeline or of one's own, and bad input."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from image_artifacts import bomb, draw, make_images, publish_as, task_for
from rating_pages import rate, ratings

import stages.rate_images as stage
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.image_rows import DIMENSIONS
from prefmill.core.stage import Task
from prefmill.demo.tiny_models import build
from prefmill.families.reward.scoring import open_scorer
from prefmill.store.artifacts import payload
from prefmill.store.jsonl import read_jsonl


def contents(task: Task) -> dict[str, bytes]:
    return {path.relative_to(task.output).as_posix(): path.read_bytes() for path in payload(task.output)}


def test_sharpness_prefers_what_is_not_blurred_wherever_it_stands(tmp_path: Path) -> None:
    task = task_for(tmp_path / "x" / "t", "rate_images", images=make_images(tmp_path / "images", num_prompts=20))
    metrics = rate(task, rater={"by": "sharpness"})
    rows = ratings(task)
    assert len(rows) == 20 * len(DIMENSIONS) == metrics["num_ratings"]
    for row in rows:
        assert row["rater"] == "sharpness"
        assert row[row["choice"]] == f"{row['prompt_id']}/0"
    assert 20 < Counter(row["choice"] for row in rows)["left"] < 100  # sides are drawn
    assert sorted(contents(task)) == sorted(
        [f"images/p{n:02}/{seed}.png" for n in range(20) for seed in (0, 1)]
        + ["images.jsonl", "quarantine.jsonl", "ratings.csv", "summary.json"]
    )
    before = contents(task)
    rate(task, rater={"by": "sharpness"})
    assert contents(task) == before


def test_a_program_resumes_behind_the_blocks_it_has_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import prefmill.images.rate as rate_module
    import prefmill.images.rating as rating_module

    monkeypatch.setattr(rating_module, "_BLOCK", 4)
    scored: list[int] = []
    real = rate_module.sharpness

    def dying(prompts: Any, paths: Any) -> Any:
        if len(scored) == 2:
            raise KeyboardInterrupt
        scored.append(len(paths))
        return real(prompts, paths)

    task = task_for(tmp_path / "x" / "t", "rate_images", images=make_images(tmp_path / "images", num_prompts=6))
    monkeypatch.setattr(rate_module, "sharpness", dying)
    with pytest.raises(KeyboardInterrupt):
        rate(task, rater={"by": "sharpness"})
    scored.append(0)  # let the rest through
    rate(task, rater={"by": "sharpness"})
    assert scored == [4, 4, 0, 4]


def test_a_reward_model_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    import prefmill.families.reward.scoring as scoring

    def score_images(folder: Path, prompts: list[str], paths: list[Path]) -> Any:
        assert folder == reward.path
        assert all(prompt.startswith("coloured bars") for prompt in prompts)
        return np.array(
            [[1.0, 0.0, 0.2, 0.0, 0.0] if path.stem == "1" else [0.0] * 5 for path in paths], dtype=np.float32
        )

    monkeypatch.setattr(scoring, "score_images", score_images)
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "config.json").write_text("{}")
    reward = publish_as(tmp_path / "reward", "reward_model")
    images = make_images(tmp_path / "images")
    task = task_for(tmp_path / "x" / "t", "rate_images", images=images, reward=reward)
    rate(task, rater={"by": "reward", "tie_margin": 0.21})
    found = {
        (row["dimension"], row["choice"] if row["choice"] == "tie" else row[row["choice"]][-1]) for row in ratings(task)
    }
    assert found == {
        ("spatial", "1"), ("iconographic", "tie"), ("style", "tie"), ("fidelity", "tie"), ("material", "tie"),
        ("overall", "1"),
    }  # fmt: skip
    with pytest.raises(ConfigError, match="no reward model to rate with"):
        rate(task_for(tmp_path / "x" / "u", "rate_images", images=images), rater={"by": "reward"})


def test_a_published_scorer_rates_by_its_one_score(tmp_path: Path) -> None:
    """A plain CLIP's folder, read as PickScore is: the same choice on every dimension, and the higher score wins."""
    clip, images = build("clip", tmp_path / "clip"), make_images(tmp_path / "images")
    task = task_for(tmp_path / "x" / "t", "rate_images", images=images)
    rate(task, rater={"by": "reward", "folder": str(clip)})
    listed = {row["image_id"]: row for row in read_jsonl(images.path / "images.jsonl")}
    names = sorted(listed)
    found = open_scorer(clip)(
        [listed[name]["prompt"] for name in names], [images.path / listed[name]["file"] for name in names]
    )
    scores = dict(zip(names, found[:, 0], strict=True))
    rows = ratings(task)
    assert {row["dimension"] for row in rows} == set(DIMENSIONS)
    assert all(row["choice"] == ("left" if scores[row["left"]] > scores[row["right"]] else "right") for row in rows)
    reward = publish_as(build("clip", tmp_path / "reward"), "reward_model")
    task = task_for(tmp_path / "x" / "u", "rate_images", images=images, reward=reward)
    with pytest.raises(ConfigError, match="two reward models to rate with"):
        rate(task, rater={"by": "reward", "folder": str(clip)})


def test_many_images_a_prompt_give_every_pair_or_as_many_as_asked(tmp_path: Path) -> None:
    images = make_images(tmp_path / "images", num_prompts=3, num_seeds=4)
    for most, count in ((None, 6), (2, 2)):
        task = task_for(tmp_path / f"x{most}" / "t", "rate_images", images=images)
        assert rate(task, rater={"by": "sharpness"}, max_pairs_per_prompt=most)["num_pairs"] == 3 * count


def test_own_images_are_checked_and_copied(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    draw(folder / "a.png", 0)
    draw(folder / "b.jpg", 0, blur=3)
    draw(folder / "c.png", 1)
    (folder / "d.png").write_bytes((folder / "c.png").read_bytes()[:70])
    bomb(folder / "e.png")
    shutil.copy(folder / "c.png", folder / "again.png")
    names = ("a.png", "b.jpg", "c.png", "d.png", "e.png", "none.png", "https://x.org/f.png", "again.png")
    (folder / "images.csv").write_text("prompt,file\n" + "".join(f"x,{name}\n" for name in names) + "y,c.png\n")
    task = task_for(tmp_path / "x" / "t", "rate_images")
    told = rate(task, rater={"by": "sharpness"}, images=str(folder))
    # Of four that can be shown, nobody is asked to tell an image from itself.
    assert told["num_pairs"] == 5
    assert told["warnings"] == [
        "set aside, see quarantine.jsonl: 1 x image: an image by its address, not a file; 1 x image: damaged image; "
        "1 x image: image too large to decode; 1 x image: missing image",
        "1 of 2 prompts have no two different pictures to compare",
    ]
    reasons = [row["reason"] for row in read_jsonl(task.output / "quarantine.jsonl")]
    assert sorted(reasons) == [
        "an image by its address, not a file", "damaged image", "image too large to decode", "missing image",
    ]  # fmt: skip
    rows = list(read_jsonl(task.output / "images.jsonl"))
    assert [Path(row["file"]).name for row in rows] == ["a.png", "again.png", "b.jpg", "c.png"]
    assert not (task.output / rows[0]["file"]).samefile(folder / "a.png")


def test_what_cannot_be_rated_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no images to rate"):
        rate(task_for(tmp_path / "x" / "a", "rate_images"), rater={"by": "sharpness"})
    images = make_images(tmp_path / "images", num_seeds=1)
    with pytest.raises(ConfigError, match="images from two places"):
        rate(task_for(tmp_path / "x" / "b", "rate_images", images=images), images=str(tmp_path))
    with pytest.raises(ConfigError, match=r"a reward model that nothing asks for[\s\S]*rater.by=sharpness"):
        rate(task_for(tmp_path / "x" / "d", "rate_images", images=images, reward=images), rater={"by": "sharpness"})
    with pytest.raises(InputError, match=r"no two images of one prompt[\s\S]*4 images of 4 prompts"):
        rate(task_for(tmp_path / "x" / "c", "rate_images", images=images), rater={"by": "sharpness"})


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"the images of each prompt are the same picture\n.*4 images of 2 prompts\n.*that differ: `seeds`"),
        (b"", r"no two images[\s\S]*images.csv:2\n.*0 images of 0 prompts; set aside: 4 x image: not an image\n"),
    ],
)
def test_two_images_that_cannot_be_compared_are_not_said_to_be_missing(
    tmp_path: Path, content: bytes | None, said: str
) -> None:
    """`make at least two images per prompt` was told where two were there, equal or empty."""
    names = ["a.png", "b.png", "c.png", "d.png"]
    for name in names:
        draw(tmp_path / "mine" / name, 0) if content is None else write(tmp_path / "mine" / name, content)
    lines = [f"prompt {number // 2},{name}\n" for number, name in enumerate(names)]
    write(tmp_path / "mine" / "images.csv", ("prompt,file\n" + "".join(lines)).encode())
    with pytest.raises(InputError, match=said):
        rate(task_for(tmp_path / "x", "rate_images"), rater={"by": "sharpness"}, images=str(tmp_path / "mine"))


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rater": {"by": "nobody"}}, "rater"),
        ({"dimensions": ["taste"]}, "dimensions"),
        ({"dimensions": []}, "dimensions"),
        ({"rater": {"by": "people", "raters_per_pair": 0}}, "raters_per_pair"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(stage.RateImagesConfig, settings)
