"""Promises about the repository itself: one name everywhere, light imports, every config loads."""

from __future__ import annotations

import ast
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from prefmill.core.config import load, read_yaml
from prefmill.core.stage import describe_stages, load_stage, stage_names
from prefmill.pipeline.plan import make_plan, read_pipeline
from tests.documented_runs import REPOSITORY, repository_files

HEAVY = ("torch", "transformers", "trl", "datasets", "diffusers", "peft", "deepspeed", "vllm", "numpy")
STAGES = stage_names()


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_one_name_everywhere(name: str) -> None:
    for path in (
        f"docs/stages/{name}.md",
        f"tests/e2e/test_{name}.py",
        f"configs/{name}/demo.yaml",
        f"sbatch/{name}.sbatch",
    ):
        assert (REPOSITORY / path).is_file(), f"{path} is missing"


@pytest.mark.parametrize("name", STAGES)
def test_no_stage_imports_another(name: str) -> None:
    tree = ast.parse((REPOSITORY / "stages" / f"{name}.py").read_text())
    imported = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    imported += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    assert [module for module in imported if module.split(".")[0] == "stages"] == []


def test_every_config_loads() -> None:
    loaded = []
    for path in sorted(REPOSITORY.glob("configs/**/*.yaml")):
        kind = path.parent.name
        if kind == "pipelines":
            make_plan(read_pipeline(path, ["workspace=/nowhere"]), path)
        elif kind in STAGES:
            load(load_stage(kind).config, path)
        else:
            read_yaml(path)
        loaded.append(kind)
    assert len(loaded) >= len(STAGES) + 2
    assert set(STAGES) <= set(loaded)


def test_stages_and_the_command_line_import_nothing_heavy() -> None:
    code = (
        "import sys, prefmill.cli.main, prefmill.pipeline.local, prefmill.slurm.status\n"
        "from prefmill.core.stage import *\n"
        "for name in stage_names(): load_stage(name)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


@pytest.mark.timing
@pytest.mark.parametrize("command", [["--help"], ["run", "--help"], ["status", "--workspace", "{workspace}"]])
def test_help_and_status_answer_at_once(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "logs" / "latest").mkdir(parents=True)
    (tmp_path / "logs" / "latest" / "plan.json").write_text('{"run": "r", "tasks": []}')
    arguments = [part.format(workspace=tmp_path) for part in command]
    seconds = []  # of processor time, which is what passes on a machine with nothing else to do
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-m", "prefmill.cli.main", *arguments], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(seconds) < 0.5


def test_nothing_names_a_machine_or_a_package_host() -> None:
    # A path that starts there, not one that has such a folder inside.
    banned = re.compile(r"(?<![\w}*.])/(wo[r]k|opt)/|pypi[.]org|pythonhosted[.]org")
    for name in repository_files():
        if not name.endswith((".png", ".jpg")):
            text = (REPOSITORY / name).read_text(encoding="utf-8", errors="replace")
            assert banned.search(text) is None, name


def test_files_stay_readable() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): count
        for folder in ("lib", "stages")
        for path in (REPOSITORY / folder).rglob("*.py")
        if (count := len(path.read_text().splitlines())) > 330
    }
    assert long == {}


def test_a_class_has_a_name_of_its_own() -> None:
    """A search for a class finds one definition."""
    places: dict[str, list[str]] = {}
    for path in sorted((REPOSITORY / "lib").rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(str(path.relative_to(REPOSITORY)))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_tests_with_threads_waits_or_clocks_are_repeated_by_test_timing() -> None:
    """A file that has some marks them; a file that only helps others has no tests to mark."""
    luck = re.compile(r"time\.(sleep|monotonic|time|process_time)\(|Thread\(|kill_after\(|ru_utime")
    files = [path for path in (REPOSITORY / "tests").rglob("test_*.py") if path.parent.name not in ("slurm", "vllm")]
    timed = [path for path in files if luck.search(path.read_text())]
    assert len(timed) > 15
    assert [path.name for path in timed if "pytest.mark.timing" not in path.read_text()] == []


def test_shell_scripts_are_clean() -> None:
    scripts = [
        *sorted(REPOSITORY.glob("sbatch/*")),
        *REPOSITORY.glob("tests/*.sh"),
        *REPOSITORY.glob("requirements/*.sh"),
    ]
    assert len(scripts) > len(STAGES)
    done = subprocess.run(
        [".venv/bin/shellcheck", "-x", *map(str, scripts)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stdout


def test_the_readmes_table_of_stages_is_the_codes() -> None:
    _, rest = (REPOSITORY / "README.md").read_text().split("<!-- prefmill stages --markdown -->\n")
    written, _ = rest.split("\n<!-- end -->", 1)
    assert written == describe_stages(markdown=True), "put the output of `prefmill stages --markdown` into README.md"
