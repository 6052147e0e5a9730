"""Forms in which venues publish: ARR's commitments, workshops, EasyChair's cells, sheets and XML; and who is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas
import pytest
from read_sources import ROW, items_of, read, source, write

from prefmill.core.errors import InputError
from prefmill.reviews.openreview_forms import says_nothing
from prefmill.reviews.rows import PaperRow, Place, ReviewRow, Skipped, Unknown, excerpt
from prefmill.reviews.store import CorpusStore

ARR, ACL = "aclweb.org/ACL/ARR/2024/February", "aclweb.org/ACL/2024/Conference"


def note(identifier: str, forum: str, group: str, kind: str, **content: Any) -> dict[str, Any]:
    return {"id": identifier, "forum": forum, "domain": group, "invitations": [f"{group}/{kind}"],
            "content": {name: {"value": value} for name, value in content.items()}}  # fmt: skip


def committed(identifier: str, decision: str) -> list[dict[str, Any]]:
    """As ACL's venues have it: a note that links to the paper in ARR, and a decision of its own, another title."""
    link = "https://openreview.net/forum?id=reviewed1&referrer=%5BTasks%5D"
    paper = note(identifier, identifier, ACL, "-/Submission", title="Retitled", paper_link=link, venueid=f"{ACL}/X")
    return [paper, note(f"d-{identifier}", identifier, ACL, "Submission5/-/Decision", decision=decision)]


ARR_NOTES = [
    note("reviewed1", "reviewed1", ARR, "-/Submission", title="A paper", venueid=f"{ARR}/Submission"),
    note("r1", "reviewed1", ARR, "Submission12/-/Official_Review", paper_summary="Sums.", overall_assessment=3.5,
         ethical_concerns="There are no concerns with this submission", confidence=4, soundness=3),
]  # fmt: skip


@pytest.mark.parametrize(
    ("decisions", "stands"),
    [
        (["Accept to Findings"], "accepted"),
        (["Reject"], "rejected"),
        (["Reject", "Accept to Main"], "accepted"),
        ([], None),
    ],
)
def test_a_committed_papers_decision_is_that_of_the_paper_that_was_reviewed(
    tmp_path: Path, decisions: list[str], stands: str | None
) -> None:
    notes = [*ARR_NOTES, *(note for n, word in enumerate(decisions) for note in committed(f"a{n}", word))]
    path = write(tmp_path / "notes.json", notes)
    with CorpusStore(tmp_path / "x.sqlite") as store:
        for item in items_of(source(format="openreview_v2", path=path, preset="arr", id_prefix="x-")):
            if isinstance(item, (PaperRow, ReviewRow)) or type(item).__name__ == "DecisionRow":
                store.add(Place(0, "notes.json"), item)
        assert list(store.link()) == []
        assert store.drop_unreviewed() == len(decisions)
        ((_, paper, key),) = store.papers()
        assert (paper.paper_id, paper.title, paper.decision) == ("x-reviewed1", "A paper", stands)
        # A list of test papers may name either.
        assert [store.find_title(f"x-a{n}", "") for n in range(len(decisions))] == [key] * len(decisions)


def test_sections_that_only_say_that_there_is_no_concern_are_left_out(tmp_path: Path) -> None:
    path = write(tmp_path / "notes.json", ARR_NOTES)
    *_, review, _ = items_of(source(format="openreview_v2", path=path, preset="arr"))
    assert isinstance(review, ReviewRow)
    assert (review.text, review.rating, review.confidence) == ("Sums.", 3.5, 4.0)
    assert says_nothing("No paper formatting concerns.")
    assert not says_nothing("No concerns about the proofs")


