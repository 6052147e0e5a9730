"""The lexical engine: items answered by rules over sentences. A baseline, deterministic, and labelled as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from operator import or_

from prefmill.checklist.engine import Engine, LexicalConfig, Outcome
from prefmill.checklist.items import Checklist, Rule
from prefmill.checklist.patterns import Pattern, compile_patterns
from prefmill.core.errors import ConfigError
from prefmill.core.records import Answer, Paper, Review

EVIDENCE_CHARACTERS = 160
MAX_SENTENCE_CHARACTERS = 1000  # text without full stops is cut here, which bounds the time a pattern can take
MAX_WORDS = 200_000  # remembered, about 30 MB
# A full stop ends a sentence unless it belongs to an abbreviation that stands before a number or a name.
_ABBREVIATIONS = ("al", "fig", "figs", "eq", "eqs", "eqn", "sec", "tab", "e.g", "i.e", "vs", "cf", "p", "pp")
_GUARDS = "".join(rf"(?<!\b{re.escape(word)}\.)" for word in _ABBREVIATIONS)
_BOUNDARY = re.compile(rf"[.!?\n](?:(?<=\n)\n*|{_GUARDS}[\"'”)\]]{{0,3}}\s+)")
_HEADING = "#"  # a form's heading is not the reviewer's word


class LexicalEngine(Engine):
    """Answers every item by its rule: `p_yes` is 1 or 0, the evidence is the first sentence that counts.

    Raises ConfigError when items have no rule.
    """

    name = "lexical"

    def __init__(self, config: LexicalConfig, checklist: Checklist) -> None:
        super().__init__(checklist)
        without = [item.id for item in checklist.items if item.rule is None]
        if without:
            raise ConfigError(
                "the lexical engine cannot answer items that have no rule", where=f"checklist {checklist.name}",
                got=", ".join(without), fix="give these items a `rule`, or use another engine",
            )  # fmt: skip
        self._evidence = config.evidence
        rules = [(item.id, CompiledRule.of(item.rule)) for item in checklist.items if item.rule is not None]
        self._rules = [(name, 1 << number, rule) for number, (name, rule) in enumerate(rules)]
        self._words = WordMasks([rule.leading.literals for _, rule in rules])

    def score(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[Outcome]:
        """The answers to every review, in the order given."""
        for paper, reviews in papers:
            for review in reviews:
                yield Outcome(review["review_id"], paper["paper_id"], self.answers(review["text"]))

    def answers(self, text: str) -> dict[str, Answer]:
        """The answer to every item for a review's text."""
        review = Sentences(text)
        masks = [self._words.of(sentence) for sentence in review.sentences]
        # A rule without a word in the whole review needs no pass over its sentences.
        held = reduce(or_, masks, 0)
        return {
            name: self._answer(rule.first(review.sentences, masks, bit) if held & bit else None, review)
            for name, bit, rule in self._rules
        }

    def _answer(self, sentence: int | None, review: Sentences) -> Answer:
        if sentence is None:
            return {"yes": False, "p_yes": 0.0}
        if not self._evidence:
            return {"yes": True, "p_yes": 1.0}
        return {"yes": True, "p_yes": 1.0, "evidence": review.quote(sentence)}


class Sentences:
    """A review in sentences, lowercase for matching and as written for quoting; headings of a form are left out."""

    def __init__(self, text: str) -> None:
        self.text = text
        lowered = text.lower()
        if len(lowered) != len(text):  # a few capitals become two characters; positions must stay
            lowered = "".join(low if len(low := character.lower()) == 1 else character for character in text)
        # Patterns hold the plain apostrophe; one character for one, so positions stay.
        self.lowered = lowered.replace("’", "'")
        self.starts = _starts(self.lowered)
        sentences = [self.lowered[start:end].strip() for start, end in pairwise(self.starts)]
        self.sentences = ["" if sentence.startswith(_HEADING) else sentence for sentence in sentences]

    def quote(self, index: int) -> str:
        """Sentence `index` as written, on one line, cut at a word after `EVIDENCE_CHARACTERS`."""
        sentence = " ".join(self.text[self.starts[index] : self.starts[index + 1]].split())
        if len(sentence) <= EVIDENCE_CHARACTERS:
            return sentence
        head, _, cut = sentence[:EVIDENCE_CHARACTERS].rpartition(" ")
        return (head or cut) + " …"


@dataclass(frozen=True)
class CompiledRule:
    """A rule as one pattern that a sentence must match (with literals to find it by) and others to check then."""

    leading: Pattern
    others: tuple[Pattern, ...]
    excluded: Pattern | None
    min_count: int

    @classmethod
    def of(cls, rule: Rule) -> CompiledRule:
        """`rule` ready for use; its first requirement leads."""
        required = [compile_patterns((pattern,)) for pattern in rule.all_of]
        if rule.any_of:
            required.append(compile_patterns(rule.any_of))
        excluded = compile_patterns(rule.none_of) if rule.none_of else None
        return cls(required[0], tuple(required[1:]), excluded, rule.min_count)

    def first(self, sentences: Sequence[str], masks: Sequence[int], bit: int) -> int | None:
        """The first sentence that counts, where at least `min_count` do; only those whose mask has `bit` can."""
        first, count = None, 0
        for index, mask in enumerate(masks):
            if mask & bit and self._counts(sentences[index]):
                first = index if first is None else first
                count += 1
                if count == self.min_count:
                    return first
        return None

    def _counts(self, sentence: str) -> bool:
        return (
            self.leading.regex.search(sentence) is not None
            and all(other.regex.search(sentence) for other in self.others)
            and (self.excluded is None or self.excluded.regex.search(sentence) is None)
        )


class WordMasks(dict[str, int]):
    """For each word the rules that a sentence with it may count for, as a bit mask; filled as words are met.

    A look-up in place of a search for every literal of every rule: nearly all of a corpus is words seen before.
    """

    def __init__(self, literals: Sequence[frozenset[str]]) -> None:
        super().__init__()
        self._literals = [(literal, 1 << number) for number, held in enumerate(literals) for literal in sorted(held)]
        self._always = sum(1 << number for number, held in enumerate(literals) if not held)

    def of(self, sentence: str) -> int:
        """The mask of a lowercase sentence."""
        # dict's own look-up: Python code (__missing__) runs only for a word that is new.
        return reduce(or_, map(self.__getitem__, sentence.split()), self._always)

    def __missing__(self, word: str) -> int:
        if len(self) >= MAX_WORDS:
            # All at once: keeping track of use would cost at every look-up, and frequent words are back soon.
            self.clear()
        mask = reduce(or_, (bit for literal, bit in self._literals if literal in word), 0)
        self[word] = mask
        return mask


def _starts(lowered: str) -> list[int]:
    """Where each sentence starts, and the text's length at the end."""
    starts = [0]
    for boundary in _BOUNDARY.finditer(lowered):
        _cut_long(starts, boundary.end())
        starts.append(boundary.end())
    _cut_long(starts, len(lowered))
    if starts[-1] != len(lowered):
        starts.append(len(lowered))
    return starts


def _cut_long(starts: list[int], end: int) -> None:
    while end - starts[-1] > MAX_SENTENCE_CHARACTERS:
        starts.append(starts[-1] + MAX_SENTENCE_CHARACTERS)
