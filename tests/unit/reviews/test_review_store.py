"""The store makes papers of rows: unique ids, contradictions found, decisions brought home, one paper a title."""

from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefmill.core.records import Decision
from prefmill.reviews.rows import DecisionRow, DeletedRow, PaperRow, Place, ReviewRow, RowError, RowProblem
from prefmill.reviews.store import CorpusStore, StoredReview
from prefmill.reviews.versions import are_two_venues


@pytest.fixture
def store(tmp_path: Path) -> Iterator[CorpusStore]:
    with CorpusStore(tmp_path / "corpus.sqlite") as opened:
        yield opened


def at(line: int, file: str = "/data/a.jsonl") -> Place:
    return Place(0, file, line)


def review(identifier: str, paper_id: str, **values: Any) -> ReviewRow:
    return ReviewRow(
        identifier, paper_id, values.pop("text", f"Good {identifier}."), values.pop("rating", 6.0), **values
    )


def written(row: ReviewRow) -> dict[str, Any]:
    """The row of a corpus: a scale of 1 to 10 is not written."""
    return {name: value for name, value in msgspec.structs.asdict(row).items() if name not in ("scale", "date")}


def read(stored: StoredReview) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(stored.json)
    return row


def contents(store: CorpusStore) -> dict[str, list[str]]:
    papers = [paper.paper_id for _, paper, _ in store.papers()]
    found = {paper_id: [read(row)["review_id"] for row in rows] for paper_id, rows in store.reviews_by_paper()}
    return {paper_id: found.get(paper_id, []) for paper_id in papers}


def test_rows_come_out_whole_and_in_order_of_their_ids(store: CorpusStore) -> None:
    paper = PaperRow("b", "Title B", "Abstract", "Text", "accepted", "V", True)
    row = ReviewRow("r2", "b", "Text\nof review", 7.5, 3.0, "V", {"soundness": 3.0})
    for line, item in enumerate((paper, row, review("r1", "b"), PaperRow("B", "Other"), review("r0", "B")), 1):
        store.add(at(line), item)
    assert list(store.link()) == []
    assert list(store.papers()) == [(at(4), PaperRow("B", "Other"), "other"), (at(1), paper, "title b")]
    assert list(map(read, dict(store.reviews_by_paper())["b"])) == [written(review("r1", "b")), written(row)]


def test_a_repeated_review_id_names_the_earlier_line(store: CorpusStore) -> None:
    store.add(at(1), PaperRow("a", "A"))
    store.add(at(1), review("r1", "a"))
    with pytest.raises(RowError, match=r"another review with the id r1 is at a\.jsonl:1$"):
        store.add(at(7), review("r1", "a", venue="W"))
    store.add(at(8), review("r1", "a"))
    assert store.num_repeated == 1
    # As of a column that numbers the reviews of each paper, or names the reviewer: the rows are no repetition.
    with pytest.raises(RowError) as refused:
        store.add(at(9), review("r1", "b"))
    assert "leave review_id out" in refused.value.fix


def test_rows_of_a_paper_complete_each_other(store: CorpusStore) -> None:
    store.add(at(1), PaperRow("a", "A study", decision="accepted"))
    store.add(at(2), PaperRow("a", "a study!", abstract="On it.", venue="V"))
    ((_, paper, _),) = store.papers()
    assert paper == PaperRow("a", "A study", "On it.", "", "accepted", "V")


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (PaperRow("a", "Another"), "title"),
        (PaperRow("a", "A", abstract="y"), "abstract"),
        (PaperRow("a", "A", text="y"), "text"),
        (PaperRow("a", "A", decision="rejected"), "decision"),
        (PaperRow("a", "B", venue="W"), "title and venue"),
    ],
)
def test_rows_of_a_paper_that_disagree_are_refused(store: CorpusStore, other: PaperRow, field: str) -> None:
    store.add(at(4), PaperRow("a", "A", "x", "x", "accepted", "V"))
    with pytest.raises(RowError, match=rf"paper a has another {field} at a\.jsonl:4"):
        store.add(at(9), other)


