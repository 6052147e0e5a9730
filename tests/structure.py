"""How the library is built, in numbers: `python -m tests.structure` prints rooms, imports upward, circles and sizes."""

from __future__ import annotations

import argparse
import ast
import io
import tokenize
import tomllib
from collections.abc import Iterator
from pathlib import Path

import grimp

from tests.conftest import REPOSITORY

LIBRARY = REPOSITORY / "lib" / "prefmill"


def layers() -> list[str]:
    """The rooms from the lowest to the highest, as pyproject.toml has them for import-linter."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    contracts = settings["tool"]["importlinter"]["contracts"]
    (ordered,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    return list(reversed(ordered))


def upward(graph: grimp.ImportGraph, rooms: list[str]) -> list[tuple[str, str]]:
    """Imports from a room into one above it, those inside functions included."""
    return [
        (importer, imported)
        for importer in graph.modules
        for imported in graph.find_modules_directly_imported_by(importer)
        if _height(imported, rooms) > _height(importer, rooms)
    ]


def circles(graph: grimp.ImportGraph) -> list[list[str]]:
    """Groups of modules that import each other in a circle (Tarjan 1972), through functions or not."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for other in graph.find_modules_directly_imported_by(module):
            if other not in index:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == index[module]:
            place = stack.index(module)
            group, stack[place:] = stack[place:], []
            if len(group) > 1:
                found.append(group)

    for module in sorted(graph.modules):
        if module not in index:
            visit(module)
    return found


def function_lengths() -> list[int]:
    """Lines of every function of the library, sorted."""
    return sorted(
        node.end_lineno - node.lineno + 1
        for path in _files()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno
    )


def comments() -> int:
    """Lines of the library with a comment, but for those that speak to a tool."""
    return sum(
        token.type == tokenize.COMMENT and not token.string.startswith(("# fmt", "# noqa", "# type"))
        for path in _files()
        for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline)
    )


def _files() -> Iterator[Path]:
    yield from sorted(LIBRARY.rglob("*.py"))


def _height(module: str, rooms: list[str]) -> int:
    parts = module.split(".")
    return rooms.index(parts[1]) if len(parts) > 1 and parts[1] in rooms else -1


def main() -> None:
    """Print the numbers, one a line."""
    graph, rooms, lengths = grimp.build_graph("prefmill"), layers(), function_lengths()
    lines = sum(len(path.read_text().splitlines()) for path in _files())
    print(f"rooms              {len(rooms)}: {' '.join(rooms)}")
    print(f"imports upward     {len(upward(graph, rooms))}")
    print(f"circles            {len(circles(graph))}")
    print(f"lines              {lines} in {sum(1 for _ in _files())} files")
    print(f"lines a function   median {lengths[len(lengths) // 2]}, p90 {lengths[len(lengths) * 9 // 10]}")
    print(f"comments           {100 * comments() / lines:.1f} in a hundred lines")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
