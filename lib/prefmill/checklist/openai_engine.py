"""The openai engine: the prompts of the other engines, as token ids, to a server that speaks OpenAI's completions."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from prefmill.checklist.engine import OpenAIConfig, Outcome
from prefmill.checklist.evidence import SCHEMA
from prefmill.checklist.items import Checklist
from prefmill.checklist.prompted import Fit, Read, ReviewRequest, longest_prompt, prompts_for, read_of, yes_places
from prefmill.checklist.prompts import TokenIds
from prefmill.checklist.server_engine import ServerEngine, as_logp, count_in
from prefmill.core.errors import InputError
from prefmill.core.records import Paper, Review

if TYPE_CHECKING:
    import httpx


class OpenAIEngine(ServerEngine):
    """Asks every item of a review in one request of many prompts, so that a review is answered as a whole or not.

    Prompts are token ids made here: a server that applied its chat template to text would read a marker in a hostile
    review as one. It must know vLLM's `allowed_token_ids`, and give the log-probabilities of both answers: vLLM does
    so by `logprob_token_ids`, or when started with `--logprobs-mode processed_logprobs`. A missing one is an error.
    """

    name = "openai"

    def __init__(self, config: OpenAIConfig, checklist: Checklist) -> None:
        super().__init__(checklist, config, config.served_model_name or config.model_name_or_path)
        self._config = config
        self._tells_cached = True
        self.prompts = prompts_for(config, checklist)
        answers = self.prompts.answers
        if not answers.single:
            raise InputError(
                "this tokenizer spells yes or no in several tokens", where=config.model_name_or_path,
                got=f"yes {answers.yes}, no {answers.no}", expected="one token each, for the engine openai",
                fix="use engine transformers or vllm, which sum over them, or another model",
            )  # fmt: skip
        self._yes, self._no = ((ids[0], self.prompts.written(ids)) for ids in (answers.yes, answers.no))
        longest = self.served_model().get("max_model_len")
        context = longest - 1 if isinstance(longest, int) else None  # the answer's token has its place too
        self._fit = Fit(self.prompts, longest_prompt(context, config.max_length), config.truncate_reviews)

    @property
    def cache_hit_rate(self) -> float | None:
        """As the server tells it, rather too low than too high; None where it does not (vLLM: see the stage's page)."""
        return super().cache_hit_rate if self._tells_cached else None

    def requests(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[ReviewRequest]:
        """The reviews as tokens that fit the server's model."""
        return self._fit.requests(papers)

    async def outcome(self, client: httpx.AsyncClient, request: ReviewRequest) -> Outcome:
        """A review's answers: one request for all items, and one for the evidence of each yes."""
        choices = await self._ask(client, request, self.prompts.questions, self._one_token())
        found = [self._read(choice) for choice in choices]
        places = yes_places(found) if self._config.evidence else []
        quotes = [self.prompts.quotes[place] for place in places]
        written = await self._ask(client, request, quotes, self._json()) if quotes else []
        texts = {place: str(choice.get("text")) for place, choice in zip(places, written, strict=True)}
        return request.outcome(self.checklist.ids, found, texts)

    async def _ask(
        self, client: httpx.AsyncClient, request: ReviewRequest, behind: Sequence[TokenIds], sampling: dict[str, Any]
    ) -> list[dict[str, Any]]:
        """The server's choices for a review with each of `behind` after it, as one request, in order."""
        before = request.shared + request.review
        prompts = [[*before, *ids] for ids in behind]
        body = {"model": self._model, "prompt": prompts, "temperature": 0, **sampling}
        content = await self._server.ask(client, "POST", "completions", body)
        self.check_model(content)
        self._count(prompts, content)
        return self._choices(content, len(prompts))

    def _one_token(self) -> dict[str, Any]:
        """Ask for one token, yes or no, with the log-probabilities of both."""
        both = [self._yes[0], self._no[0]]
        return {
            "max_tokens": 1,
            "logprobs": len(both),
            # For servers without logprob_token_ids too: of processed log-probabilities these are the likeliest two.
            "allowed_token_ids": both,
            "logprob_token_ids": both,
            # Several tokens may have the same text, and would be one key of top_logprobs.
            "return_tokens_as_token_ids": True,
        }

    def _json(self) -> dict[str, Any]:
        """Ask for a quote as JSON."""
        return {"max_tokens": self._config.evidence_max_tokens, "structured_outputs": {"json": SCHEMA}}

    def _count(self, prompts: list[list[int]], content: dict[str, Any]) -> None:
        """Add a request's tokens; raises InputError where the server has read others than were sent.

        vLLM gives the cached tokens of the last prompt alone; the first of a review has fewer and is not counted, so
        that the hit rate is never shown too high. A number longer than a prompt is the sum over all.
        """
        lengths = [len(prompt) for prompt in prompts]
        sent = sum(lengths)
        # A server that adds a first token or a chat template would silently answer about another text.
        read = count_in(content, "usage", "prompt_tokens")
        if read not in (None, sent):
            raise InputError(
                "the server read other prompts than were sent", where=self._server.url,
                got=f"{read} tokens", expected=f"{sent} tokens",
                fix="use a server that takes token ids as they are, as vLLM does",
            )  # fmt: skip
        self.num_requests += len(prompts)
        self.num_prompt_tokens += sent
        self.num_answer_tokens += count_in(content, "usage", "completion_tokens") or 0
        cached = count_in(content, "usage", "prompt_tokens_details", "cached_tokens")
        self._tells_cached &= cached is not None
        if cached is not None:
            is_whole = len(lengths) == 1 or cached > max(lengths)
            self.num_cached_tokens += cached if is_whole else cached * (len(lengths) - 1)

    def _choices(self, content: dict[str, Any], num_prompts: int) -> list[dict[str, Any]]:
        """What the server answers to each prompt; raises InputError where an answer is missing."""
        choices = content.get("choices") or []
        # OpenAI's interface does not promise the order of the prompts: the index tells which one is answered.
        by_index = {choice.get("index"): choice for choice in choices if isinstance(choice, dict)}
        if by_index.keys() != set(range(num_prompts)):
            raise InputError(
                "the server did not answer every prompt", where=self._server.url, got=f"{len(choices)} answers",
                expected=f"{num_prompts} answers", fix="use a server that takes a list of prompts, as vLLM does",
            )  # fmt: skip
        return [by_index[index] for index in range(num_prompts)]

    def _read(self, choice: dict[str, Any]) -> Read:
        """One answer; raises InputError where it is neither yes nor no or a log-probability is missing."""
        if choice.get("text") not in (self._yes[1], self._no[1]):
            raise InputError(
                "the server answered something else than was allowed", where=self._server.url,
                got=repr(choice.get("text")), expected=f"{self._yes[1]} or {self._no[1]}",
                fix="engine.model_name_or_path must be the served model, and the server must know allowed_token_ids",
            )  # fmt: skip
        try:
            found = dict(choice["logprobs"]["top_logprobs"][0])
        except (LookupError, TypeError, ValueError):  # none, or in another form than that of completions
            found = {}
        yes, no = (as_logp(found.get(f"token_id:{index}", found.get(text))) for index, text in (self._yes, self._no))
        # Two answers share 1 at most: more are no natural logarithms.
        if yes is None or no is None or math.exp(yes) + math.exp(no) > 1.01:
            raise InputError(
                "an answer's log-probability is missing or none", where=self._server.url, got=f"{found}",
                expected=f"those of {self._yes[1]} and {self._no[1]}",
                fix="start the server with --logprobs-mode processed_logprobs (vLLM)",
            )  # fmt: skip
        return read_of(yes, no)
