"""Every error message with its remedy, as the code has them: `python -m tests.docs.messages` writes the page."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from tests.conftest import REPOSITORY

PAGE = REPOSITORY / "docs" / "messages.md"
DEPENDS = "it depends on the case: the message says it"
_ERRORS = {"ArtifactError", "ConfigError", "InputError", "PipelineError", "PrefmillError"}
_HEAD = """# Every error message

Written from the code by `python -m tests.docs.messages`; a test holds it to the code. `…` stands for names and numbers.
A message is followed by where it arose, what was found, what was expected, and the remedy, which is the second column.
For the story behind the frequent ones see [troubleshooting](troubleshooting.md) and the [stages' pages](stages/).
"""


def sources() -> list[Path]:
    """Every file of the code."""
    return [path for folder in ("lib/prefmill", "stages") for path in sorted((REPOSITORY / folder).rglob("*.py"))]


@cache
def page() -> str:
    """The whole page: a table for each package of the code."""
    tables: dict[str, set[tuple[str, str]]] = {}
    for path in sources():
        found = set(_messages(ast.parse(path.read_text())))
        if found:
            tables.setdefault(_heading(path), set()).update(found)
    parts = [_HEAD]
    for heading, rows in tables.items():
        lines = [f"| `{message}` | {fix} |" for message, fix in sorted(rows, key=lambda row: (row[0].lower(), row[1]))]
        parts.append("\n".join([f"## {heading}", "", "| message | remedy |", "|---|---|", *lines]) + "\n")
    return "\n".join(parts)


def _heading(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).parts
    return "stages" if parts[0] == "stages" else ".".join(parts[1:-1])


def _messages(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """Every message made in a module, and its remedy."""
    assigned = [node for node in ast.iter_child_nodes(tree) if isinstance(node, ast.Assign)]
    named = {target.id: node.value for node in assigned for target in node.targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ERRORS and node.args:
            fix = next((keyword.value for keyword in node.keywords if keyword.arg == "fix"), None)
            remedy = "" if fix is None else " / ".join(texts(fix, named)) or DEPENDS
            for message in texts(node.args[0], named):
                yield message.replace("`", "'"), remedy


def texts(node: ast.expr, named: Mapping[str, ast.expr]) -> list[str]:
    """What an expression can say; nothing where it is known at run time alone."""
    if isinstance(node, ast.Name) and node.id in named:
        return texts(named[node.id], named)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [_cell(node.value)]
    if isinstance(node, ast.JoinedStr):
        pieces = [str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values]
        return [_cell("".join(pieces))]
    if isinstance(node, ast.IfExp):
        return [*texts(node.body, named), *texts(node.orelse, named)]
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in texts(value, named)]
    return []


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(page())