def test_decisions_come_home_and_orphans_are_problems(store: CorpusStore) -> None:
    store.add(at(1), DecisionRow("a", "accepted"))
    store.add(at(2), review("r1", "a"))
    store.add(at(3), PaperRow("a", "A"))
    store.add(at(4), review("r2", "lost"))
    store.add(at(5), DecisionRow("gone", "rejected"))
    problems = list(store.link())
    assert [(problem.place.line, problem.reason.split(",")[0]) for problem in problems] == [
        (4, "review of paper lost"),
        (5, "decision of paper gone"),
    ]
    assert [paper.decision for _, paper, _ in store.papers()] == ["accepted"]
    assert contents(store) == {"a": ["r1"]}


def test_the_surest_decision_holds(store: CorpusStore) -> None:
    """What a submission's own fields say, then a decision's note, then the venue's group, then a meta-review."""
    for paper, decision in (("a", None), ("b", None), ("c", "withdrawn")):
        store.add(at(1), PaperRow(paper, f"Title {paper}", decision=decision))
        store.add(at(2), review(f"r{paper}", paper))
        store.add(at(3), DecisionRow(paper, "accepted", rank=1))
        store.add(at(4), DecisionRow(paper, "rejected", rank=0))
    store.add(at(5), DecisionRow("b", "rejected"))
    assert list(store.link()) == []
    assert [paper.decision for _, paper, _ in store.papers()] == ["accepted", "rejected", "withdrawn"]


def test_decisions_that_contradict_are_refused_but_a_withdrawal_stands(store: CorpusStore) -> None:
    store.add(at(1), DecisionRow("a", "accepted"))
    store.add(at(2), DecisionRow("a", "accepted"))
    store.add(at(3), DecisionRow("a", "rejected"))
    store.add(at(4), DecisionRow("a", "withdrawn"))
    store.add(at(5), DecisionRow("a", "accepted"))
    store.add(at(6), PaperRow("a", "A"))
    (problem,) = store.link()
    assert problem.place == at(3)
    assert problem.reason == "decision 'rejected', but 'accepted' for the same paper at a.jsonl:1"
    assert [paper.decision for _, paper, _ in store.papers()] == ["withdrawn"]


@pytest.mark.parametrize("deleted", [("new", "rejected"), ("withdrawal", "withdrawn")])
def test_a_decision_that_was_deleted_gives_way_to_the_one_before(
    store: CorpusStore, deleted: tuple[str, Decision]
) -> None:
    note, decision = deleted
    store.add(at(1), DeletedRow(note, 9))
    store.add(at(2), DecisionRow("a", "accepted", date=1, note_id="old"))
    store.add(at(3), DecisionRow("a", decision, date=3, note_id=note))
    store.add(at(4), PaperRow("a", "A"))
    store.drop_deleted()
    assert list(store.link()) == []
    assert [paper.decision for _, paper, _ in store.papers()] == ["accepted"]
    assert store.num_deleted == 1


def test_the_newest_version_counts_whatever_the_order(tmp_path: Path) -> None:
    versions = [
        (
            PaperRow("a", f"Title {n}", decision=decision, date=n),
            DecisionRow("b", word, date=n),
            review("r", "a", date=n, confidence=n),
        )
        for n, decision, word in ((1, "withdrawn", "accepted"), (2, None, "accepted"), (3, None, "rejected"))
    ]
    for number, order in enumerate(itertools.permutations(versions)):
        with CorpusStore(tmp_path / f"{number}.sqlite") as store:
            store.add(at(1), PaperRow("b", "B"))
            store.add(at(1), review("s", "b"))
            for items in order:
                for item in items:
                    store.add(at(2), item)
            assert list(store.link()) == []
            assert [(paper.title, paper.decision) for _, paper, _ in store.papers()] == [
                ("Title 3", None), ("B", "rejected"),
            ]  # fmt: skip
            (found,) = dict(store.reviews_by_paper())["a"]
            assert read(found) == written(review("r", "a", confidence=3)) | {"confidence": 3}
            assert store.num_older >= 4
            assert store.num_repeated == 0


def test_versions_without_a_date_that_tells_are_refused(store: CorpusStore) -> None:
    store.add(at(1), review("r", "a", date=5))
    store.add(at(2), review("r", "a", date=7))  # the same words again
    for date in (7, msgspec.UNSET):
        with pytest.raises(RowError, match=r"another review with the id r is at a\.jsonl:2"):
            store.add(at(3), review("r", "a", date=date, confidence=1))
    assert (store.num_repeated, store.num_older) == (1, 0)


