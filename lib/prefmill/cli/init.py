"""`prefmill init DIR`: configurations, sbatch scripts and the pages, to work in without a checkout."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from prefmill.core.errors import InputError
from prefmill.core.files import write_atomic
from prefmill.core.places import STAGES, stages_folder

_FOLDERS = ("configs", "sbatch")
_DOCS = "docs"  # without the reasons of its code; left out where a project has its own
_TEXT = (".yaml", ".sbatch", ".sh", ".md")
_IGNORED = "/data/\n/checkpoints/\n/logs/\n"


def lay_down(folder: Path) -> Iterator[str]:
    """Copy the shipped files into `folder`, and say what to do next; raises InputError where files are in the way."""
    # Looked for before the first copy, so that nothing is left half laid down.
    in_the_way = [name for name in _FOLDERS if (folder / name).exists()]
    if in_the_way:
        raise InputError(
            "files of yours are in the way", where=folder / in_the_way[0], expected="a new or empty folder",
            fix="name another folder: prefmill init DIR",
        )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    source = _source()
    laid_down = [folder / name for name in (*_FOLDERS, _DOCS) if not (folder / name).exists()]
    for target in laid_down:
        shutil.copytree(source / target.name, target, ignore=shutil.ignore_patterns("decisions", "*.py", "__pycache__"))
    _use_this_interpreter(folder)
    for path in [file for target in laid_down for file in target.rglob("*") if file.suffix in _TEXT]:
        text = path.read_text()
        # A wheel has them as prefmill.stages, as `stages` may be anybody's folder.
        if "-m stages." in text and STAGES != "stages":
            path.write_text(text.replace("-m stages.", f"-m {STAGES}."))
    if not (folder / ".gitignore").exists():
        write_atomic(folder / ".gitignore", _IGNORED)
    yield f"wrote {', '.join(map(str, laid_down))}"
    yield f"next: cd {shlex.quote(str(folder))} && prefmill run configs/pipelines/demo.yaml"


def _source() -> Path:
    """Where the shipped files are: in the package, or beside the stages of a checkout."""
    starter = Path(__file__).resolve().parents[1] / "starter"
    return starter if starter.is_dir() else stages_folder().resolve().parent


def _use_this_interpreter(folder: Path) -> None:
    """Job scripts run the interpreter that has prefmill: a laid-down folder has no environment of its own."""
    path = folder / "sbatch" / "_env.sh"
    path.write_text(path.read_text().replace(":-.venv/bin/python}", f":-{shlex.quote(sys.executable)}}}"))
