"""What engines with a model share: a review becomes a request that fits the model, its probabilities become answers."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

from prefmill.checklist.engine import Engine, JudgeConfig, Outcome
from prefmill.checklist.evidence import verified_quote
from prefmill.checklist.items import Checklist
from prefmill.checklist.prompts import Prompts, TokenIds
from prefmill.core.errors import ConfigError
from prefmill.core.records import Answer, Paper, Review

_DECIMALS = 6  # of a probability in a row: float32 gives no more
_MASS_DECIMALS = 4


def prompts_for(config: JudgeConfig, checklist: Checklist) -> Prompts:
    """The prompts for the tokenizer of a judge's model; raises as `Prompts` and `load_tokenizer` do."""
    from prefmill.families.causal.loading import ORIGIN, load_tokenizer  # which servers of text need not wait for

    tokenizer = load_tokenizer(config.model_name_or_path, template=config, **config.model_dump(include=ORIGIN))
    return Prompts(tokenizer, checklist, config.include_paper, config.quote_tokens)


def own_prompts(config: JudgeConfig, checklist: Checklist) -> Prompts:
    """The prompts for a judge's model that runs here: of a server's the tokenizer alone may be at hand."""
    from prefmill.families.causal.loading import ORIGIN, load_config

    prompts, name = prompts_for(config, checklist), config.model_name_or_path
    origin = config.model_dump(include=ORIGIN)
    prompts.require_embedded(load_config(name, **origin).get_text_config().vocab_size, name)
    return prompts


class Read(NamedTuple):
    """What a model was found to answer: P(yes) over yes and no, and where known their mass and P(yes)'s error."""

    p_yes: float
    mass: float | None = None
    stderr: float | None = None

    @property
    def yes(self) -> bool:
        """Whether the answer is yes, by the rounded P(yes) that a row holds."""
        # Rounded first: else a row could say yes beside a p_yes of 0.5.
        return round(self.p_yes, _DECIMALS) > 0.5

    def answer(self) -> Answer:
        """The answer as a row holds it."""
        answer: Answer = {"yes": self.yes, "p_yes": round(self.p_yes, _DECIMALS)}
        if self.mass is not None:
            answer["mass"] = round(self.mass, _MASS_DECIMALS)
        if self.stderr is not None:
            answer["p_yes_stderr"] = round(self.stderr, _DECIMALS)
        return answer


@dataclass(frozen=True)
class ReviewRequest:
    """A review to be asked about, as tokens, or why it cannot be; `num_cut_tokens` were cut off its end."""

    review_id: str
    paper_id: str
    shared: TokenIds
    review: TokenIds
    text: str
    num_cut_tokens: int = 0
    failure: str | None = None

    def outcome(self, ids: Sequence[str], found: Sequence[Read], quotes: Mapping[int, str] | None = None) -> Outcome:
        """What became of it: an answer by item, or the failure it started with.

        `quotes` is what the model wrote when asked for evidence, by the item's place; only what stands in the review
        becomes evidence.
        """
        if self.failure is not None:
            return self.refused(self.failure)
        answers = {name: read.answer() for name, read in zip(ids, found, strict=True)}
        for place, written in (quotes or {}).items():
            passage = verified_quote(written, self.text)
            if passage is not None:
                answers[ids[place]]["evidence"] = passage
        return Outcome(self.review_id, self.paper_id, answers, num_cut_tokens=self.num_cut_tokens)

    def refused(self, reason: str) -> Outcome:
        """The outcome of a review that cannot be scored."""
        return Outcome(self.review_id, self.paper_id, {}, failure=reason)


@dataclass(frozen=True)
class Fit:
    """How reviews are made to fit: the model's tokens for a whole prompt (none: no limit), and whether to cut."""

    prompts: Prompts
    max_length: int | None
    truncate: bool

    def requests(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[ReviewRequest]:
        """A request for every review, in the order given."""
        for paper, reviews in papers:
            shared = self.prompts.shared(paper) if reviews else ()
            for review in reviews:
                yield self._request(shared, review)

    def _request(self, shared: TokenIds, review: Review) -> ReviewRequest:
        ids, room = self.prompts.foreign(review["text"]), self._room(shared)
        cut = max(0, len(ids) - room)
        failure = None
        if room < 1 or (cut and not self.truncate):
            left = max(0, room)
            failure = f"{len(ids)} tokens, with room for {left} of {self.max_length} beside the rest of the prompt"
        # Not ids[:-cut], which is empty where nothing is cut.
        kept = ids[: len(ids) - cut]
        return ReviewRequest(review["review_id"], review["paper_id"], shared, kept, review["text"], cut, failure)

    def _room(self, shared: TokenIds) -> int:
        """Tokens left for a review; very many where the model states no limit."""
        behind = self.prompts.num_tokens_behind
        return 10**9 if self.max_length is None else self.max_length - len(shared) - behind


class PromptedEngine(Engine):
    """An engine whose model is shown `prompts`."""

    prompts: Prompts

    def prompt(self, paper: Paper, review: Review) -> str:
        """What the model is shown to answer the first item of a review that is not cut."""
        return self.prompts.text(paper, review["text"])


class ConcurrentEngine(PromptedEngine):
    """An engine that asks about several reviews at a time and is done with them in any order."""

    @abstractmethod
    def numbered(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Generator[tuple[int, Outcome], None, None]:
        """Outcomes as soon as they are there, each with its number, from 0 in the order given."""

    def score(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[Outcome]:
        """The answers to every review, in the order given."""
        # Without closing, what a caller that stops early has left in flight could run on until garbage collection.
        with closing(self.numbered(papers)) as outcomes:
            yield from _in_order(outcomes)

    def score_as_done(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[Outcome]:
        """The same in the order in which they are done."""
        with closing(self.numbered(papers)) as outcomes:
            yield from (outcome for _, outcome in outcomes)


def yes_places(found: Sequence[Read]) -> list[int]:
    """The items that are answered with yes: evidence is asked for these."""
    return [place for place, read in enumerate(found) if read.yes]


def longest_prompt(context: int | None, wanted: int | None) -> int | None:
    """The configured limit, else the model's context; raises ConfigError where the one exceeds the other."""
    if wanted is not None and context is not None and wanted > context:
        raise ConfigError(
            "max_length exceeds the model's context", got=wanted, expected=f"at most {context}",
            fix="lower max_length, or leave it out to use the whole context",
        )  # fmt: skip
    return context if wanted is None else wanted


def _in_order(numbered: Iterable[tuple[int, Outcome]]) -> Iterator[Outcome]:
    """Outcomes numbered from 0, which come as they are done, in the order of their numbers."""
    early: dict[int, Outcome] = {}
    due = 0
    for number, outcome in numbered:
        early[number] = outcome
        while due in early:
            yield early.pop(due)
            due += 1


def p_of(log_odds: float) -> float:
    """The probability with these log-odds."""
    # math.exp overflows from 710 on.
    return 1 / (1 + math.exp(-log_odds)) if log_odds > -700 else 0.0


def read_of(log_yes: float, log_no: float) -> Read:
    """The answer with these log-probabilities over the whole vocabulary."""
    # Probabilities from float32 may add up to a little more than 1.
    return Read(p_of(log_yes - log_no), min(1.0, math.exp(log_yes) + math.exp(log_no)))
