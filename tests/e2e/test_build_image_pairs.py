"""build_image_pairs: labels, weights, ties and contradictions, ratings that add up, and bad input."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from image_artifacts import publish_as, task_for
from image_rating_artifacts import NUM_PROMPTS, build, make_ratings, pairs, quarantine, rating, summary, sure

import stages.build_image_pairs as stage
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.image_rows import DIMENSIONS, HEADS
from prefmill.core.stage import Task
from prefmill.store.artifacts import payload
from prefmill.store.jsonl import read_jsonl


def test_the_preferred_image_does_not_depend_on_the_side(tmp_path: Path) -> None:
    task = build(tmp_path, sure())
    rows = pairs(task)
    assert [row["prompt_id"] for row in rows] == [f"p{n:02}" for n in range(NUM_PROMPTS)]
    for row in rows:
        assert row["preferred"] == f"images/{row['prompt_id']}/0.png"
        assert row["labels"] == {**dict.fromkeys(HEADS), "overall": 1.0}
        assert row["weight"] == 1.0
        assert row["prompt"].startswith("bars")
        assert all((task.output / row[side]).is_file() for side in ("preferred", "rejected"))
    names = {path.relative_to(task.output).as_posix() for path in payload(task.output)}
    assert len(names) == 2 * NUM_PROMPTS + 4
    assert names >= {"pairs.jsonl", "quarantine.jsonl", "strengths.jsonl", "summary.json"}
    assert publish_as(task.output, "image_pairs")


def test_the_same_ratings_in_another_order_give_the_same_bytes(tmp_path: Path) -> None:
    asked = itertools.product(range(NUM_PROMPTS), ((0, 1), (2, 1)), range(3), DIMENSIONS)
    ratings = [
        rating(
            f"p{n:02}/{a}", f"p{n:02}/{b}", random.Random(9 * n + a + r).choice(["left", "tie", "right"]), f"r{r}", d
        )
        for n, (a, b), r, d in asked
    ]
    shuffled = random.Random(0).sample(ratings, len(ratings))
    found = []
    for name, rows in (("a", ratings), ("b", shuffled)):
        task = build(tmp_path / name, rows, num_seeds=3, labels="bradley_terry")
        found.append({p.relative_to(task.output): p.read_bytes() for p in payload(task.output)})
        stage.run(validate(stage.BuildImagePairsConfig, {"labels": "bradley_terry"}), task)  # again, after a kill
        assert {p.relative_to(task.output): p.read_bytes() for p in payload(task.output)} == found[-1]
    assert found[0] == found[1]


def test_several_raters_make_soft_labels(tmp_path: Path) -> None:
    a, b = "p00/0", "p00/1"
    ratings = [
        *sure(range(1, NUM_PROMPTS)),
        rating(a, b, "left", "ann"), rating(b, a, "right", "ben"), rating(a, b, "left", "cid"),
        rating(a, b, "right", "dot"), rating(a, b, "tie", "ann", "style"), rating(a, b, "right", "ben", "style"),
        rating(a, b, "skip", "cid", "style"), rating(a, b, "right", "ann", "fidelity"),
    ]  # fmt: skip
    task = build(tmp_path, ratings)
    labels = {**dict.fromkeys(HEADS), "overall": 0.75, "style": 0.25, "fidelity": 0.0}
    assert pairs(task)[0]["labels"] == labels
    told = summary(task)
    assert told["dimensions"]["overall"]["agreement"] == 0.5  # 3 of the 6 couples of four raters
    assert told["raters"]["cid"] == {"num_left": 1, "num_right": 0, "num_ties": 0, "num_skips": 1}
    assert "style: only 1 of 12 pairs have a label" in told["warnings"]


def test_without_a_vote_overall_the_dimensions_decide(tmp_path: Path) -> None:
    choices = dict(zip(HEADS, ("right", "right", "right", "left", "tie"), strict=True))
    ratings = [rating("p00/0", "p00/1", choice, dimension=name) for name, choice in choices.items()]
    task = build(tmp_path, ratings)
    assert pairs(task)[0]["preferred"] == "images/p00/1.png"
    assert pairs(task)[0]["labels"] == {
        "spatial": 1.0, "iconographic": 1.0, "style": 1.0, "fidelity": 0.0, "material": 0.5, "overall": None
    }  # fmt: skip


def test_rankings_weigh_as_one_prompt(tmp_path: Path) -> None:
    ranked = [rating(f"p00/{a}", f"p00/{b}", "left") for a, b in itertools.combinations(range(4), 2)]
    task = build(tmp_path, ranked + sure([1]), num_seeds=4)
    weights: Counter[str] = Counter()
    for row in pairs(task):
        weights[row["prompt_id"]] += row["weight"]
    assert weights["p00"] == pytest.approx(1, abs=1e-5)
    assert weights["p01"] == 1
    strengths = [row["strengths"]["overall"] for row in read_jsonl(task.output / "strengths.jsonl")][:4]
    assert strengths == sorted(strengths, reverse=True)


def test_bradley_terry_softens_and_contradicts_a_vote_that_stands_alone(tmp_path: Path) -> None:
    """Three raters put 0 before 1 before 2; one vote says 2 before 0."""
    ratings = [rating(f"p00/{a}", f"p00/{b}", "left", rater) for a, b in ((0, 1), (1, 2)) for rater in "xyz"]
    task = build(tmp_path, [*ratings, rating("p00/2", "p00/0", "left", "x")], num_seeds=3, labels="bradley_terry")
    assert [row["pair_id"] for row in pairs(task)] == ["p00:0:1", "p00:1:2"]
    assert all(0.5 < row["labels"]["overall"] < 0.95 for row in pairs(task))
    assert quarantine(task) == [("pair", "the prompt's other votes say otherwise")]
    by_votes = build(tmp_path / "v", [*ratings, rating("p00/2", "p00/0", "left", "x")], num_seeds=3)
    assert len(pairs(by_votes)) == 3


def test_contradictions_ties_and_repetitions_are_set_aside(tmp_path: Path) -> None:
    ratings = [
        *sure(range(4, NUM_PROMPTS)),
        rating("p00/0", "p00/1", "left", "ann"), rating("p00/0", "p00/1", "right", "ben"),
        rating("p01/0", "p01/1", "tie", "ann"), rating("p01/0", "p01/1", "tie", "ben"),
        rating("p02/0", "p02/1", "left", "ann"), rating("p02/0", "p02/1", "left", "ann"),
        rating("p03/0", "p03/1", "left", "ann"), rating("p03/1", "p03/0", "left", "ann"),
    ]  # fmt: skip
    task = build(tmp_path, ratings, max_quarantined_share=0.2)
    assert [row["prompt_id"] for row in pairs(task)] == ["p02", *(f"p{n:02}" for n in range(4, NUM_PROMPTS))]
    assert quarantine(task) == [
        ("rating", "duplicate row"), ("rating", "the rater said otherwise"), ("pair", "raters contradict each other")
    ]  # fmt: skip
    assert summary(task)["num_ties"] == 1
    with pytest.raises(InputError, match=r"2 of 16 ratings cannot be used[\s\S]*ratings.csv:\d+[\s\S]*duplicate row"):
        build(tmp_path / "strict", ratings)


def test_an_all_ties_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"every comparison is a tie[\s\S]*12 ratings, 12 ties"):
        build(tmp_path, [{**row, "choice": "tie"} for row in sure()])
    with pytest.raises(InputError, match=r"no pair is left[\s\S]*correct what .*logs/quarantine.jsonl lists"):
        build(tmp_path / "b", [rating("p00/0", "p00/1", side, side) for side in ("left", "right")])
    assert [row["reason"] for row in read_jsonl(tmp_path / "b" / "logs" / "quarantine.jsonl")] == [
        "raters contradict each other"
    ]
    with pytest.raises(InputError, match=r"no pair is left\n.*12 ratings, 2 skips, 10 ties\n.*fix: +rate more"):
        build(tmp_path / "d", [{**row, "choice": "tie" if n > 1 else "skip"} for n, row in enumerate(sure())])
    with pytest.raises(InputError, match=r"no ratings\n.*\n.*files without a row\n.*write a line for each rating"):
        build(tmp_path / "c", [])


def test_rows_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    bad = [
        rating("p00/0", "p00/9", "left"), rating("p00/0", "p01/0", "left"), rating("p00/0", "p00/0", "left"),
        rating("p00/0", "p00/1", "better"), rating("p00/0", "p00/1", "left", dimension="taste"),
        rating("p00/0", "p00/1", "left", rater=""),
    ]  # fmt: skip
    task = build(tmp_path, bad + sure(), max_quarantined_share=0.5)
    rows = list(read_jsonl(task.output / "quarantine.jsonl"))
    assert [row["reason"] for row in rows] == [
        "unknown image", "images of two prompts", "an image against itself",
        "unknown choice (left, right, tie or skip)",
        "unknown dimension (spatial, iconographic, style, fidelity, material, overall)", "no rater",
    ]  # fmt: skip
    assert [row["where"] for row in rows] == [f"ratings.csv:{line}" for line in range(2, 8)]
    with pytest.raises(
        InputError, match=r"6 of 18 ratings cannot be used(.|\n)*the first: {'image_id': 'p00/9'}"
    ) as told:
        build(tmp_path / "strict", bad + sure())
    assert list(read_jsonl(Path(re.findall(r"every row is in (.+?);", str(told.value))[0]))) == rows


def test_low_yield_is_a_warning(tmp_path: Path) -> None:
    task = build(tmp_path, sure(range(3)), splits={"train": 1.0, "val": 0.0, "test": 0.0})
    assert summary(task)["warnings"] == [
        "only 3 of 12 prompts gave a pair: rate more, or make more images per prompt"
    ]  # fmt: skip
    habit = [rating(f"p{n:02}/{a}", f"p{n:02}/{b}", "left") for n in range(NUM_PROMPTS) for a, b in ((0, 1), (2, 3))]
    told = summary(build(tmp_path / "b", habit, num_seeds=4))
    assert any(warning.startswith("rater ann answers by the side") for warning in told["warnings"])
    # Who answers a pair's six dimensions alike has answered once: by the image here, which stood left 17 times of 24.
    shown = [(row["left"], row["right"]) for row in habit]
    alike = [
        rating(*pair, "left" if place < 17 else "right", dimension=name)
        for place, pair in enumerate(shown) for name in DIMENSIONS
    ]  # fmt: skip
    told = summary(build(tmp_path / "c", alike, num_seeds=4))
    assert not any("answers by the side" in warning for warning in told["warnings"])


def test_several_artifacts_and_sources_add_up(tmp_path: Path) -> None:
    first = make_ratings(tmp_path / "a", sure())
    second = make_ratings(tmp_path / "b", [{**row, "rater": "ben"} for row in sure()])
    task = task_for(tmp_path, "build_image_pairs")
    given = {"ratings": (first, second)}
    task = Task(**{**vars(task), "inputs": given, "_last_progress": [0.0]})
    stage.run(validate(stage.BuildImagePairsConfig, {}), task)
    assert len(pairs(task)) == NUM_PROMPTS
    assert summary(task)["num_ratings"] == 2 * NUM_PROMPTS
    assert summary(task)["dimensions"]["overall"]["agreement"] == 1.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"splits": {"train": 0.5, "val": 0.1, "test": 0.1}}, r"train \+ val \+ test is 0.7"),
        ({"min_agreement": 0.5}, "min_agreement"),
        ({"sources": [{"format": "csv"}]}, "sources"),
        ({"labels": "majority"}, "labels"),
    ],
)
def test_bad_settings_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(stage.BuildImagePairsConfig, settings)


def test_what_was_set_aside_and_two_spellings_of_a_rater_are_told(tmp_path: Path) -> None:
    others = [{**row, "rater": name} for row, name in zip(sure(), itertools.cycle(("Ann ", "ben")), strict=False)]
    told = summary(build(tmp_path, [*sure(), *others, rating("p00/0", "p00/9", "left")]))["warnings"]
    assert "set aside, see quarantine.jsonl: 1 x rating: unknown image" in told
    assert "raters Ann and ann count as two: if that is one person, spell the name alike" in told
