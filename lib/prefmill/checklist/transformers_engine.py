"""The transformers engine: P(yes) from next-token probabilities, each review read once for all of its items."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from prefmill.checklist.continued_rows import ContinuedRows, rows_of
from prefmill.checklist.engine import Outcome, TransformersConfig
from prefmill.checklist.evidence import OPENING, is_closed
from prefmill.checklist.items import Checklist
from prefmill.checklist.prompted import (
    Fit,
    PromptedEngine,
    Read,
    ReviewRequest,
    longest_prompt,
    own_prompts,
    yes_places,
)
from prefmill.checklist.prompts import Answers, TokenIds
from prefmill.core.records import Paper, Review
from prefmill.distributed.devices import device_type
from prefmill.families.causal.loading import ORIGIN, load_model
from prefmill.families.causal.positions import position_border
from prefmill.store.missing import in_batches

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel


class TransformersEngine(PromptedEngine):
    """Asks a causal language model every item of every review.

    A prompt is read in three pieces, always cut at the same places, so that a result does not depend on what was
    cached: what all reviews of a paper share, the review with what all items begin with, and the rest of the items
    together on the review's cache, as `rows_of` has them.
    In float32 that equals one forward a prompt to within rounding (with full attention; padding between cache and
    item shifts the edge of a sliding window by as much).
    """

    name = "transformers"

    def __init__(self, config: TransformersConfig, checklist: Checklist) -> None:
        super().__init__(checklist)
        self._config = config
        self.prompts = own_prompts(config, checklist)
        options = config.model_dump(include={*ORIGIN, "attn_implementation"})
        self.model = load_model(config.model_name_or_path, precision=config.precision, **options)
        self.model.eval().to(device_type())
        self._rows = partial(rows_of(self.model), self.model)
        # A model that also reads images keeps its text model's limits in a configuration of their own.
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._fit = Fit(self.prompts, longest_prompt(context, config.max_length), config.truncate_reviews)
        self._border = position_border(self.model.config)
        self._shared: tuple[TokenIds, Cache | None] = ((), None)

    @torch.inference_mode()
    def score(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[Outcome]:
        """The answers to every review, in the order given; a review that does not fit fails, or is cut."""
        for request in self._fit.requests(papers):
            if failure := request.failure or self._crossing(request):
                yield request.refused(failure)
                continue
            cache = self._cache(request.shared, request.review)
            found = self._answers(cache)
            quotes = self._quotes(cache, yes_places(found)) if self._config.evidence else {}
            yield request.outcome(self.checklist.ids, found, quotes)

    def _crossing(self, request: ReviewRequest) -> str | None:
        """Why a review cannot be read, where some of its items would pass the border of two sets of positions."""
        before = len(request.shared) + len(request.review)
        longest = before + self.prompts.num_tokens_behind
        if self._border is None or longest <= self._border or before + len(self._opening) > self._border:
            return None
        return (
            f"{before} to {longest} tokens, where this model has other positions beyond {self._border}: an item would "
            f"be read by both sets (engine.max_length={self._border} leaves out or cuts such reviews)"
        )

    def _cache(self, shared: TokenIds, review: TokenIds) -> Cache:
        """The cache of a review, what stands before it, and what all items begin with."""
        self._count(shared, review)
        if self._border is not None and len(shared) <= self._border < len(shared) + len(review) + len(self._opening):
            # In one piece, as what is shared has the positions of short prompts.
            return read(self.model, shared + review + self._opening, None)
        # A forward extends its cache in place, and the paper's next review needs this one as it is.
        return read(self.model, review + self._opening, copy.deepcopy(self._shared_cache(shared)))

    @cached_property
    def _opening(self) -> TokenIds:
        """What all items begin with, asked or quoted: read once a review. Each keeps a token of its own to be asked."""
        asked = [*self.prompts.questions, *self.prompts.quotes]
        places = zip(*(ids[:-1] for ids in asked), strict=False)
        return tuple(tokens[0] for tokens in takewhile(lambda tokens: len(set(tokens)) == 1, places))

    def _behind_opening(self, asked: Sequence[TokenIds]) -> list[TokenIds]:
        return [ids[len(self._opening) :] for ids in asked]

    def _answers(self, cache: Cache) -> list[Read]:
        """The answer to every item."""
        found: list[Read] = []
        for questions in in_batches(self._behind_opening(self.prompts.questions), self._config.item_batch_size):
            found += read_answers(partial(self._rows, cache), questions, self.prompts.answers)
        return found

    def _quotes(self, cache: Cache, places: Sequence[int]) -> dict[int, str]:
        """What the model writes when asked for the evidence of these items; its answer is opened for it."""
        opening, quotes = self.prompts.quote_opening, {}

        def text(ids: Sequence[int]) -> str:
            return OPENING + self.prompts.written(ids)

        for some in in_batches(places, self._config.item_batch_size):
            rows = [ids + opening for ids in self._behind_opening([self.prompts.quotes[place] for place in some])]
            ends, limit = self.model.generation_config.eos_token_id, self._config.evidence_max_tokens
            written = write(self._rows(cache), rows, limit, ends, lambda ids: is_closed(text(ids)))
            quotes.update({place: text(ids) for place, ids in zip(some, written, strict=True)})
        return quotes

    def _count(self, shared: TokenIds, review: TokenIds) -> None:
        """Add a review's tokens: the first item reads the review, and what is shared where no review did before."""
        questions = self._behind_opening(self.prompts.questions)
        before = len(shared) + len(review) + len(self._opening)
        self.num_requests += len(questions)
        self.num_prompt_tokens += len(questions) * before + sum(map(len, questions))
        self.num_cached_tokens += (len(questions) - 1) * before + (len(shared) if self._shared[0] == shared else 0)

    def _shared_cache(self, shared: TokenIds) -> Cache:
        """The cache of what stands before the review, kept for the next review."""
        known, cache = self._shared
        if cache is None or known != shared:
            self._shared = ((), None)  # the old one is freed before the new one is made
            cache = read(self.model, shared, None)
            self._shared = (shared, cache)
        return cache


