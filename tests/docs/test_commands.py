"""Every command in the documentation is run, as it stands, in a clean copy of the repository."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path

import pytest

from prefmill.cli.main import EXAMPLES
from prefmill.core.stage import load_stage
from prefmill.reviews.generated import generate
from tests.conftest import REPOSITORY
from tests.documented_runs import DEMO, IMAGES, MDLM, DocumentedRun, shell
from tests.e2e.pipeline_runs import SMALL

PAGES = [REPOSITORY / "README.md", *sorted(REPOSITORY.glob("docs/**/*.md"))]
RUN_BY_CI = ("make demo", "make test")  # the two set-up commands: the first is measured, the second runs this
RUN_ONCE = {DEMO: "documented_demo", MDLM: "documented_mdlm", IMAGES: "documented_images"}  # for other tests too
ENDLESS = (  # ended after a second: what counts is that it starts
    "tail -f",
    "python -m stages.rate_images configs/rate_images/own_images.yaml run=",  # waits for people
)
_COMMAND = re.compile(r"(prefmill|python|make|tail|ls|cat|cp|sinfo|sacctmgr)\b")


def commands(page: Path) -> list[str]:
    """The shell commands in the fenced blocks of a page, their continued lines joined."""
    blocks = re.findall(r"^```(?:\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\\\n\s*", "", block).splitlines()]
    return [re.sub(r"\s+# .*", "", line) for line in lines if _COMMAND.match(line)]


# Tried where they can work: by tests/slurm/test_documented_commands.py, or nowhere here for want of the weights.
NEEDS_SLURM = re.compile(
    r"sinfo|sacctmgr|prefmill (submit|rehearse|advance|rerun|cancel|logs|status .*--watch|status --watch)"
)
NEEDS_WEIGHTS = ("llada-8b", "FOLDER")


def to_run() -> list[tuple[Path, str]]:
    """Every command with its page; what stands on several stages' pages, which do not build on each other, once."""
    of_help = EXAMPLES.splitlines()[-1].strip()  # the one that no page has
    found = {(PAGES[0].parent, of_help): (REPOSITORY / "docs" / "stages" / "score_reviews.md", of_help)}
    for page in PAGES:
        for command in commands(page):
            is_run_elsewhere = command.startswith(RUN_BY_CI) or NEEDS_SLURM.match(command)
            if not is_run_elsewhere and not any(word in command for word in NEEDS_WEIGHTS):
                walk = page.parent if page.parent.name == "stages" else page
                found.setdefault((walk, command), (page, command))
    return list(found.values())


FOUND = to_run()


@pytest.fixture(scope="module")
def checkout(documented_demo: DocumentedRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What git holds, with the README's demo, a finished small run called `mine` and a file of reviews."""
    copy = Path(shutil.copytree(documented_demo.checkout, tmp_path_factory.mktemp("copy") / "demo", symlinks=True))
    with gzip.open(copy / "reviews.jsonl.gz", "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in generate(7, 40))
    settings = (SMALL[0].replace("150", "300"), *SMALL[1:])  # papers enough for every split
    done = shell(copy, f"prefmill run configs/pipelines/demo.yaml run=mine {' '.join(map(quoted, settings))}")
    assert done.returncode == 0, done.stdout + done.stderr
    return copy


def quoted(word: str) -> str:
    """`word` for the shell."""
    return f"'{word}'"


def test_there_are_commands_to_run() -> None:
    assert len(FOUND) > 15


@pytest.mark.slow
def test_the_way_of_a_row_is_the_one_a_run_took(checkout: Path) -> None:
    """Every file of the table lies in the run `mine`, in the artifact it is said to be of, and its stages are drawn."""
    page = (REPOSITORY / "docs" / "row-flow.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)` \| `([^`]+)` \|", page, re.MULTILINE)
    assert len(rows) > 6
    for name, kind, file in rows:
        stage = load_stage(name)
        assert stage.writes == kind
        assert list((checkout / stage.root / "mine" / name).glob(f"*/{file}")), f"{name} wrote no {file}"
        assert f"-- {file} -->" in page
    drawn = set(re.findall(r"^  (\w+)(?:\[.*?\])? -", page, re.MULTILINE)) - {"sources"}
    assert drawn == {name for name, _, _ in rows}


@pytest.mark.slow
@pytest.mark.parametrize(("page", "command"), FOUND, ids=lambda value: value.name if isinstance(value, Path) else None)
def test_it_runs(page: Path, command: str, checkout: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """A page's commands find the run `mine` as it was made; those of the README and of a walk-through build on it."""
    if command in RUN_ONCE:
        found: DocumentedRun = request.getfixturevalue(RUN_ONCE[command])
        assert found.returncode == 0, found.printed
        return
    if page.parent.name == "stages":
        checkout = Path(shutil.copytree(checkout, tmp_path / "copy", symlinks=True))
    endless = command.startswith(ENDLESS)
    done = shell(checkout, f"timeout 1 {command}" if endless else command)
    assert done.returncode == (124 if endless else 0), f"{page.name}: {command}\n{done.stdout}{done.stderr}"
