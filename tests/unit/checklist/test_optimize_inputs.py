"""Targets, label files, candidates and a model's proposals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefmill.checklist.items import Item, load_checklist
from prefmill.checklist.optimize import proposals
from prefmill.checklist.optimize.config import ProposeConfig, SelectConfig
from prefmill.checklist.optimize.proposals import collect_candidates, with_paraphrases
from prefmill.checklist.optimize.selection import baseline_features
from prefmill.checklist.optimize.targets import read_labels, require_learnable, target_values
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError


def review(name: str, rating: float, decision: str | None, confidence: float | None = 3.0) -> dict[str, Any]:
    return {"review_id": name, "paper_id": "p", "rating": rating, "decision": decision, "confidence": confidence}


REVIEWS = [
    review("a", 6.0, "accepted"), review("b", 5.9, "accepted", None), review("c", 8.0, "rejected"),
    review("d", 1.0, "desk_rejected"), review("e", 5.0, "withdrawn"), review("f", 5.0, None, 5.0),
]  # fmt: skip


def test_targets() -> None:
    assert target_values("confidence", REVIEWS, 6.0, {}) == {"a": 3, "c": 3, "d": 3, "e": 3, "f": 5}
    assert target_values("decision_agreement", REVIEWS, 6.0, {}) == {"a": 1, "b": 0, "c": 0, "d": 1}
    assert target_values("labels", REVIEWS, 6.0, {"b": 2.0, "elsewhere": 1.0}) == {"b": 2.0}


def test_labels_are_read_from_any_usual_csv(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_bytes(b'\xef\xbb\xbfreview_id,who,label\r\n"a,1",me,0.5\r\nb,me,-2\r\n')
    assert read_labels(path) == {"a,1": 0.5, "b": -2.0}


def test_labels_of_several_people_are_averaged(tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    path.write_text("review_id,label,Annotator\na,1,ann\na,2,ben\nb,3,ann\n")
    assert read_labels(path) == {"a": 1.5, "b": 3.0}
    for again in ("a,2,ann", "a , 2,ann "):  # a blank made another review, or another person, of it
        path.write_text(f"review_id,label,Annotator\na,1,ann\n{again}\n")
        with pytest.raises(InputError, match=r"labels.csv:3[\s\S]*review a again[\s\S]*column `rater`"):
            read_labels(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,label\na,1\n", r"labels.csv:2[\s\S]*id, label"),
        ("", r"is empty[\s\S]*labels.csv"),
        ("review_id,label\na,1\nb,good\n", r"labels.csv:3[\s\S]*'good'"),
        ("review_id,label\na,nan\n", r"labels.csv:2[\s\S]*'nan'"),
        ("review_id,label\na\n", r"fewer cells[\s\S]*labels.csv:2"),
        ("review_id,label\na,1\na,2\n", r"labels.csv:3[\s\S]*review a again"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "labels.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_labels(path)


def test_unreadable_labels(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_labels(tmp_path / "none.csv")
    (tmp_path / "latin.csv").write_bytes(b"review_id,label\n\xff\xfe\xe9,1\n")
    with pytest.raises(InputError, match="UTF-8"):
        read_labels(tmp_path / "latin.csv")


@pytest.mark.parametrize(
    ("values", "papers", "message"),
    [
        ({str(n): n % 2 for n in range(19)}, 20, "too few dev reviews"),
        ({str(n): 1.0 for n in range(50)}, 20, "the same for every dev review"),
        ({str(n): n % 2 for n in range(50)}, 9, "too few dev papers"),
    ],
)
def test_what_cannot_be_learned_is_refused(values: dict[str, float], papers: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        require_learnable("confidence", values, papers, min_labels=20, num_folds=5)
    require_learnable("confidence", {str(n): n % 2 for n in range(20)}, 10, min_labels=20, num_folds=5)


@pytest.mark.parametrize("settings", [{"target": "labels"}, {"target": "confidence", "labels": "x.csv"}])
def test_labels_go_with_their_target(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="go together"):
        validate(SelectConfig, settings)


def test_candidates(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text('name: mine\nitems:\n- {id: kind, question: "Is it kind?", source: me}\n')
    extra = Item(id="more", question="Is there more to it?", source="model")
    assert collect_candidates(mine, True, [extra]).ids == (*load_checklist().ids, "kind", "more")
    assert collect_candidates(mine, False, [extra]).ids == ("kind", "more")
    with pytest.raises(ConfigError, match="too few candidate items"):
        collect_candidates(mine, False, [])
    mine.write_text('name: mine\nitems:\n- {id: summary, question: "Is it kind?", source: me}\n')
    with pytest.raises(ConfigError, match=r"same id[\s\S]*summary"):
        collect_candidates(mine, True, [])
    own = {"id": "own", "question": load_checklist().items[0].question, "source": "me"}
    mine.write_text(json.dumps({"name": "mine", "items": [own]}))
    with pytest.raises(ConfigError, match=r"asked more than once[\s\S]*\(summary\)[\s\S]*\(own\)"):
        collect_candidates(mine, True, [])
    question = own["question"]
    own |= {"question": "Else?", "paraphrases": [question.upper()]}
    mine.write_text(json.dumps({"name": "mine", "items": [own]}))
    with pytest.raises(ConfigError, match=r"asked more than once[\s\S]*\(summary\)[\s\S]*\(own\)"):
        collect_candidates(mine, True, [])


def test_paraphrases_are_items_of_their_own() -> None:
    shipped = load_checklist()
    asked, restated = with_paraphrases(shipped, 1)
    assert len(asked.items) == len(shipped.items) + sum(bool(item.paraphrases) for item in shipped.items)
    (name,) = restated["summary"]
    assert next(item for item in asked.items if item.id == name).question == shipped.items[0].paraphrases[0]
    assert with_paraphrases(shipped, 0)[0].items == shipped.items


ANSWER = """Here are some questions:
1. Does the review say which data sets are missing?
- "Does the review name the data sets that are missing?"
2) Is the tone of the review calm throughout?
Is it?
Does the review say in its own words what the paper proposes or studies?
* Does the review weigh up the costs of the experiments it asks for?
Does the review do this and that without ever coming to a question mark
"""


def test_only_new_questions_of_a_fit_length_are_taken() -> None:
    known = [item.question for item in load_checklist().items]
    assert proposals.new_questions(ANSWER, known) == [
        "Does the review say which data sets are missing?",
        "Is the tone of the review calm throughout?",
        "Does the review weigh up the costs of the experiments it asks for?",
    ]


def test_proposals_become_items(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def answer(engine: Any, prompt: str, *_: Any) -> str:
        asked.append(prompt)
        return ANSWER

    monkeypatch.setattr(proposals, "_generate", answer)
    engine = {"engine": "transformers", "model_name_or_path": "/some/where/judge"}
    config = validate(ProposeConfig, {"engine": engine, "num_proposals": 2, "num_examples": 2})
    items, told = proposals.propose(config, ["one", "two", "three"], 0, tmp_path, lambda *_: None)
    assert told == ANSWER
    assert [item.question for item in items] == proposals.new_questions(ANSWER, [])[:2]
    assert {item.source for item in items} == {"proposed by judge"}, "no path of a machine goes into the checklist"
    assert collect_candidates(None, True, items).ids[-1] == items[1].id
    assert asked[0].count("BEGIN REVIEW") == 2
    assert all(item.question in asked[0] for item in load_checklist().items)
    monkeypatch.setattr(proposals, "_generate", lambda *_: "no idea")
    with pytest.raises(InputError, match=r"no usable item[\s\S]*no idea"):
        proposals.propose(config, ["one"], 0, tmp_path, lambda *_: None)
    rules = validate(ProposeConfig, {"engine": {"engine": "lexical"}})
    with pytest.raises(ConfigError, match="cannot propose"):
        proposals.propose(rules, ["one"], 0, tmp_path, lambda *_: None)


def test_a_model_is_asked_for_real(tmp_path: Path, tiny_judge: Path) -> None:
    """A random model proposes nothing of use; the same seed says the same."""
    engine = {"engine": "transformers", "model_name_or_path": str(tiny_judge)}
    keys: dict[str, Any] = {
        "engine": engine,
        "num_examples": 0,
        "max_new_tokens": 16,
        "shipped": False,
        "num_proposals": 2,
    }
    config = validate(ProposeConfig, keys)
    told = []
    for folder in ("first", "second"):
        with pytest.raises(InputError, match="no usable item") as caught:
            proposals.propose(config, [], 0, tmp_path / folder, lambda *_: None)
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_the_target_is_no_baseline_of_itself() -> None:
    """A checklist for the rating was "worse than rating only"."""
    reviews = [{"num_words": 10 * n, "rating": n} for n in range(1, 4)]
    assert list(baseline_features(reviews, "rating")) == ["length_only"]
    assert baseline_features(reviews, "confidence")["rating_only"].tolist() == [[1, 1], [2, 4], [3, 9]]
