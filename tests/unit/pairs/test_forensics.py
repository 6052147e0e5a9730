"""Which pairs look wrong, on logs with known answers; what `prefmill pair` and `prefmill pairs` print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefmill.checklist.items import load_checklist, save_checklist
from prefmill.cli.main import main
from prefmill.core.artifact import Provenance
from prefmill.datasets.pairs import read_exclude
from prefmill.pairs.forensics import length_effect, margins_logs, read_histories, suspects, suspicions
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import write_jsonl

# id: margins by epoch, tokens of chosen and rejected
PAIRS: dict[str, tuple[list[float], int, int]] = {
    "good:a": ([0.0, 2.0, 4.0], 20, 20), "short:a": ([0.0, 1.0, 3.0], 10, 20), "flat:a": ([0.0, 0.0, -0.1], 20, 21),
    "never:a": ([0.5, -1.0, -2.0], 20, 20), "lost:a": ([0.0, 3.0, -0.5], 20, 22), "long:a": ([0.0, 1.0, 2.0], 120, 20),
    "longer:a": ([0.0, 4.0, 9.0], 220, 20), "once:a": ([-5.0], 20, 20),
}  # fmt: skip


def rows(pairs: dict[str, tuple[list[float], int, int]] = PAIRS) -> list[dict[str, Any]]:
    return [
        {"step": 10 * epoch + number + 1, "epoch": epoch, "pair_id": name, "margin": margins[epoch],
         "gradient_coefficient": 0.05, "chosen_length": chosen, "rejected_length": rejected}
        for epoch in range(3)
        for number, (name, (margins, chosen, rejected)) in enumerate(pairs.items())
        if epoch < len(margins)
    ]  # fmt: skip


def publish_datasets(workspace: Path, **rules: Any) -> None:
    made = Provenance("build_datasets", "all", "f", {}, {"min_checkmark_diff": 1.5, **rules}, "0", {})
    publish(workspace / "data" / "r" / "build_datasets" / "all", "preference_datasets", made, {})


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    """A run with a training's margins, split over two ranks, and the data that one of its pairs was made from."""
    folder = tmp_path / "logs" / "r" / "dpo" / "clean" / "margins"
    repeated = [{**row, "margin": 99.0} for row in rows()[:3]]  # steps taken before a kill, and again after it
    write_jsonl(folder / "margins_log.jsonl", [*repeated, *rows()[0::2]])
    write_jsonl(folder / "margins_log.rank1.jsonl", rows()[1::2])
    (tmp_path / "logs" / "latest").symlink_to("r")
    data = tmp_path / "data" / "r"
    write_jsonl(data / "build_datasets" / "all" / "dpo_clean_train" / "data.jsonl", [{
        "id": "good:a", "group": "p1", "conversations": [{"from": "human", "value": "Review this."}],
        "chosen": {"from": "gpt", "value": "A thorough review."}, "rejected": {"from": "gpt", "value": "Meh."},
        "chosen_id": "good", "rejected_id": "a", "rating_diff": 3.0, "checkmark_diff": 5.0,
    }])  # fmt: skip
    publish_datasets(tmp_path, min_rating_diff=2.0)
    checklist = load_checklist()
    evaluations = [
        {"review_id": review, "paper_id": "p1", "checkmark_score": score, "mean_p_yes": 0.5, "engine": "lexical",
         "answers": {item: {"yes": review == "good" and item == checklist.ids[5], "p_yes": 0.5,
                            **({"evidence": "such as here"} if review == "good" else {})} for item in checklist.ids}}
        for review, score in (("a", 4.0), ("good", 9.0))
    ]  # fmt: skip
    for shard, evaluation in enumerate(evaluations):
        write_jsonl(data / "score_reviews" / f"shard-{shard}" / "review_evaluations.jsonl", [evaluation])
        save_checklist(checklist, data / "score_reviews" / f"shard-{shard}" / "checklist.json")
    return tmp_path


def test_histories_are_by_step_and_the_later_row_counts(workspace: Path) -> None:
    histories = read_histories(margins_logs(workspace / "logs" / "r"))
    assert histories.keys() == PAIRS.keys()
    for name, (margins, chosen, rejected) in PAIRS.items():
        assert [sighting.margin for sighting in histories[name].sightings] == margins
        assert histories[name].length_difference == chosen - rejected


