"""Write docs/models.md: `python -m tests.models`. With names of architectures it prints their rows instead."""

from __future__ import annotations

import argparse
from pathlib import Path

from tests.models.matrix import ARCHITECTURES, Row, row_of, silence

PAGE = Path(__file__).parents[2] / "docs/models.md"
HEAD = """# Which models train

Written by `python -m tests.models`: every causal and every image-and-text architecture of transformers {version}, tiny
with random weights (windows and chunks of 5 tokens, every kind of layer once). Its train-mode scores of five answers to
two prompts are set beside its own forward in eval mode (fp32, full logits, one sequence at a time); *works* is within
{tolerance} nats an answer. A checkpoint is tried likewise when it is loaded, before anything is spent
([0122](decisions/0122-likelihoods-are-checked-at-load.md)). `layout: auto` is group where that works.

{group} work in group, {pairwise} pairwise, {wrong} are wrong.

| model_type | class | group | pairwise |
|---|---|---|---|
"""
UNBUILT = """
Not tried, as they cannot be built tiny here, or need more than text:

| model_type | why |
|---|---|
"""


def page() -> str:
    """The whole page; takes about two minutes."""
    import transformers

    from tests.models.matrix import TOLERANCE

    found = {name: row_of(name) for name in ARCHITECTURES}
    rows = [row for row in found.values() if isinstance(row, Row)]
    counts = {layout: sum(getattr(row, layout) == "works" for row in rows) for layout in ("group", "pairwise")}
    wrong = sum("WRONG" in row.group + row.pairwise for row in rows)
    version = ".".join(transformers.__version__.split(".")[:2])
    unbuilt = "".join(f"| {name} | {why} |\n" for name, why in found.items() if isinstance(why, str))
    head = HEAD.format(version=version, tolerance=TOLERANCE, wrong=wrong, **counts)
    return head + "".join(map(line, rows)) + UNBUILT + unbuilt


def line(row: Row) -> str:
    """A row of the table."""
    return f"| {row.model_type} | {row.name} | {row.group} | {row.pairwise} |\n"


def main(names: list[str]) -> None:
    """The page, or rows of the architectures named."""
    if names:
        for name in names:
            print(row_of(name))
    else:
        PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", nargs="*", help="print its row; none: write the page")
    arguments = parser.parse_args()
    with silence():
        main(arguments.architecture)