@pytest.mark.parametrize(
    ("group", "venue"),
    [
        ("NeurIPS.cc/2023/Conference", "NeurIPS 2023"),
        ("ICLR.cc/2017/conference", "ICLR 2017"),
        ("NeurIPS.cc/2023/Workshop/XAIA", "NeurIPS.cc/2023/Workshop/XAIA"),
        ("NeurIPS.cc/2023/Track/Datasets_and_Benchmarks", "NeurIPS.cc/2023/Track/Datasets_and_Benchmarks"),
    ],
)
def test_a_workshop_is_a_venue_of_its_own(tmp_path: Path, group: str, venue: str) -> None:
    notes = [
        note("p", "p", group, "-/Submission", title="A paper"),
        note("r", "p", group, "Submission1/-/Official_Review", review="Fine.", rating=6),
    ]
    items = items_of(source(format="openreview_v2", path=write(tmp_path / "notes.json", notes)))
    assert [item.venue for item in items if isinstance(item, (PaperRow, ReviewRow))] == [venue] * 2


def test_icmls_reviews_are_on_their_scale(tmp_path: Path) -> None:
    review = note("r", "p", "ICML.cc/2025/Conference", "Submission1/-/Official_Review", summary="Fine.",
                  overall_recommendation=4, code_of_conduct="Affirmed.", claims_and_evidence="Yes, all.")  # fmt: skip
    (found,) = items_of(source(format="openreview_v2", path=write(tmp_path / "x.json", [review]), preset="icml_2025"))
    assert isinstance(found, ReviewRow)
    assert (found.rating, found.scale, found.venue) == (4.0, (1.0, 5.0), "ICML 2025")


def test_icml_2026_has_six_ratings_and_policies_that_are_no_sections(tmp_path: Path) -> None:
    """By its form: `Affirmed.` stood at the end of each review, as a section that a model learns to write."""
    content: dict[str, Any] = {
        "summary": "Sums.", "strengths_and_weaknesses": "Strong.", "soundness": "3: good", "significance": "2: fair",
        "key_questions_for_authors": "Why?", "limitations": "Yes", "overall_recommendation": "6: Strong accept",
        "confidence": 4, "compliance_with_LLM_reviewing_policy": "Affirmed.", "code_of_conduct_acknowledgement":
        "Affirmed.", "ethical_review_flag": "Flag this paper.", "ethics_expertise_needed": ["Privacy"],
    }  # fmt: skip
    review = note("r", "p", "ICML.cc/2026/Conference", "Submission1/-/Official_Review", **content)
    found, *left_out = items_of(
        source(format="openreview_v2", path=write(tmp_path / "x.json", [review]), preset="icml_2026")
    )
    assert isinstance(found, ReviewRow)
    assert (found.rating, found.scale, found.confidence) == (6.0, (1.0, 6.0), 4.0)
    assert found.sub_scores == {"significance": 2.0, "soundness": 3.0}
    assert found.text == (
        "## Summary\nSums.\n\n## Strengths and weaknesses\nStrong.\n\n## Key questions for authors\nWhy?"
    )
    assert Skipped("answer about the reviewer") in left_out


EASYCHAIR = '#,submission #,text,scores,total score,reviewer email\n7,1,Fine.,"{}",2,ann@x.org\n'
EASYCHAIR_COLUMNS = {"paper_id": "submission #", "review_id": "#", "review_text": "text", "rating": "total score",
                     "sub_scores": "scores"}  # fmt: skip


@pytest.mark.parametrize("between", ["\n", " "])
def test_easychairs_cell_of_scores_is_read(tmp_path: Path, between: str) -> None:
    cell = between.join(["Overall evaluation: 2 (accept)", "Reviewer's confidence: 4 (high)", "Novelty: -1 (poor)"])
    path = write(tmp_path / "review.csv", EASYCHAIR.format(cell + "\nBest paper: no, thanks"))
    config = source(format="csv", path=path, ignore_extra_fields=True, rating_min=-3, rating_max=3,
                    columns=EASYCHAIR_COLUMNS)  # fmt: skip
    scores = {"Novelty": -1.0, "Overall evaluation": 2.0}
    assert items_of(config) == [
        ReviewRow("7", "1", "Fine.", 2.0, 4.0, sub_scores=scores, scale=(-3.0, 3.0)),
        Unknown("sub-score that is no number", "Best paper"),
    ]


