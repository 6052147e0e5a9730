"""Every module that is run by `python -m` says what it does when it is asked for help, and does nothing else."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def modules() -> Iterator[str]:
    """Names of the modules of benchmarks/ and tests/ that do something when they are run; toy stages left out."""
    for path in sorted((*REPOSITORY.glob("benchmarks/*.py"), *REPOSITORY.glob("tests/**/*.py"))):
        relative, text = path.relative_to(REPOSITORY), path.read_text("utf-8")
        if "toys" not in relative.parts and "__main__" in text and any(map(_is_guard, ast.parse(text).body)):
            yield ".".join(relative.with_suffix("").parts)


def _is_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


@pytest.mark.parametrize("module", list(modules()))
def test_help_is_the_docstring(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)  # runpy warns of one that is imported
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__")
    assert ended.value.code == 0
    docstring = ast.get_docstring(ast.parse((REPOSITORY / f"{module.replace('.', '/')}.py").read_text("utf-8")))
    assert " ".join(str(docstring).splitlines()[0].split()) in " ".join(capsys.readouterr().out.split())