def test_a_line_that_a_kill_cut_off_does_not_count(workspace: Path) -> None:
    (path,) = [path for path in margins_logs(workspace / "logs" / "r") if "rank1" in path.name]
    whole = path.read_text()
    path.write_text(whole + '{"step": 9')
    expected = read_histories([path])
    assert expected
    path.write_text('{"step": 9\n' + whole)  # a training that was resumed wrote on behind it
    assert read_histories([path]) == expected


def test_suspects_of_every_kind(workspace: Path) -> None:
    histories = read_histories(margins_logs(workspace / "logs" / "r"))
    found = {item.history.pair_id: item.reasons for item in suspects(histories)}
    assert found == {
        "never:a": ("never_learned",), "lost:a": ("forgotten",), "flat:a": ("never_learned",),
        "long:a": ("length_only",),
    }  # fmt: skip
    assert [item.history.pair_id for item in suspects(histories)] == ["never:a", "lost:a", "flat:a", "long:a"]
    effect = length_effect(histories.values())
    points = [(chosen - rejected, margins[-1]) for margins, chosen, rejected in PAIRS.values()]
    assert effect.slope == pytest.approx(sum(x * y for x, y in points) / sum(x * x for x, _ in points))
    assert effect.is_real
    assert not any("length_only" in suspicions(item, effect._replace(correlation=0.1)) for item in histories.values())


def test_pairs_of_equal_length_are_never_a_matter_of_length() -> None:
    same = {name: (margins, 20, 20) for name, (margins, _, _) in PAIRS.items()}
    by_pair: dict[str, list[dict[str, Any]]] = {}
    for row in rows(same):
        by_pair.setdefault(row["pair_id"], []).append(row)
    from prefmill.pairs.forensics import _history

    histories = [_history(name, found) for name, found in by_pair.items()]
    effect = length_effect(histories)
    assert effect == (0.0, 0.0, 8)
    assert not any("length_only" in suspicions(history, effect) for history in histories)


def test_pairs_lists_and_exports_what_build_datasets_reads(
    workspace: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    export = tmp_path / "exclude.txt"
    assert main(["pairs", "--suspect", "--export", str(export), "--workspace", str(workspace)]) == 0
    printed = capsys.readouterr().out
    assert "8 pairs, 4 with a last margin above 0, 4 suspect" in printed
    assert "never:a" in printed
    assert "good:a" not in printed
    assert read_exclude(export) == {"never:a", "lost:a", "flat:a", "long:a"}
    assert main(["pairs", "r", "--workspace", str(workspace)]) == 0
    assert "good:a" in capsys.readouterr().out
    assert main(["pairs", "nosuch", "--workspace", str(workspace)]) == 2


def test_pair_tells_all_that_is_known(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pair", "good:a", "--workspace", str(workspace)]) == 0
    printed = capsys.readouterr().out
    for text in ("A thorough review.", "Meh.", "rating_diff 3 points, of at least 2", "checkmark_diff 5 checkmarks",
                 "of at least 1.5", "chosen 9, rejected 4 checkmarks", "'such as here'", "4.0000"):  # fmt: skip
        assert text in printed
    first_item = printed.split("checkmarks\n")[-1].splitlines()[0]
    assert first_item.startswith("* yes 0.50  no 0.50"), "answers that differ come first"
    assert load_checklist().items[5].question in first_item
    assert main(["pair", "never:a", "--workspace", str(workspace)]) == 0
    printed = capsys.readouterr().out
    assert "suspect: never_learned" in printed
    assert "not in this run's data" in printed
    assert main(["pair", "god:a", "--workspace", str(workspace)]) == 2
    assert "did you mean 'good:a'" in capsys.readouterr().err


def test_pair_tells_shares_from_points(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The row has points, and the rule a share: `3 points, of at least 0.3` compared the two."""
    publish_datasets(workspace, min_rating_diff=0.3, rating_unit="quantiles")
    assert main(["pair", "good:a", "--workspace", str(workspace)]) == 0
    assert "rating_diff 3 points, of at least 0.3 of the venue's own distribution" in capsys.readouterr().out


def test_several_tasks_need_a_choice(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_jsonl(workspace / "logs" / "r" / "dpo" / "vision" / "margins" / "margins_log.jsonl", rows())
    assert main(["pairs", "--workspace", str(workspace)]) == 2
    assert "dpo:clean, dpo:vision" in capsys.readouterr().err
    for task in ("vision", "dpo:vision"):
        assert main(["pairs", "--task", task, "--workspace", str(workspace)]) == 0
    assert main(["pairs", "--task", "nosuch", "--workspace", str(workspace)]) == 2