@pytest.mark.parametrize("form", ["csv", "parquet"])
def test_objects_of_sub_scores_in_tables_are_read(tmp_path: Path, form: str) -> None:
    """pandas writes them as Python's text; both were passed over in silence."""
    rows = pandas.DataFrame([{**ROW, "sub_scores": {"clarity": 3, "novelty": 2.5}}])
    path = tmp_path / f"x.{form}"
    rows.to_csv(path, index=False) if form == "csv" else rows.to_parquet(path)
    review = items_of(source(format="csv", path=path))[1]
    assert isinstance(review, ReviewRow)
    assert review.sub_scores == {"clarity": 3.0, "novelty": 2.5}
    path = write(tmp_path / "y.csv", "title,review_text,rating,sub_scores\nT,Fine.,6,good\n")
    _, (problem,) = read(source(format="csv", path=path))
    assert problem.reason == "sub_scores is not an object but str"


@pytest.mark.parametrize(
    ("beginning", "kind"),
    [
        (bytes.fromhex("d0cf11e0a1b11ae1"), "a sheet of Excel's old kind"),
        (b'\xef\xbb\xbf<?xml version="1.0"?>\n<?mso-application progid="Excel.Sheet"?>', "XML"),
        (b'<?xml version="1.0" encoding="UTF-8"?><article/>', "XML"),
        (b"\n<html><body>log in", "a web page"),
        (b"<!doctype html>", "a web page"),
    ],
)
def test_files_that_are_no_rows_are_told_by_their_kind(tmp_path: Path, beginning: bytes, kind: str) -> None:
    """CMT's .xls is XML, journals publish XML (JATS): each line of it was called bad JSON, or a row without columns."""
    (tmp_path / "reviews.xls").write_bytes(beginning + b" " * 600)
    for form in ("csv", "jsonl", "openreview_v2"):
        with pytest.raises(InputError, match=f"a file of another kind(?s:.*)got: +{kind}"):
            read(source(format=form, path=tmp_path / "reviews.xls"))


HOTCRP = "paper,title,reviewername,email,merit,Comments for authors\n1,T,Ann Smith,ann@x.org,bad,Write ann@x.org!\n"


@pytest.mark.parametrize(
    ("name", "content", "more"),
    [
        ("x.csv", HOTCRP, {"columns": {"rating": "merit", "review_text": "Comments for authors", "paper_id": "paper"}}),
        ("x.csv", HOTCRP.replace("bad,", "bad,more,"), {}),
        ("x.jsonl", '{"title": "T", "reviewer": "Ann \\"A\\" Smith", "authors": ["Ann Smith"], "rating": }', {}),
        ("x.jsonl", '{"title": "T", "last name": "Ann Smi', {}),
        ("x.json", json.dumps([{**note("p", "p", ARR, "-/Submission", authors=["Ann Smith"], title=""),
                                "signatures": ["~Ann_Smith1"]}]), {}),
    ],
)  # fmt: skip
def test_excerpts_of_faulty_rows_name_nobody(tmp_path: Path, name: str, content: str, more: dict[str, Any]) -> None:
    form = {"x.csv": "csv", "x.jsonl": "jsonl", "x.json": "openreview_v2"}[name]
    extra = {"ignore_extra_fields": True, **more}
    _, problems = read(source(format=form, path=write(tmp_path / name, content), **extra))
    assert problems
    for problem in problems:
        assert "***" in problem.excerpt
        assert not any(part in str(problem) for part in ("Smi", "ann@", "Ann_"))


def test_a_long_excerpt_is_cut() -> None:
    assert excerpt("word " * 100) == ("word " * 100)[:200] + "..."
    assert excerpt(b'{"Comments for authors": "ok"}') == '{"Comments for authors": "ok"}'
