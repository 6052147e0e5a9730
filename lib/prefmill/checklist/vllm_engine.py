"""The vLLM engine: every item of every review as a request of one token, the shared prefixes read from its cache."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefmill.checklist.engine import Outcome, VllmConfig
from prefmill.checklist.evidence import SCHEMA
from prefmill.checklist.items import Checklist
from prefmill.checklist.prompted import (
    ConcurrentEngine,
    Fit,
    Read,
    ReviewRequest,
    longest_prompt,
    own_prompts,
    read_of,
    yes_places,
)  # fmt: skip
from prefmill.checklist.prompts import TokenIds
from prefmill.core.records import Paper, Review
from prefmill.families.causal.vllm_loading import open_vllm

# Else a model may write spaces until its tokens are spent.
_COMPACT_JSON = {"backend": "xgrammar", "disable_any_whitespace": True}


@dataclass
class _Asked:
    """A review in flight, with its number: what has come back, log-probabilities by item and answer, quotes by item."""

    number: int
    request: ReviewRequest
    waiting: int = 0
    logps: dict[tuple[int, int], tuple[float, ...]] = field(default_factory=dict)
    found: list[Read] = field(default_factory=list)
    quotes: dict[int, str] = field(default_factory=dict)


# vLLM's name for a request: the review, the item, and which answer; None where a quote is asked for.
_ById = dict[str, tuple[_Asked, int, int | None]]


class VllmEngine(ConcurrentEngine):
    """Asks a causal language model every item of every review, through vLLM in this process.

    Prompts go in paper by paper, review by review, with the item last: vLLM's prefix cache then reads paper and
    review once. Where yes and no are one token each, one request gives both log-probabilities; otherwise an answer's
    tokens are requests of their own, and their log-probabilities are summed.
    """

    name = "vllm"

    def __init__(self, config: VllmConfig, checklist: Checklist) -> None:
        super().__init__(checklist)
        self._config = config
        self.prompts = own_prompts(config, checklist)
        self._llm = _open(config)
        context = self._llm.llm_engine.model_config.max_model_len - 1  # the answer's token has its place too
        self._fit = Fit(self.prompts, longest_prompt(context, config.max_length), config.truncate_reviews)

    def numbered(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Generator[tuple[int, Outcome], None, None]:
        """Outcomes as they are done, `reviews_in_flight` of them being asked about at a time."""
        rest = enumerate(self._fit.requests(papers))
        by_id: _ById = {}
        num_asked = 0
        try:
            while True:
                while num_asked < self._config.reviews_in_flight and (due := next(rest, None)):
                    number, request = due
                    if request.failure is not None:
                        yield number, request.refused(request.failure)
                    else:
                        self._ask(_Asked(number, request), by_id)
                        num_asked += 1
                if not num_asked:
                    break
                for asked in self._answered(by_id):
                    num_asked -= 1
                    outcome = asked.request.outcome(self.checklist.ids, asked.found, asked.quotes)
                    yield asked.number, outcome
        finally:  # a caller that stops early must leave nothing behind for the next one
            if by_id:
                self._llm.llm_engine.abort_request(list(by_id))

    def _ask(self, asked: _Asked, by_id: _ById) -> None:
        """Hand a review's items to vLLM."""
        for item, question in enumerate(self.prompts.questions):
            for place, (prefix, allowed) in enumerate(self._steps()):
                self._add(asked, question + prefix, _one_token(allowed), (item, place), by_id)

    def _ask_for_quotes(self, asked: _Asked, by_id: _ById) -> None:
        """Hand the items that were answered with yes to vLLM once more."""
        for item in yes_places(asked.found):
            self._add(asked, self.prompts.quotes[item], _json(self._config.evidence_max_tokens), (item, None), by_id)

    def _add(self, asked: _Asked, behind: TokenIds, sampling: Any, place: tuple[int, int | None], by_id: _ById) -> None:
        name = str(self.num_requests)
        by_id[name] = (asked, *place)
        prompt = {"prompt_token_ids": [*asked.request.shared, *asked.request.review, *behind]}
        # Not LLM.generate, which returns only when all of its prompts are done.
        self._llm.llm_engine.add_request(name, prompt, sampling)
        self.num_requests += 1
        asked.waiting += 1

    def _steps(self) -> list[tuple[TokenIds, TokenIds]]:
        """What to read after a question, and the tokens whose log-probability is wanted there."""
        answers = self.prompts.answers
        if answers.single:
            return [((), answers.yes + answers.no)]
        # Not prompt_logprobs, which would need one request: with them vLLM reads nothing from its prefix cache.
        return [(ids[:index], (ids[index],)) for ids in (answers.yes, answers.no) for index in range(len(ids))]

    def _answered(self, by_id: _ById) -> list[_Asked]:
        """Let vLLM take one step; the reviews that are done after it."""
        done = []
        for output in self._llm.llm_engine.step():
            if output.finished:
                asked, item, place = by_id.pop(output.request_id)
                if place is None:
                    asked.quotes[item] = output.outputs[0].text
                else:
                    asked.logps[item, place] = self._logps(output)
                asked.waiting -= 1
                self.num_prompt_tokens += len(output.prompt_token_ids)
                self.num_cached_tokens += output.num_cached_tokens or 0
                # `found` is empty for the first pass alone: quotes that come back must not ask for quotes again.
                if not asked.waiting and not asked.found:
                    asked.found = self._read(asked)
                    if self._config.evidence:
                        self._ask_for_quotes(asked, by_id)
                if not asked.waiting:
                    done.append(asked)
        return done

    def _logps(self, output: Any) -> tuple[float, ...]:
        """The log-probabilities, over the whole vocabulary, of yes and no, or of the one token that was asked for."""
        (found,) = output.outputs[0].logprobs
        answers = self.prompts.answers
        wanted = (answers.yes[0], answers.no[0]) if answers.single else (output.outputs[0].token_ids[0],)
        return tuple(float(found[token].logprob) for token in wanted)

    def _read(self, asked: _Asked) -> list[Read]:
        """The answer to every item."""
        steps, num_yes = len(self._steps()), len(self.prompts.answers.yes)
        found = []
        for item in range(len(self.prompts.questions)):
            logps = [value for place in range(steps) for value in asked.logps[item, place]]
            found.append(read_of(math.fsum(logps[:num_yes]), math.fsum(logps[num_yes:])))
        return found


