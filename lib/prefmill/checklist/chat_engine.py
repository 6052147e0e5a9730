"""The chat engine: servers with chat completions alone, whose answers are words among their likeliest tokens."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import msgspec

from prefmill.checklist.completions import RefusedError
from prefmill.checklist.engine import ChatConfig, Outcome
from prefmill.checklist.items import Checklist
from prefmill.checklist.prompted import Read, ReviewRequest
from prefmill.checklist.prompts import NO, YES, plain_prompt
from prefmill.checklist.server_engine import ServerEngine, as_logp, count_in, is_nothing
from prefmill.core.errors import InputError
from prefmill.core.records import Paper, Review
from prefmill.families.causal.thoughts import behind_thought

if TYPE_CHECKING:
    import httpx

_AROUND = re.compile(r"^[\W_ĠĊĉ]+|[\W_ĠĊĉ]+$")  # of a word as a token: marks, and white space as tokenizers spell it
_ANSWERS = (YES.casefold(), NO.casefold())
_BEGUN = {word[:end] for word in _ANSWERS for end in range(1, len(word))}
_MOST_BEGUN = 0.05  # of the mass on whole answers: what a token that only begins one may have
_MOST_UNSEEN = 0.05  # what an answer that is not listed may have: the twentieth of twenty tokens has no more
_NOTHING_SAID = (
    "is withheld or empty; where the model thinks first, give it room: engine.extra_body={max_completion_tokens: 2000}"
)
_VOTE_TOKENS = 4  # of a sampled answer: a word of several tokens and what stands before it
_LEAST_CUT = 1000  # tokens: no server in use cuts prompts to fewer
_LENGTHENING = " and so on" * 20  # makes a prompt longer by tokens that any tokenizer counts


class _Token(msgspec.Struct):
    token: str | None = None
    logprob: Any = None


class _Place(msgspec.Struct):
    token: str | None = None
    top_logprobs: list[_Token] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Place] | None = None


class _Choice(msgspec.Struct):
    """An answer, as far as it is read."""

    logprobs: _Logprobs | None = None
    message: dict[str, Any] | None = None
    finish_reason: str | None = None
    error: Any = None  # gateways put a provider's trouble here

    @property
    def refusal(self) -> str | None:
        """Why there is no answer, where the server or its model withholds one."""
        said = (self.message or {}).get("refusal") or self.error
        return str(said) if said else self.finish_reason if self.finish_reason in ("content_filter", "error") else None

    @property
    def is_of_a_thought(self) -> bool:
        """Whether the first token is of a thought that the server keeps apart: some list log-probabilities of it."""
        said, listed = self.message or {}, (self.logprobs and self.logprobs.content) or [_Place()]
        # A list of parts may begin with a thought, as Mistral's do.
        thought = said.get("reasoning_content") or said.get("reasoning") or isinstance(said.get("content"), list)
        return bool(thought) and not (self.first_word and self.first_word.startswith(_word(listed[0].token or "")))

    @property
    def first_word(self) -> str:
        """Of the answer; empty where there is none."""
        text = _text((self.message or {}).get("content")).strip()
        # Servers that keep no thought apart write it before the answer; R1's template opens it in the prompt.
        behind = behind_thought(text, "<think>" if "</think>" in text else "")
        words = (text if behind is None else behind).split()
        return _word(words[0]) if words and not self.refusal else ""


@dataclass(frozen=True)
class _ChatRequest(ReviewRequest):
    """`num_read` are the prompts' tokens as the server counts them."""

    paper: Paper | None = None
    num_read: set[int | None] = field(default_factory=set)


