"""Answers that people give on the rating page, without a browser: who, about what, kept how, and asked again when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from image_artifacts import draw, make_images, publish_as
from rating_pages import answers, asking, rate, ratings

from prefmill.core.artifact import Artifact
from prefmill.core.errors import InputError
from prefmill.core.image_rows import DIMENSIONS
from prefmill.images.rate import answers_file
from prefmill.store.artifacts import payload
from prefmill.store.jsonl import read_jsonl

pytestmark = pytest.mark.timing


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_images(tmp_path_factory.mktemp("images"), num_prompts=3)


@pytest.mark.slow
def test_finishing_early_takes_what_there_is_and_a_rerun_goes_on(tmp_path: Path, images: Artifact) -> None:
    with asking(tmp_path, images, dimensions=["overall"]) as people:
        task = people.task
        status, _, text = people.request("POST", "/finish", {"rater": "ann", "number": 0})
        assert (status, text) == (400, b"Nothing is rated yet: there is nothing to finish.")
        people.act("answer", "ann", choice="left")
        assert people.act("finish", "ann")["closed"]
        assert people.wait() == 0
    assert len(ratings(task)) == 1
    kept = answers_file(task).read_bytes()
    for path in payload(task.output):
        path.unlink()
    rate(task, dimensions=["overall"])  # killed before it had published: finished all the same
    assert len(ratings(task)) == 1
    (task.work / "finished").unlink()  # as the worker does with the whole folder, here for --force
    (task.work / "server.json").unlink()
    with asking(tmp_path, images, dimensions=["overall"]) as again:
        assert again.state("ann")["number"] == 1
        assert again.token != people.token
        again.act("answer", "ann", choice="tie")
        assert again.act("answer", "ann", choice="tie")["closed"]
        assert again.wait() == 0
    assert answers_file(task).read_bytes().startswith(kept)
    assert len(ratings(task)) == 3


def test_answers_about_images_that_have_changed_do_not_count_but_stay(
    tmp_path: Path, images: Artifact, caplog: pytest.LogCaptureFixture
) -> None:
    with asking(tmp_path, images, dimensions=["overall"]) as people:
        people.act("answer", "ann", choice="left")
    other = make_images(tmp_path / "other", num_prompts=3)
    rows = list(read_jsonl(other.path / "images.jsonl"))
    for row in rows:
        draw(other.path / row["file"], 77 + row["seed"])
    changed = publish_as(other.path, "generated_images")
    with asking(tmp_path, changed, dimensions=["overall"]) as people:
        assert people.state("ann")["done"] == 0
        assert people.act("undo", "ann")["number"] == 1, "an answer about other images is not taken back"
        for _ in range(3):
            people.act("answer", "ann", choice="right")
        assert people.wait() == 0
    rate(people.task, dimensions=["overall"])  # finished: it asks nobody
    assert "1 answers in" in caplog.text
    assert len(ratings(people.task)) == 3
    assert len(answers(people.task)) == 4


def test_a_torn_answer_is_cut_off_and_a_damaged_one_is_named(tmp_path: Path, images: Artifact) -> None:
    with asking(tmp_path, images) as people:
        for _ in range(3):
            people.act("answer", "ann", choice="left")
        people.kill()
        path = answers_file(people.task)
        whole = path.read_bytes()
        for torn in (whole[:-5], whole + b'{"rater": "a', whole + b"\0" * 50):
            path.write_bytes(torn)
            people.start()
            number = 2 if torn == whole[:-5] else 3
            assert people.state("ann")["number"] == number
            people.act("answer", "ann", choice="tie")
            people.kill()
            people.start()
            assert people.state("ann")["number"] == number + 1
            people.kill()
        lines = whole.splitlines(keepends=True)
        path.write_bytes(lines[0] + b"garbage\n" + lines[2])
    with pytest.raises(InputError, match=r"unreadable answer[\s\S]*all.jsonl:2"):
        rate(people.task)
    assert path.read_bytes().endswith(lines[2])
    path.write_bytes(lines[0] + b'{"rater": "ann", "choice": "left"}\n' + lines[2])
    with pytest.raises(InputError, match=r"unreadable answer[\s\S]*all.jsonl:2"):
        rate(people.task)
    undone = b'{"rater": "ann", "undo": true}\n'
    path.write_bytes(undone + lines[0] + undone + lines[2])  # the fix, with the damaged line in front of an undo
    people.start()
    assert people.state("ann")["number"] == 1
    people.kill()


def test_a_page_that_is_behind_changes_nothing(tmp_path: Path, images: Artifact) -> None:
    """A second tab, or a request sent twice because its reply was lost."""
    with asking(tmp_path, images) as people:
        shown = people.state("ann")
        for _ in range(2):
            body = {"rater": "ann", "number": 0, "choice": "left", **shown["question"]}
            status, _, text = people.request("POST", "/answer", body)
            assert (status, json.loads(text)["number"]) == (200, 1)
        assert people.act("undo", "ann")["number"] == 0
        assert people.act("undo", "ann")["number"] == 0
        assert [row.get("choice") for row in answers(people.task)] == ["left", None]


def test_two_raters_share_the_pairs_when_one_is_enough(tmp_path: Path, images: Artifact) -> None:
    with asking(tmp_path, images, dimensions=["overall"]) as people:
        first = people.state("ann")["question"]["prompt"]
        people.act("answer", "ann", choice="left")
        assert people.state("ben")["total"] == 2
        prompts = [first]
        while not (shown := people.state("ben"))["closed"]:
            prompts.append(shown["question"]["prompt"])
            if people.act("answer", "ben", choice="right")["closed"]:
                break
        assert len(set(prompts)) == 3
        assert people.wait() == 0


def test_a_name_in_other_letters_is_the_same_person(tmp_path: Path, images: Artifact) -> None:
    with asking(tmp_path, images, dimensions=["overall"]) as people:
        people.act("answer", "Zoë B.", choice="left")
        assert [people.state(name)["number"] for name in ("zoë  b.", "ZOE\u0308 B.", "zoe")] == [1, 1, 0]
        people.act("answer", "zoë b.", choice="left")
        assert {row["rater"] for row in answers(people.task)} == {"Zoë B."}


def test_an_answer_is_about_what_was_shown_though_others_rated_it_meanwhile(tmp_path: Path, images: Artifact) -> None:
    """Ann looks at a pair; Ben rates it, which is enough; the server is killed; Ann answers."""
    with asking(tmp_path, images, dimensions=["overall"]) as people:
        shown = people.state("ann")["question"]
        while people.state("ben")["question"]["prompt"] != shown["prompt"]:
            people.act("answer", "ben", choice="tie")
        people.act("answer", "ben", choice="tie")
        people.kill()
        people.start()
        body = {"rater": "ann", "number": 0, "choice": "left", **shown}
        status, _, text = people.request("POST", "/answer", body)
        assert (status, json.loads(text)["number"]) == (200, 1)
        given = answers(people.task)
        assert given[-1]["rater"] == "ann"
        assert {given[-1][side] for side in ("left", "right")} == {given[-2][side] for side in ("left", "right")}
        status, _, _ = people.request("POST", "/answer", {**body, "number": 1})
        assert (status, len(answers(people.task))) == (200, len(given))  # answered once already
        for wrong, expected in (({"left": "/image/00"}, 404), ({"dimension": "taste"}, 404)):
            assert people.request("POST", "/answer", {**body, "number": 1, **wrong})[0] == expected


def test_sides_are_drawn_for_each_rater_and_stay(tmp_path: Path, images: Artifact) -> None:
    with asking(tmp_path, images) as people:
        shown = {}
        for rater in "abcdefghijklmnop":
            question = people.state(rater)["question"]
            assert people.state(rater)["question"] == question
            shown.setdefault(question["prompt"], set()).add((question["left"], question["right"]))
        assert len(shown) == 3  # everybody has an order of their own
        assert any(len(sides) == 2 for sides in shown.values())
        name = question["left"].removeprefix("/image/")
        assert len(name) == 24
        assert not any(part in json.dumps(shown, default=list) for part in ("seed", ".png", "p00"))


def test_a_full_disk_is_said_and_leaves_no_half_answer(tmp_path: Path, images: Artifact) -> None:
    from prefmill.images.answers import AnswerBook, Session
    from prefmill.images.collection import check_images
    from prefmill.images.custom_images import image_of_row
    from prefmill.images.rating import plan_matchups
    from prefmill.images.rating_server import RatingServer, RefusalError

    sources = [image_of_row(images.path, row, "x") for row in read_jsonl(images.path / "images.jsonl")]
    good = check_images(sources, _quarantine())
    book = AnswerBook(tmp_path / "answers.jsonl")
    session = Session(book, plan_matchups(good.values(), None, 0), DIMENSIONS, 1, 0)
    with RatingServer(session, good, "t") as server:
        server.act("answer", "ann", {"number": 0, "choice": "left", **server.state("ann")["question"]})
        before = (tmp_path / "answers.jsonl").read_bytes()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("prefmill.images.answers.os.fsync", _full)
            with pytest.raises(RefusalError, match="could not be kept: No space left"):
                server.act("answer", "ann", {"number": 1, "choice": "left", **server.state("ann")["question"]})
        assert (tmp_path / "answers.jsonl").read_bytes() == before
        shown = server.state("ann")["question"]
        assert server.act("answer", "ann", {"number": 1, "choice": "tie", **shown})["number"] == 2
    book.close()


def test_a_page_outlives_a_status_that_cannot_be_written(
    tmp_path: Path, images: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The answer is kept and the last one ends the stage, though the disk has no room for the progress."""
    monkeypatch.setattr("prefmill.core.stage.write_record", _full)
    with asking(tmp_path, images, dimensions=["overall"]) as people:
        for _ in range(3):
            state = people.act("answer", "ann", choice="left")
        assert state["closed"]
        assert people.wait() == 0
    assert len(ratings(people.task)) == 3


def _quarantine() -> Any:
    from prefmill.images.collection import Quarantine

    return Quarantine()


def _full(*_: Any) -> None:
    raise OSError(28, "No space left on device")