def test_what_is_deleted_later_is_left_out_and_what_is_restored_stays(store: CorpusStore) -> None:
    for paper_id in ("a", "gone", "lost"):
        store.add(at(1), review(f"r-{paper_id}", paper_id, date=2))
    for identifier in ("deleted", "restored"):
        store.add(at(1), review(identifier, "a", date=2))
    store.add(at(2), PaperRow("a", "A"))
    store.add(at(2), PaperRow("gone", "Gone", date=2))
    for name, date in (("deleted", 3), ("deleted", 1), ("restored", 1), ("gone", None)):
        store.add(at(3), DeletedRow(name, date))
    store.drop_deleted()
    assert store.num_deleted == 2
    assert store.drop_orphans(all_of_them=False) == {"gone": 1}
    assert [problem.reason for problem in store.link()] == ["review of paper lost, which is not in the sources"]
    assert store.drop_orphans(all_of_them=True) == {"lost": 1}
    assert contents(store) == {"a": ["r-a", "restored"]}


def test_papers_without_reviews_are_dropped(store: CorpusStore) -> None:
    store.add(at(1), PaperRow("a", "A"))
    store.add(at(2), PaperRow("b", "B"))
    store.add(at(2), review("r", "b"))
    assert list(store.link()) == []
    assert store.drop_unreviewed() == 1
    assert contents(store) == {"b": ["r"]}


def test_one_title_is_one_paper_under_the_smallest_id(store: CorpusStore) -> None:
    rows = [("c", "Deep Nets"), ("a", "deep nets!"), ("b", "Deep  Nets"), ("d", "Deep nets 2")]
    for line, (paper_id, title) in enumerate(rows, 1):
        store.add(at(line), PaperRow(paper_id, title, abstract="" if paper_id == "a" else f"abstract {paper_id}"))
        store.add(at(line), review(f"r-{paper_id}", paper_id))
    assert list(store.link()) == []
    assert store.merge_titles() == [("b", "a"), ("c", "a")]
    assert contents(store) == {"a": ["r-a", "r-b", "r-c"], "d": ["r-d"]}
    assert [paper.abstract for _, paper, _ in store.papers()] == ["abstract b", "abstract d"]
    assert [store.find_title(name, "") for name in ("a", "b", "c", "d")] == [*["deep nets"] * 3, "deep nets 2"]
    assert [store.find_title("?", key) for key in ("deep nets", "other")] == ["deep nets", None]


def test_an_accepted_and_a_rejected_paper_of_one_title_stay_two(store: CorpusStore) -> None:
    """A resubmission: the reviews of the version that was accepted were those of a rejected paper."""
    fates: list[tuple[str, Any]] = [
        ("a", "rejected"), ("b", "accepted"), ("c", None), ("d", "accepted"), ("e", "withdrawn"),
    ]  # fmt: skip
    for line, (paper_id, fate) in enumerate(fates, 1):
        store.add(at(line), PaperRow(paper_id, "Deep Nets", decision=fate))
        store.add(at(line), review(f"r-{paper_id}", paper_id))
    assert list(store.link()) == []
    assert store.merge_titles() == [("c", "a"), ("e", "a"), ("d", "b")]
    assert contents(store) == {"a": ["r-a", "r-c", "r-e"], "b": ["r-b", "r-d"]}
    assert [paper.decision for _, paper, _ in store.papers()] == ["rejected", "accepted"]
    assert store.num_apart == 1


def test_versions_of_two_venues_with_one_fate_stay_two_where_their_abstracts_differ(store: CorpusStore) -> None:
    """The reviews of the second stood under the first one's abstract, and made pairs with its reviews."""
    versions = [("a", "V 2023", "Old."), ("b", "V 2024", "New."), ("c", "V  2024", " new. "), ("d", "V.cc/2023", "Cut")]
    for line, (paper_id, venue, abstract) in enumerate(versions, 1):
        store.add(at(line), PaperRow(paper_id, "Deep Nets", abstract, decision="accepted", venue=venue))
        store.add(at(line), review(f"r-{paper_id}", paper_id))
    assert list(store.link()) == []
    assert store.merge_titles() == [("d", "a"), ("c", "b")]
    assert contents(store) == {"a": ["r-a", "r-d"], "b": ["r-b", "r-c"]}
    assert store.num_apart == 1


