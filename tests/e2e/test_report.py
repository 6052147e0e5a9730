"""report: what the page says, that it is the same every time, and that it only shows what others wrote."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import started
from evaluation_artifacts import make_corpus, make_evaluation, make_task, make_training
from page_checks import browse, inner_width, opens_cleanly, requested

from prefmill.checklist.items import load_checklist
from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.errors import ArtifactError, InputError
from prefmill.core.places import RUN_RECORD
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import write_jsonl
from stages.report import ReportConfig, run

HOSTILE = '</p><script>document.title="owned"</script>"><img src=x onerror="document.title=\'owned\'"><style>*{}</style>{{ 7*7 }}'  # noqa: E501
FACTORS = {"human": (2, 9), "base": (0, 7), "sft": (3, 9), "dpo": (6, 11)}
Inputs = dict[str, list[Artifact]]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Everything a report can be given: models that differ by a known number of quality factors."""
    workspace = tmp_path_factory.mktemp("workspace")
    corpus = make_corpus(workspace, 90)
    evaluations = [make_evaluation(workspace, corpus, model, factors) for model, factors in FACTORS.items()]
    return {"evaluations": evaluations, "corpus": [corpus], **make_training(workspace, corpus)}


@pytest.fixture(scope="module")
def hostile_inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    """Reviews, titles and evidence that try to run."""
    workspace = tmp_path_factory.mktemp("hostile")
    corpus = make_corpus(workspace, 18, title=f"Title {HOSTILE}")
    models = ("base", "sft", "dpo")
    evaluations = [make_evaluation(workspace, corpus, model, FACTORS[model], f"{HOSTILE} ") for model in models]
    return {"evaluations": evaluations, "corpus": [corpus]}


def write_report(inputs: Inputs, root: Path, **config: Any) -> tuple[str, dict[str, Any]]:
    output = root / "data" / "run" / "report" / "all"
    run(ReportConfig(**{"num_resamples": 2000, **config}), make_task("report", output, inputs))
    assert sorted(path.name for path in output.iterdir()) == ["comparison.json", "report.html", "report.md"]
    return (output / "report.html").read_text(), json.loads((output / "comparison.json").read_text())


def text_of(html: str) -> str:
    """What a reader sees, scripts and styles included if they were elements."""
    parts: list[str] = []
    parser = HTMLParser()
    parser.handle_data = parts.append  # type: ignore[method-assign]
    parser.feed(re.sub(r"<style>.*?</style>", "", html, count=1, flags=re.DOTALL))
    return " ".join(" ".join(parts).split())


def test_a_known_effect_is_reported_with_its_interval(inputs: Inputs, tmp_path: Path) -> None:
    html, comparison = write_report(inputs, tmp_path)
    (clean,) = comparison["modalities"]
    pairs = {(pair["baseline"], pair["candidate"]): pair["measures"] for pair in clean["pairs"]}
    assert set(pairs) == {("base", "sft"), ("base", "dpo"), ("sft", "dpo")}
    factors = pairs["base", "dpo"]["num_factors"]
    assert factors["low"] < 8.5 - 3.5 < factors["high"]  # the means of 6..11 and 0..7
    assert pairs["base", "dpo"]["checkmark_score"]["p_holm"] < 0.01
    page = text_of(html)
    assert (
        "Yes: on held-out papers, the dpo model's reviews satisfy more checklist items than the base model's." in page
    )
    assert f"(+{pairs['base', 'dpo']['checkmark_score']['low']:.2f} to" in page
    assert "quality factors, which the checklist does not know, agree" in page
    assert "The lexical engine looks for words, not for meaning" in page


def test_every_section_has_its_content(inputs: Inputs, tmp_path: Path) -> None:
    html, _ = write_report(inputs, tmp_path)
    for section in ("models", "doubts", "checklist", "factors", "length", "examples", "training", "data", "lineage"):
        assert f'<section id="{section}">' in html
    page = text_of(html)
    assert html.count('class="example"') == 6
    assert "Margins in the last epoch" in page
    assert "87% of" in page or re.search(r"\d+% of 120 above zero", page)  # 4 pairs for each of 30 steps
    assert "dashed: ln 2" in page
    assert re.search(r"length bias (passed|warned)", page)
    for artifacts in inputs.values():
        for artifact in artifacts:
            assert artifact.manifest.content_digest in html
    assert '"learning_rate": 1e-05' in page
    assert "were not given" not in page


def test_the_same_inputs_give_the_same_bytes_wherever_they_are(inputs: Inputs, tmp_path: Path) -> None:
    first = write_report(inputs, tmp_path / "first")
    moved = inputs["evaluations"][0].path.parents[3]
    copy = tmp_path / "copy"
    shutil.copytree(moved, copy)
    elsewhere = {
        name: [Artifact(copy / item.path.relative_to(moved), item.manifest) for item in items]
        for name, items in inputs.items()
    }
    for item in elsewhere["evaluations"]:  # what a run cost differs from run to run, and is no content
        (item.path / RUN_RECORD).write_text(json.dumps({"seconds": 12.5, "peak_memory_gb": 0.5}))
    shuffled = {name: items[::-1] for name, items in elsewhere.items()}
    second, numbers = write_report(shuffled, tmp_path / "second")
    assert without_cost(second) == without_cost(first[0])
    assert second != first[0]
    assert numbers == first[1]
    same = [write_report(given, tmp_path / f"{n}", show_cost=False)[0] for n, given in enumerate((inputs, shuffled))]
    assert same[0] == same[1]
    assert 'id="cost"' not in same[0]
    assert str(tmp_path) not in first[0]
    assert str(moved) not in first[0]