def _open(config: VllmConfig) -> Any:
    """vLLM's engine; ConfigError without vLLM."""
    return open_vllm(
        config.model_name_or_path,
        precision=config.precision,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        tensor_parallel_size=config.tensor_parallel_size,
        kv_cache_gb=config.kv_cache_gb,
        enforce_eager=config.enforce_eager,
        max_model_len=None if config.max_length is None else config.max_length + 1,
        # Over all tokens, not over the allowed ones alone: their mass tells a judge that judges.
        logprobs_mode="raw_logprobs",
        max_logprobs=2,
        **({"structured_outputs_config": _COMPACT_JSON} if config.evidence else {}),
    )


def _one_token(allowed: TokenIds) -> Any:
    """Ask for one of these tokens, with the log-probability of each."""
    # Imported here: vLLM is an extra, and the other engines work without it.
    from vllm import SamplingParams

    wanted = list(allowed)
    # Not detokenized: ids and log-probabilities are all that is read.
    return SamplingParams(
        max_tokens=1, temperature=0.0, allowed_token_ids=wanted, logprob_token_ids=wanted, detokenize=False
    )


def _json(max_tokens: int) -> Any:
    """Ask for a quote as JSON, of the likeliest tokens."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    form = StructuredOutputsParams(json=SCHEMA)
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, structured_outputs=form)