@pytest.mark.parametrize(
    ("one", "two", "expected"),
    [
        ("ICLR.cc/2017/conference", "iclr_2017", False),
        ("Submitted to ICLR 2023", "ICLR 2023 poster", False),
        ("ICLR 2023", "", False),
        ("ICLR.cc/2023/Conference", "ICLR.cc/2024/Conference", True),
        ("NeurIPS.cc/2024/Conference", "ICLR.cc/2024/Conference", True),
        ("TMLR", "ICLR 2024", True),
    ],
)
def test_a_venue_is_known_by_its_year_and_acronym(one: str, two: str, expected: bool) -> None:
    """A name that two dumps of one venue spell differently kept its papers apart, and counted their reviews twice."""
    assert are_two_venues(one, two) is are_two_venues(two, one) is expected


def test_a_review_that_two_dumps_name_differently_counts_once(store: CorpusStore) -> None:
    """Each pair of such a paper was trained four times, and still was where both name the paper alike."""
    for name, paper_id in (("a", "a"), ("z", "z"), ("m", "m"), ("n", "m")):
        store.add(at(1), PaperRow(paper_id, "Other Nets" if paper_id == "m" else "Deep Nets"))
        for number in (1, 2):
            store.add(at(1), review(f"{name}{number}", paper_id, text=f'Review "{number}".'))
    others = {"rating": {"rating": 7.0}, "words": {"text": 'Review "1"."text":'}, "both": {"confidence": 2.0}}
    for name, fields in others.items():
        store.add(at(2), review(name, "m", **{"text": 'Review "1".', **fields}))
    assert list(store.link()) == []
    store.merge_titles()
    assert contents(store) == {"a": ["a1", "a2"], "m": ["both", "m2", "rating", "words"]}
    assert store.num_repeated == 5


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3)), max_size=25))
def test_no_review_is_lost_and_titles_are_unique_whatever_the_order(rows: list[tuple[int, int]]) -> None:
    titles = dict(rows)  # a paper's id decides its title
    with CorpusStore(Path(":memory:")) as store:
        for line, (paper_id, _) in enumerate(rows, 1):
            store.add(at(line), PaperRow(f"p{paper_id}", f"Title {titles[paper_id]}"))
            store.add(at(line), review(f"r{line}", f"p{paper_id}"))
        assert list(store.link()) == []
        merged = store.merge_titles()
        found = contents(store)
    assert sorted(name for names in found.values() for name in names) == sorted(
        f"r{n}" for n in range(1, len(rows) + 1)
    )
    assert len(found) == len(set(titles.values()))
    assert len(found) + len(merged) == len(titles)
    assert all(min(group) in found for group in _by_title(titles))


def _by_title(titles: dict[int, int]) -> list[list[str]]:
    return [[f"p{paper}" for paper, title in titles.items() if title == wanted] for wanted in set(titles.values())]


def test_problems_are_kept_in_order(store: CorpusStore) -> None:
    problems = [RowProblem(Place(1, "/x/b.json", None, f"note {index}"), "why", "how", "row") for index in range(3)]
    for problem in problems:
        store.add_problem(problem)
    assert list(store.problems()) == problems
    assert store.count("problems") == 3


def test_what_an_interrupted_run_left_is_discarded(tmp_path: Path) -> None:
    for _ in range(2):
        with CorpusStore(tmp_path / "corpus.sqlite") as store:
            store.add(at(1), PaperRow("a", "A"))
            assert store.count("papers") == 1


def test_a_full_disk_is_said_to_be_one(tmp_path: Path) -> None:
    def fill() -> None:
        with CorpusStore(tmp_path / "corpus.sqlite") as store:
            store._database.execute("PRAGMA max_page_count = 20")  # SQLite then says what it says of a full disk
            for line in range(10_000):
                store.add(at(line), ReviewRow(f"r{line}", "a", "long text " * 100, 5.0))

    with pytest.raises(OSError, match="No space left") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC
    assert "corpus.sqlite" in str(caught.value.filename)