def without_cost(html: str) -> str:
    return re.sub(r'<section id="cost">.*?</section>', "", html, flags=re.DOTALL)


def write_attempts(artifact: Artifact, rows: Sequence[dict[str, Any]]) -> None:
    """As the worker logs them."""
    logs = artifact.path.parents[3] / "logs" / "run" / artifact.path.parent.name / artifact.path.name
    common = {"node": "n3", "first_step": None, "last_step": None, "progressed": True}
    write_jsonl(logs / "attempts.jsonl", [common | row for row in rows])


def test_cost_and_failures_are_printed_and_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A training on 8 GPUs that was warned after half an hour and then took another, and what had failed before."""
    corpus = make_corpus(tmp_path, 24)
    inputs = {
        "evaluations": [make_evaluation(tmp_path, corpus, model, FACTORS[model]) for model in ("base", "dpo")],
        **make_training(tmp_path, corpus),
    }
    (inputs["datasets"][0].path / RUN_RECORD).write_text(json.dumps({"seconds": 4321.0, "peak_memory_gb": 1.25}))
    rows = [
        {"gpus": 8, "started": 0.0, "ended": 60.0, "outcome": "failed", "kind": "OutOfMemoryError"},
        {"gpus": 8, "started": 100.0, "ended": 1900.0, "outcome": "requeued", "signal": "SIGUSR1", "last_step": 40},
        {"gpus": 8, "started": 2000.0, "ended": 3740.0, "outcome": "complete"},
    ]
    write_attempts(inputs["dpo"][0], rows)
    decided = {
        "task": "dpo:clean",
        "element": "dpo:clean",
        "action": "retry",
        "kind": "gpu",
        "reason": f"Xid {HOSTILE}",
    }
    folder = tmp_path / "logs" / "run" / "submissions"
    write_jsonl(folder / "decisions.jsonl", [{"time": 1.0, **decided, "why": "retry 1 of 3"}])
    html, _ = write_report(inputs, tmp_path)
    assert re.search(r"build_datasets:all +4321\.0 s +1\.25 GB", capsys.readouterr().out)
    page = text_of(html[html.index('<section id="cost">') :])
    assert (
        "2 tasks took 2:12:01 of work and 8.00 GPU-hours, attempts that failed included. 2 attempts ended early."
        in page
    )
    assert "dpo:clean: failed (OutOfMemoryError), 0:01:00 on n3" in page
    assert "dpo:clean: requeued (SIGUSR1) after step 40, 0:30:00 on n3" in page
    assert "dpo:clean retry gpu Xid </p><script>" in page
    assert "retry 1 of 3" in page
    assert "dpo:clean 3 1:00:00 8.00" in page
    assert "build_datasets:all 1 1:12:01 0.00 1.25" in page
    assert "<script>" not in html
    assert re.search(r"What \d other tasks took is not recorded here", page)


def test_curves_that_were_not_logged_are_said_to_be_missing(inputs: Inputs, tmp_path: Path) -> None:
    bare = tmp_path / "checkpoints" / "run" / "sft" / "clean"
    shutil.copytree(inputs["sft"][0].path, bare)
    html, _ = write_report({**inputs, "sft": [Artifact(bare, inputs["sft"][0].manifest)]}, tmp_path)
    assert "There is no curve of sft:clean: its logs hold no steps.jsonl" in text_of(html)


def test_what_was_not_given_is_named(inputs: Inputs, tmp_path: Path) -> None:
    html, _ = write_report({"evaluations": inputs["evaluations"][1:2]}, tmp_path)
    page = text_of(html)
    assert "Nothing to compare: only base was evaluated." in page
    assert "This page does without the corpus" in page
    assert "No trained checkpoint was given" in page
    assert "No manifest was found here for" not in page  # the corpus is in the evaluation's workspace


def test_training_data_scored_with_another_checklist_are_a_doubt(inputs: Inputs, tmp_path: Path) -> None:
    doubt = "The training data were scored with another checklist than these reviews."
    html, _ = write_report(inputs, tmp_path / "same")
    assert doubt not in text_of(html)
    corpus = make_corpus(tmp_path, 90)
    shipped = load_checklist()
    shorter = shipped.model_copy(update={"items": shipped.items[:-1]})
    trained = make_training(tmp_path, corpus, shorter)
    evaluations = [make_evaluation(tmp_path, corpus, model, FACTORS[model]) for model in ("base", "dpo")]
    html, _ = write_report({"evaluations": evaluations, **trained}, tmp_path)
    assert doubt in text_of(html)


def test_models_that_do_not_differ_are_not_said_to(tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, 90)
    models = {"base": (2, 9), "dpo": (2, 9)}
    evaluations = [make_evaluation(tmp_path, corpus, model, factors) for model, factors in models.items()]
    html, _ = write_report({"evaluations": evaluations}, tmp_path)
    assert "Not shown: reviews by dpo and by base do not differ beyond chance." in text_of(html)


def test_evaluations_by_engines_with_other_settings_are_refused(inputs: Inputs, tmp_path: Path) -> None:
    first, second = inputs["evaluations"][1:3]
    identity = {"config": {"engine": {"engine": "lexical", "evidence": False}}}
    other = Artifact(second.path, second.manifest.model_copy(update={"identity": identity}))
    with pytest.raises(InputError, match="engines with different settings"):
        write_report({"evaluations": [first, other]}, tmp_path)


def test_an_evaluation_without_its_metrics_is_refused(inputs: Inputs, tmp_path: Path) -> None:
    shutil.copytree(inputs["evaluations"][0].path, tmp_path / "torn")
    (tmp_path / "torn" / "metrics.json").unlink()
    torn = publish(tmp_path / "torn", "evaluation", _provenance(inputs["evaluations"][0]), {})
    with pytest.raises(ArtifactError, match=r"has no file 'metrics\.json'"):
        write_report({"evaluations": [torn]}, tmp_path)


def _provenance(artifact: Artifact) -> Provenance:
    return Provenance(*[getattr(artifact.manifest, field.name) for field in fields(Provenance)])


class Elements(HTMLParser):
    """Names and attributes of all elements."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: Sequence[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


