"""The vLLM engine: every item of every review as a request of one token, the shared prefixes read from its cache."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefmill.causal.loading import load_tokenizer
from prefmill.checklist.engines import Engine, Outcome, VllmConfig
from prefmill.checklist.items import Checklist
from prefmill.checklist.prompted import Fit, Request, longest_prompt
from prefmill.checklist.prompts import Prompts, TokenIds
from prefmill.errors import ConfigError
from prefmill.records import Paper, Review

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_GB = 1 << 30


@dataclass
class _Asked:
    """A review in flight: the log-probabilities that have come back, by item and answer."""

    request: Request
    waiting: int
    logps: dict[tuple[int, int], float] = field(default_factory=dict)


class VllmEngine(Engine):
    """Asks a causal language model every item of every review, through vLLM in this process.

    Prompts go in paper by paper, review by review, with the item last: vLLM's prefix cache then reads paper and
    review once. Where yes and no are one token each, a request's distribution is over these two alone; otherwise an
    answer's tokens are requests of their own, and their log-probabilities over the whole vocabulary are summed.
    """

    name = "vllm"

    def __init__(self, config: VllmConfig, checklist: Checklist) -> None:
        super().__init__(checklist)
        self._config = config
        tokenizer = load_tokenizer(
            config.model_name_or_path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
        self.prompts = Prompts(tokenizer, checklist, config.include_paper)
        self._llm = _open(config, over_answers_alone=self.prompts.answers.single)
        context = self._llm.llm_engine.model_config.max_model_len - 1  # the answer's token has its place too
        self._fit = Fit(self.prompts, longest_prompt(context, config.max_length), config.truncate_reviews)
        self.num_requests = 0
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0

    def score(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[Outcome]:
        """The answers to every review, in the order given, `reviews_in_flight` of them being asked about at a time."""
        pending: deque[_Asked] = deque()
        by_id: dict[str, tuple[_Asked, tuple[int, int]]] = {}
        try:
            for request in self._fit.requests(papers):
                pending.append(self._ask(request, by_id))
                while len(pending) >= self._config.reviews_in_flight:
                    yield self._first(pending, by_id)
            while pending:
                yield self._first(pending, by_id)
        finally:  # a caller that stops early must leave nothing behind for the next one
            if by_id:
                self._llm.llm_engine.abort_request(list(by_id))

    def _ask(self, request: Request, by_id: dict[str, tuple[_Asked, tuple[int, int]]]) -> _Asked:
        """Hand a review's items to vLLM."""
        asked = _Asked(request, 0)
        if request.failure is not None:
            return asked
        before = request.shared + request.review
        for item, question in enumerate(self.prompts.questions):
            for place, (prefix, allowed) in enumerate(self._steps()):
                name = str(self.num_requests)
                by_id[name] = (asked, (item, place))
                prompt = {"prompt_token_ids": [*before, *question, *prefix]}
                self._llm.llm_engine.add_request(name, prompt, _one_token(allowed))
                self.num_requests += 1
                asked.waiting += 1
        return asked

    def _steps(self) -> list[tuple[TokenIds, TokenIds]]:
        """What to read after a question, and the tokens whose log-probability is wanted there."""
        answers = self.prompts.answers
        if answers.single:
            return [((), answers.yes + answers.no)]
        return [(ids[:index], (ids[index],)) for ids in (answers.yes, answers.no) for index in range(len(ids))]

    def _first(self, pending: deque[_Asked], by_id: dict[str, tuple[_Asked, tuple[int, int]]]) -> Outcome:
        """The outcome of the review that was asked about first, when all of its items are there."""
        while pending[0].waiting:
            for output in self._llm.llm_engine.step():
                if output.finished:
                    asked, place = by_id.pop(output.request_id)
                    asked.logps[place] = self._log_odds_or_logp(output)
                    asked.waiting -= 1
                    self.num_prompt_tokens += len(output.prompt_token_ids)
                    self.num_cached_tokens += output.num_cached_tokens or 0
        asked = pending.popleft()
        fits = asked.request.failure is None
        return asked.request.outcome(self.checklist.ids, self._probabilities(asked) if fits else ())

    def _log_odds_or_logp(self, output: Any) -> float:
        (found,) = output.outputs[0].logprobs
        answers = self.prompts.answers
        if answers.single:
            return float(found[answers.yes[0]].logprob - found[answers.no[0]].logprob)
        return float(found[output.outputs[0].token_ids[0]].logprob)

    def _probabilities(self, asked: _Asked) -> list[float]:
        """P(yes) of every item."""
        steps = len(self._steps())
        num_yes = len(self.prompts.answers.yes)
        values = []
        for item in range(len(self.prompts.questions)):
            logps = [asked.logps[item, place] for place in range(steps)]
            odds = logps[0] if steps == 1 else math.fsum(logps[:num_yes]) - math.fsum(logps[num_yes:])
            values.append(1 / (1 + math.exp(-odds)) if odds > -700 else 0.0)
        return values


def _open(config: VllmConfig, over_answers_alone: bool) -> Any:
    """vLLM's engine, its log-probabilities over the allowed tokens or over all; ConfigError without vLLM."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: seconds less to start, and to end
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if not os.environ.get("CUDA_VISIBLE_DEVICES") and not os.path.exists("/dev/nvidia0"):
        # On a CPU the first log-probabilities would compile C++; and one of two cores would stay idle.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    try:
        from vllm import LLM
    except ImportError as error:
        raise ConfigError(
            "vLLM is not installed", got=str(error),
            fix="`make vllm` for the CPU build, pip install 'prefmill[vllm]' on a GPU machine, or engine: transformers",
        ) from error  # fmt: skip
    memory = {} if config.kv_cache_gb is None else {"kv_cache_memory_bytes": int(config.kv_cache_gb * _GB)}
    return LLM(
        model=config.model_name_or_path,
        revision=config.revision,
        tokenizer_revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        dtype=_DTYPES[config.precision],
        tensor_parallel_size=config.tensor_parallel_size,
        max_model_len=None if config.max_length is None else config.max_length + 1,
        enable_prefix_caching=True,
        enforce_eager=config.enforce_eager,
        logprobs_mode="processed_logprobs" if over_answers_alone else "raw_logprobs",
        max_logprobs=2,
        seed=0,
        **memory,
    )


def _one_token(allowed: TokenIds) -> Any:
    """Ask for one of these tokens, with the log-probability of each."""
    from vllm import SamplingParams

    return SamplingParams(max_tokens=1, temperature=0.0, allowed_token_ids=list(allowed), logprobs=len(allowed))
