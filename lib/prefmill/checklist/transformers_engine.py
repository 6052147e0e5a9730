"""The transformers engine: P(yes) from next-token probabilities, each review read once for all of its items."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from prefmill.causal.loading import load_model, load_tokenizer
from prefmill.checklist.engines import Engine, Outcome, TransformersConfig
from prefmill.checklist.items import Checklist
from prefmill.checklist.prompts import Answers, Prompts, TokenIds
from prefmill.errors import ConfigError
from prefmill.records import Answer, Paper, Review

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

_DECIMALS = 6  # of a probability in a row: float32 gives no more


class TransformersEngine(Engine):
    """Asks a causal language model every item of every review.

    A prompt is read in three pieces, always cut at the same places, so that a result does not depend on what was
    cached: what all reviews of a paper share, the review, and the items as one padded batch on the review's cache.
    In float32 that equals one forward a prompt to within rounding (with full attention; padding between cache and
    item shifts the edge of a sliding window by as much).
    """

    name = "transformers"

    def __init__(self, config: TransformersConfig, checklist: Checklist) -> None:
        super().__init__(checklist)
        self._config = config
        tokenizer = load_tokenizer(
            config.model_name_or_path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        self.prompts = Prompts(tokenizer, checklist, config.include_paper)
        self.model = load_model(
            config.model_name_or_path,
            precision=config.precision,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            attn_implementation=config.attn_implementation,
        )
        self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self._max_length = _max_length(self.model, config.max_length)
        self._shared: tuple[TokenIds, Cache | None] = ((), None)

    @torch.inference_mode()
    def score(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[Outcome]:
        """The answers to every review, in the order given; a review that does not fit fails, or is cut."""
        for paper, reviews in papers:
            shared = self.prompts.shared(paper) if reviews else ()
            for review in reviews:
                yield self._outcome(shared, review)

    def _outcome(self, shared: TokenIds, review: Review) -> Outcome:
        ids = self.prompts.foreign(review["text"])
        room = self._room(shared)
        cut = max(0, len(ids) - room)
        if room < 1 or (cut and not self._config.truncate_reviews):
            reason = (
                f"{len(ids)} tokens, with room for {max(0, room)} of {self._max_length} beside the rest of the prompt"
            )
            return Outcome(review["review_id"], review["paper_id"], {}, failure=reason)
        answers = self._answers(shared, ids[: len(ids) - cut])
        return Outcome(review["review_id"], review["paper_id"], answers, num_cut_tokens=cut)

    def _room(self, shared: TokenIds) -> int:
        """Tokens left for a review; very many where the model states no limit."""
        question = max(map(len, self.prompts.questions)) + self.prompts.answers.num_read_tokens
        return 10**9 if self._max_length is None else self._max_length - len(shared) - question

    def _answers(self, shared: TokenIds, review: TokenIds) -> dict[str, Answer]:
        cache = (
            read(self.model, review, copy.deepcopy(self._shared_cache(shared)))
            if review
            else self._shared_cache(shared)
        )
        size = self._config.item_batch_size
        questions = self.prompts.questions
        probabilities: list[float] = []
        for start in range(0, len(questions), size):
            probabilities += p_yes(self.model, cache, questions[start : start + size], self.prompts.answers)
        rounded = [round(value, _DECIMALS) for value in probabilities]
        return {name: {"yes": p > 0.5, "p_yes": p} for name, p in zip(self.checklist.ids, rounded, strict=True)}

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
    output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    result: Cache = output.past_key_values
    return result


def p_yes(model: PreTrainedModel, cache: Cache, questions: Sequence[TokenIds], answers: Answers) -> list[float]:
    """P(yes) over yes and no after each question, all on top of the one-row `cache`, which is left as it was."""
    if answers.single:
        logps = answer_logps(model, cache, questions, [answers.yes, answers.no])
    else:  # the answers differ in what must be read before their last token
        logps = torch.cat([answer_logps(model, cache, questions, [answer]) for answer in (answers.yes, answers.no)], 1)
    values: list[float] = (logps[:, 0] - logps[:, 1]).sigmoid().tolist()
    return values


def answer_logps(
    model: PreTrainedModel, cache: Cache, questions: Sequence[TokenIds], answers: Sequence[TokenIds]
) -> torch.Tensor:
    """log P(answer | prefix, question) [N, A] in float64, by the sum over an answer's tokens.

    Several `answers` must be of one token each: they share the position after the question.
    """
    answer = answers[0]
    rows = [question + answer[:-1] for question in questions]
    logits = _continue(model, cache, rows, num_kept=len(answer))
    logps = logits.double().log_softmax(dim=-1)
    if len(answers) > 1:
        return logps[:, 0, [ids[0] for ids in answers]]
    targets = torch.tensor(answer, device=logps.device).expand(len(rows), -1)
    return logps.gather(2, targets[:, :, None])[:, :, 0].sum(1, keepdim=True)


def _continue(model: PreTrainedModel, cache: Cache, rows: Sequence[TokenIds], num_kept: int) -> torch.Tensor:
    """Logits [N, num_kept, V] at the last positions of `rows`, each of which continues `cache` by itself.

    Rows are padded on the left, between cache and question, so that the last position is the same for all.
    """
    length, past = max(map(len, rows)), cache.get_seq_length()
    pads = [length - len(row) for row in rows]
    tokens = torch.tensor([[0] * pad + [*row] for pad, row in zip(pads, rows, strict=True)], device=model.device)
    mask = torch.tensor([[1] * past + [0] * pad + [1] * (length - pad) for pad in pads], device=model.device)
    repeated: Any = copy.deepcopy(cache)
    repeated.batch_repeat_interleave(len(rows))
    output = model(
        input_ids=tokens,
        attention_mask=mask,
        position_ids=(mask.cumsum(1) - 1)[:, past:],
        past_key_values=repeated,
        use_cache=True,
        logits_to_keep=num_kept,
    )
    logits: torch.Tensor = output.logits
    return logits


def _max_length(model: PreTrainedModel, wanted: int | None) -> int | None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if wanted is not None and context is not None and wanted > context:
        raise ConfigError(
            "max_length exceeds the model's context", got=wanted, expected=f"at most {context}",
            fix="lower max_length, or leave it out to use the whole context",
        )  # fmt: skip
    return context if wanted is None else wanted
