"""Words that readers stumbled over, with plainer ones: `python -m tests.docs.words` is part of `make lint`.

The style in short: the field's terms; active voice; a noun, no clause with "what"; "per" and not "a" for rates.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import REPOSITORY

_NOUNS = "tokens|nats|reviews|images|items|seeds|minutes|milliseconds|ratings|prompts|bytes|pairs|rows|samples|draws"
_PER = "item|token|second|prompt|row|image|review|pair|paper|task|side|step"
PLAINER = {
    rf"\b(?:{_NOUNS}) an? (?:{_PER})\b": '"per": tokens per second',
    r"\b(?:mend|mends|mended|mending)\b": "fix, or retry",
    r"\bfrom nothing\b": "from scratch",
    r"\bgone on with\b": "continued",
    r"\bby lot\b": "at random",
    r"\bin \S+ of meetings\b": "of head-to-head comparisons",
    r"\bvery words\b": "exact duplicates",
    r"\bturns judgements into\b": "fine-tunes models on quality ratings",
    r"\bstands? in parentheses\b": "Inputs in parentheses are optional",
    r"\bagainst itself as it was\b": "with the starting model as reference",
    r"\bmodel of text alone\b": "text-only model",
    r"\bhow hard (?:the|each) pair pulls\b": "gradient weight of the pair",
    r"\bnothing against it\b": "no problems found",
    r"\bnot made yet\b": "not run yet",
    r"\bcan it ever start\b": "checks memory and limits",
    r"\bfulfil": "satisfy",
    r"\buntil nothing is left to happen\b": "until the run ends",
    r"\bdoes what is not up to date\b": "runs only what changed",
    r"\bwhat failed for good\b": "permanent failures",
    r"\bits present output is kept\b": "output reused",
    r"\bwhat nobody is going to\b": "an input that nothing makes",
    r"\bwhat it holds\b": "its format, or its content",
}
READ = ("README.md", "CONTRIBUTING.md", "docs/*.md", "docs/stages/*.md", "lib/**/*.py", "lib/**/*.jinja",
        "lib/**/*.html", "stages/*.py", "configs/**/*.yaml")  # fmt: skip
_LEFT_OUT = ("messages.md",)  # written from the code, which is read itself


def found(text: str) -> Iterator[tuple[int, str, str]]:
    """Line, words and plainer ones."""
    for number, line in enumerate(text.splitlines(), 1):
        for pattern, plainer in PLAINER.items():
            yield from ((number, match[0], plainer) for match in re.finditer(pattern, line, re.IGNORECASE))


def pages() -> list[Path]:
    """The files that readers see, or whose strings they do."""
    return sorted(path for pattern in READ for path in REPOSITORY.glob(pattern) if path.name not in _LEFT_OUT)


def main() -> int:
    """Print every finding; 1 where there is one."""
    told = [
        f"{path.relative_to(REPOSITORY)}:{number}: '{words}': write {plainer}"
        for path in pages()
        for number, words, plainer in found(path.read_text())
    ]
    print("\n".join(told))
    return int(bool(told))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    sys.exit(main())