class ChatEngine(ServerEngine):
    """Asks every item of a review in a request of its own, as text.

    P(yes) is the mass of all spellings of yes among the `top_logprobs` likeliest tokens, over that of yes and no. With
    `top_logprobs: 0` it is the share of yes among `votes` answers sampled at temperature 1, with its standard error.
    A review whose answer is neither fails: the likeliest token is named.
    """

    name = "chat"

    def __init__(self, config: ChatConfig, checklist: Checklist) -> None:
        super().__init__(checklist, config, config.model_name_or_path)
        self._config = config
        self._longest_whole = 0  # tokens of the longest prompt known to have been read whole
        # Of all tokens: vLLM, transformers and Ollama else take the model's own 0.8 to 0.95, and draw no rare answer.
        self._of_all: dict[str, Any] = {"top_p": 1}

    def prompt(self, paper: Paper, review: Review) -> str:
        """What the server is asked about the first item."""
        return plain_prompt(paper, review["text"], self.checklist.items[0].question, self._config.include_paper)

    @property
    def cache_hit_rate(self) -> float | None:
        """Nobody knows: such servers tell it in ways of their own, or not."""
        return None

    def requests(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[ReviewRequest]:
        """A request for every review; whether it fits is for the server to say."""
        for paper, reviews in papers:
            for review in reviews:
                yield _ChatRequest(review["review_id"], review["paper_id"], (), (), review["text"], paper=paper)

    async def outcome(self, client: httpx.AsyncClient, request: ReviewRequest) -> Outcome:
        """The items one after the other, so that a server with a prefix cache reads the review once."""
        assert isinstance(request, _ChatRequest)
        assert request.paper is not None
        found = []
        for item in self.checklist.items:
            text = plain_prompt(request.paper, request.text, item.question, self._config.include_paper)
            found.append(await (self._likeliest if self._config.top_logprobs else self._voted)(client, text, request))
        await self._require_whole(client, text, request)
        return request.outcome(self.checklist.ids, found)

    async def _require_whole(self, client: httpx.AsyncClient, text: str, request: _ChatRequest) -> None:
        """Raise RefusedError where a longer prompt than `text`, the last one, has no more tokens: both were cut.

        So Ollama does in silence: it drops the beginning, the review's, and answers about the rest. Only prompts longer
        than all before, and of one number of tokens for all items, are in doubt.
        """
        (num, *others) = request.num_read
        if others or num is None or num < _LEAST_CUT or num <= self._longest_whole:
            return
        longer = replace(request, num_read=set())
        with contextlib.suppress(RefusedError):  # a server that refuses what is too long cuts nothing
            await self._ask(client, text + _LENGTHENING, {"max_tokens": 1, "temperature": 0}, longer)
        if longer.num_read == request.num_read:
            raise RefusedError(
                f"the server read {num} tokens of every prompt, whatever its length: it cuts prompts to its context. "
                "Serve a longer one (Ollama: OLLAMA_CONTEXT_LENGTH)"
            )
        self._longest_whole = max(num, self._longest_whole)

    async def _likeliest(self, client: httpx.AsyncClient, text: str, request: _ChatRequest) -> Read:
        """P(yes) and mass from the likeliest first tokens."""
        asked = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": self._config.top_logprobs}
        (choice, *_) = await self._ask(client, text, asked, request)
        if choice.refusal:
            raise RefusedError(f"the server withholds an answer: {self._server.shown(choice.refusal)}")
        if choice.is_of_a_thought:
            raise RefusedError(
                "the log-probabilities are of the model's thought: turn it off, as with engine.extra_body="
                "{chat_template_kwargs: {enable_thinking: false}}, or set engine.top_logprobs=0 and give it room"
            )
        places = choice.logprobs and choice.logprobs.content
        return self._read((places and places[0].top_logprobs) or [])

    def _read(self, listed: Sequence[_Token]) -> Read:
        # Servers that list the sampled token beside the likeliest ones list it twice: it has its probability once.
        tokens = list({(token.token, repr(token.logprob)): token for token in listed}.values())
        found = [(_word(token.token), token.logprob, as_logp(token.logprob)) for token in tokens]
        shares = [(word, math.exp(logp)) for word, _, logp in found if logp is not None]
        # Without a number, as with NaN, nobody knows how much an answer has.
        unknown = any(word in _ANSWERS and logp is None and not is_nothing(said) for word, said, logp in found)
        # Different tokens share 1 at most: a server that writes 0 for each would give every one probability 1.
        if unknown or not shares or sum(share for _, share in shares) > 1.01:
            raise InputError(
                "the server gives no log-probabilities", where=self._server.url, got=f"{list(tokens)[:3]}",
                expected=f"those of its {self._config.top_logprobs} likeliest tokens (engine.top_logprobs)",
                fix="set engine.top_logprobs=0 to count sampled answers, or use a server that gives them",
            )  # fmt: skip
        yes, no = (sum(share for word, share in shares if word == answer) for answer in _ANSWERS)
        begun = sum(share for word, share in shares if word in _BEGUN)
        if begun > _MOST_BEGUN * (yes + no):
            raise RefusedError(
                f"tokens that only begin {YES} or {NO} have probability {begun:.2g}: set engine.top_logprobs=0"
            )
        if not yes + no:
            # A model that opens a thought ends up here: its likeliest token tells a reader why.
            likeliest = max(shares, key=lambda pair: pair[1])[0]
            raise RefusedError(f"neither {YES} nor {NO} among the {len(shares)} likeliest tokens, first {likeliest!r}")
        # No token that is not listed is likelier than one that is; a server may list fewer than it was asked for.
        told = [share for _, share in shares]
        if not min(yes, no) and (unseen := min(*told, 1 - sum(told))) > _MOST_UNSEEN:
            raise RefusedError(
                f"only one answer is among the {len(told)} likeliest tokens, the other may have probability "
                f"{unseen:.2g}: set engine.top_logprobs higher, or to 0"
            )
        return Read(yes / (yes + no), min(1.0, yes + no))

    async def _voted(self, client: httpx.AsyncClient, text: str, request: _ChatRequest) -> Read:
        """P(yes) as a share of sampled answers. Its error is of (yes + 1) / (n + 2), as all alike is not certain."""
        words: list[str] = []
        while len(words) < self._config.votes:  # a server that knows no `n` gives one at a time
            num_left = self._config.votes - len(words)
            asked = {"max_tokens": _VOTE_TOKENS, "temperature": 1, **self._of_all, "n": num_left}
            try:
                choices = await self._ask(client, text, asked, request, len(words))
            except RefusedError as refusal:
                if "top_p" not in asked or "top_p" not in str(refusal):
                    raise
                self._of_all = {}  # models that take none (OpenAI's and Claude's newer ones) draw of all tokens
                continue
            # At least one choice comes each time (else _ask raises), so this loop ends.
            words += [choice.first_word for choice in choices]
        yes, no = map(words.count, _ANSWERS)
        if yes + no < len(words) / 2:  # those that happen to begin with one of the two do not speak for the rest
            other = next(word for word in words if word not in _ANSWERS)
            said = f"begins with {other!r}" if other else _NOTHING_SAID
            raise RefusedError(f"{yes + no} of {len(words)} sampled answers are {YES} or {NO}, one {said}")
        # Agresti and Coull 1998: the plain standard error would be 0 where all votes agree.
        smoothed = (yes + 1) / (yes + no + 2)
        stderr = math.sqrt(smoothed * (1 - smoothed) / (yes + no))
        return Read(yes / (yes + no), (yes + no) / len(words), stderr)

    async def _ask(
        self,
        client: httpx.AsyncClient,
        text: str,
        asked: Mapping[str, Any],
        request: _ChatRequest,
        num_before: int = 0,
    ) -> list[_Choice]:
        """The choices, at least one, behind `num_before`; raises InputError where there is none."""
        messages = [{"role": "user", "content": text}]
        # extra_body comes last, so that a user's key wins over ours, and null takes ours out.
        extra = self._config.extra_body
        given = {"model": self._model, "messages": messages, **asked, **extra}
        body = {key: value for key, value in given.items() if value is not None}
        if "max_completion_tokens" in extra:
            body.pop("max_tokens", None)  # newer servers refuse both names of one limit together
        if type(extra.get("seed")) is int:  # asked for one vote at a time, the same seed gives the same vote
            body["seed"] += num_before
        content = await self._server.ask(client, "POST", "chat/completions", body)
        self.num_requests += 1
        num_read = count_in(content, "usage", "prompt_tokens")
        self.num_prompt_tokens += num_read or 0
        self.num_answer_tokens += count_in(content, "usage", "completion_tokens") or 0
        request.num_read.add(num_read)
        self.check_model(content)
        try:
            choices = msgspec.convert(content.get("choices") or [], list[_Choice])
        except msgspec.ValidationError:  # another form than OpenAI's, where a field is a list instead of a mapping
            choices = []
        if not choices:
            raise InputError(
                "the server did not answer every prompt", where=self._server.url, got=self._server.shown(str(content)),
                expected="a choice", fix="use a server that speaks OpenAI's chat completions",
            )  # fmt: skip
        return choices


def _text(content: Any) -> str:
    """What a message says; of a list of parts its texts, without the thoughts beside them."""
    if not isinstance(content, list):
        return str(content or "")
    parts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
    return " ".join(str(part.get("text") or "") for part in parts)


def _word(token: Any) -> str:
    """The word that a token or an answer is, without case, spaces and marks around it."""
    return _AROUND.sub("", str(token)).casefold()