def read(model: PreTrainedModel, ids: TokenIds, cache: Cache | None) -> Cache:
    """The cache after `ids`, which continue `cache` (changed in place)."""
    tokens = torch.tensor([ids], device=model.device)
    # Only the cache is wanted: logits of all positions would take length times vocabulary numbers.
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    result: Cache = output.past_key_values
    return result


def read_answers(rows: Callable[[], ContinuedRows], questions: Sequence[TokenIds], answers: Answers) -> list[Read]:
    """The answer after each question; `rows` go on from the review's cache."""
    if answers.single:
        logps = answer_logps(rows(), questions, [answers.yes, answers.no])
    else:  # the answers differ in what must be read before their last token
        logps = torch.cat([answer_logps(rows(), questions, [answer]) for answer in (answers.yes, answers.no)], 1)
    p_yes, mass = (logps[:, 0] - logps[:, 1]).sigmoid(), logps.exp().sum(1)
    return list(map(Read, p_yes.tolist(), mass.tolist()))


def answer_logps(rows: ContinuedRows, questions: Sequence[TokenIds], answers: Sequence[TokenIds]) -> torch.Tensor:
    """log P(answer | prefix, question) [N, A] in float64, by the sum over an answer's tokens.

    Several `answers` must be of one token each: they share the position after the question.
    """
    answer = answers[0]
    logits = rows.extend([question + answer[:-1] for question in questions], len(answer))
    # In float64, so that the sum over a whole vocabulary adds no rounding of its own.
    logps = logits.double().log_softmax(dim=-1)
    if len(answers) > 1:
        return logps[:, 0, [ids[0] for ids in answers]]
    targets = torch.tensor(answer, device=logps.device).expand(len(questions), -1)
    return logps.gather(2, targets[:, :, None])[:, :, 0].sum(1, keepdim=True)


def write(
    rows: ContinuedRows,
    starts: Sequence[TokenIds],
    max_tokens: int,
    ends: int | Sequence[int] | None,
    is_done: Callable[[Sequence[int]], bool],
) -> list[list[int]]:
    """The likeliest tokens after each of `starts`, until they are done or one of `ends` comes."""
    # Chat models often name several: the end of a turn and the end of a text.
    stops = {*ends} if isinstance(ends, list) else {ends}
    written: list[list[int]] = [[] for _ in starts]
    going, given = set(range(len(starts))), starts
    for _ in range(max_tokens):
        chosen = rows.extend(given)[:, -1].argmax(-1).tolist()
        for row in sorted(going):
            written[row] += [] if chosen[row] in stops else [chosen[row]]
            if chosen[row] in stops or is_done(written[row]):
                going.discard(row)
        if not going:
            break
        given = [(token,) for token in chosen]
    return written
