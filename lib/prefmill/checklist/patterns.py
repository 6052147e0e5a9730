"""Rule patterns: regular expressions that cannot run away, and the fragments of which any match must hold one."""

from __future__ import annotations

import re
from dataclasses import dataclass
from re import _constants as ops  # type: ignore[attr-defined]  # the parse tree has no public name
from re import _parser  # type: ignore[attr-defined]
from typing import Any

MAX_REPEATS = 300  # of one element
MAX_STEPS = 10_000  # ways to stretch a pattern's repetitions from one position: two gaps of up to 90 characters
_REPEATS = {ops.MAX_REPEAT, ops.MIN_REPEAT, ops.POSSESSIVE_REPEAT}
_LOOKS = {ops.ASSERT, ops.ASSERT_NOT}
Literals = frozenset[str]


@dataclass(frozen=True)
class Pattern:
    """A compiled expression; where `literals` is not empty, every match holds one of them, in one word's characters."""

    regex: re.Pattern[str]
    literals: Literals


def compile_patterns(texts: tuple[str, ...]) -> Pattern:
    """One pattern that matches where any of `texts` does, in lowercase text.

    Raises ValueError naming the faulty one: not a regular expression, an upper-case letter, an unbounded repetition
    or more than `MAX_STEPS` ways to match.
    """
    found = [_check(text) for text in texts]
    literals: Literals = frozenset().union(*(item for item in found if item)) if all(found) else frozenset()
    return Pattern(re.compile("|".join(f"(?:{text})" for text in texts)), _without_longer(literals))


def _check(text: str) -> Literals | None:
    """The literals of one pattern; None where there are none."""
    try:
        # Compiled as well as parsed: a look-behind of varying width is refused only there.
        re.compile(text)
        tree = list(_parser.parse(text))
    except re.error as error:
        raise ValueError(f"pattern {text!r} is not a regular expression: {error}") from None
    steps = _steps(tree, text)
    if steps > MAX_STEPS:
        raise ValueError(
            f"pattern {text!r} can be tried in {steps:,} ways from one position, more than {MAX_STEPS:,}: "
            "shorten its gaps or split it"
        )
    return _literals(tree)


def _steps(tree: Any, text: str) -> int:
    """The ways to stretch a sequence, the product of its elements'; of alternatives the worst counts."""
    total = 1
    for operation, argument in tree:
        total *= _steps_of(operation, argument, text)
    return total


def _steps_of(operation: Any, argument: Any, text: str) -> int:
    if operation in _REPEATS:
        low, high, inner = argument
        if high is ops.MAXREPEAT or high > MAX_REPEATS:
            raise ValueError(
                f"pattern {text!r} repeats without a bound: write {{0,N}} with N up to {MAX_REPEATS} for * and +"
            )
        ways = _steps(inner, text)
        if high > 1 and any(part is ops.BRANCH for part, _ in _flat(inner)):
            ways += 1  # alternatives that overlap double the ways each time round
        # Capped, as a power of a nested repetition has no useful size.
        return int(min(10**9, (high - low + 1) * ways ** min(high, 30)))
    if operation is ops.BRANCH:
        return max(_steps(branch, text) for branch in argument[1])
    if operation is ops.SUBPATTERN:
        return _steps(argument[-1], text)
    if operation in _LOOKS:
        return _steps(argument[1], text)
    if operation in {ops.GROUPREF, ops.GROUPREF_EXISTS, ops.ATOMIC_GROUP}:
        raise ValueError(f"pattern {text!r} uses a back-reference or an atomic group, which rules do not need")
    if operation is ops.LITERAL and chr(argument) != chr(argument).lower():
        raise ValueError(f"pattern {text!r} holds the capital {chr(argument)!r}: it is matched in lowercase text")
    return 1


def _flat(tree: Any) -> Any:
    """The elements of a sequence and of the groups in it."""
    for operation, argument in tree:
        yield operation, argument
        if operation is ops.SUBPATTERN:
            yield from _flat(argument[-1])


def _literals(tree: Any) -> Literals | None:
    """Strings of which any match of a sequence holds one: the element whose shortest string is longest."""
    best: Literals | None = None
    run = ""
    # The last pair ends a run of letters that reaches to the pattern's end.
    for operation, argument in [*tree, (None, None)]:
        if operation is ops.LITERAL:
            run += chr(argument)
            continue
        # Texts are looked up word by word, so a literal with a space in it would never be found.
        word = max(run.split(), key=len, default="")
        for candidate in (frozenset({word}) if word else None, _literals_of(operation, argument)):
            if candidate and (best is None or _worth(candidate) > _worth(best)):
                best = candidate
        run = ""
    return best


def _literals_of(operation: Any, argument: Any) -> Literals | None:
    if operation is ops.SUBPATTERN:
        return _literals(argument[-1])
    if operation in _REPEATS and argument[0] > 0:
        return _literals(argument[2])
    if operation is ops.BRANCH:
        parts = [_literals(branch) for branch in argument[1]]
        return frozenset().union(*(part for part in parts if part)) if all(parts) else None
    if operation is ops.IN:
        return _characters(argument)
    # Nothing from look-arounds: what they hold may lie outside the match, or must not be there.
    return None


def _characters(members: Any) -> Literals | None:
    """The characters of a class that names them all, digits among them."""
    found: set[str] = set()
    for kind, value in members:
        if kind is ops.LITERAL and not chr(value).isspace():
            found.add(chr(value))
        elif kind is ops.CATEGORY and value is ops.CATEGORY_DIGIT:
            found.update("0123456789")
        else:
            return None
    return frozenset(found)


def _worth(literals: Literals) -> float:
    """Higher where fewer words of a text hold one of `literals`: longer, fewer, with rarer characters."""
    return -sum(0.1 ** sum(1.0 if character.isalpha() else 2.5 for character in item) for item in literals)


def _without_longer(literals: Literals) -> Literals:
    """Drop what holds another literal: where it stands, the shorter one stands too."""
    return frozenset(item for item in literals if not any(other in item for other in literals if other != item))