def test_hostile_text_is_shown_and_no_element(hostile_inputs: Inputs, tmp_path: Path) -> None:
    html, _ = write_report(hostile_inputs, tmp_path, title=f"Run {HOSTILE}")
    parser = Elements()
    parser.feed(html)
    names = [tag for tag, _ in parser.found]
    assert "script" not in names
    assert "img" not in names
    assert names.count("style") == 1
    attributes = {name for _, attrs in parser.found for name in attrs}
    assert not [name for name in attributes if name.startswith("on")]
    assert "{{ 7*7 }}" in text_of(html)  # not read as a template either
    assert text_of(html).count('<img src=x onerror="document.title=') > 18


def test_nothing_outside_the_file_is_named(inputs: Inputs, tmp_path: Path) -> None:
    html, _ = write_report(inputs, tmp_path)
    parser = Elements()
    parser.feed(html)
    links = [attrs[key] for _, attrs in parser.found for key in ("href", "src", "action", "data") if key in attrs]
    assert [link for link in links if link and not link.startswith("#") and link != "data:,"] == []
    assert "url(" not in html
    assert "@import" not in html
    policy = next(attrs["content"] for tag, attrs in parser.found if attrs.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:")


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("which", ["plain", "hostile"])
def test_in_a_browser_nothing_fails_nothing_is_fetched_and_nothing_overflows(
    chromium: str, inputs: Inputs, hostile_inputs: Inputs, tmp_path: Path, which: str, width: int
) -> None:
    html, _ = write_report(inputs if which == "plain" else hostile_inputs, tmp_path)
    opens_cleanly(chromium, tmp_path, html, width)


@pytest.mark.slow
def test_the_browser_checks_can_fail(chromium: str, tmp_path: Path) -> None:
    """The control: a page that runs a script and fetches something is seen doing it."""
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><script>console.error('ran')</script><img src='http://127.0.0.1:9/x.png'>"
        "<div style='width:3000px'>wide</div>"
    )
    log = tmp_path / "net.json"
    done = browse(chromium, page, f"--log-net-log={log}", f"--screenshot={tmp_path / 'page.png'}")
    assert "CONSOLE" in done.stderr
    assert "http://127.0.0.1:9/x.png" in requested(log)
    assert inner_width(chromium, tmp_path, page.read_text(), 390) >= 3000
    with started(chromium, tmp_path / "tabs") as browser, browser.tab() as tab:
        tab.open(page.as_uri())
        tab.wait("document.readyState == 'complete'")
        assert any(fault.startswith("image-alt") for fault in tab.accessibility_faults())


def test_the_markdown_says_what_the_page_says(hostile_inputs: Inputs, tmp_path: Path) -> None:
    html, comparison = write_report(hostile_inputs, tmp_path)
    markdown = (tmp_path / "data" / "run" / "report" / "all" / "report.md").read_text()
    scores = [item["measures"]["checkmark_score"]["value"] for item in comparison["modalities"][0]["models"]]
    (row,) = [line for line in markdown.splitlines() if line.startswith("| Checklist score")]
    assert [cell.split()[0] for cell in row.split("|")[2:-1]] == [f"{score:.2f}" for score in scores]
    assert markdown.splitlines()[4].strip("*") in text_of(html)
    assert not re.search(r"(?<!\\)<", markdown)
