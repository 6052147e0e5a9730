"""What a scoring engine is, how one is configured, and the row its answers become."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from prefmill.checklist.items import Checklist
from prefmill.core.config import StrictConfig, runtime
from prefmill.core.errors import InputError
from prefmill.core.precision import Precision
from prefmill.core.records import Answer, Paper, Review, ReviewEvaluation
from prefmill.core.variables import HIDDEN, VariableName
from prefmill.families.causal.templates import ChatTemplate

_SECRETS = {"api_key", "apikey", "access_token", "authorization"}
IncludePaper = Literal["none", "title_abstract", "text"]


class LexicalConfig(StrictConfig):
    """Rules over the review's sentences: no model, about a thousand reviews per second, a baseline."""

    engine: Literal["lexical"] = "lexical"
    evidence: bool = Field(True, description="quote the sentence behind each yes")


class JudgeConfig(ChatTemplate):
    """What every engine with a model is told: whose tokens prompts are made of, and what stands in a prompt."""

    unread_with = {"evidence=false": ("evidence_max_tokens",)}
    model_name_or_path: str = Field(description="folder or hub name of a model with a chat template")
    revision: str | None = Field(None, description="of a hub model")
    trust_remote_code: bool = Field(False, description="run the hub model's own code")
    include_paper: IncludePaper = Field("none", description="what of the paper stands before the review")
    max_length: int | None = Field(None, ge=1, description="tokens of a whole prompt; none: the model's context")
    truncate_reviews: bool = Field(False, description="cut over-long reviews at their end, and report them")
    evidence: bool = Field(False, description="a second pass in which the model quotes what shows each yes")
    evidence_max_tokens: int = Field(128, ge=1, description="of a quote's JSON; a longer one is no evidence")

    @property
    def quote_tokens(self) -> int | None:
        """Tokens of a quote; None where none is asked for."""
        return self.evidence_max_tokens if self.evidence else None


class TransformersConfig(JudgeConfig):
    """A causal language model's next-token probabilities of yes and no, through transformers."""

    engine: Literal["transformers"] = "transformers"
    attn_implementation: str | None = Field(None, description="as transformers names it; none: its choice")
    precision: Precision = Field("fp32", description="bf16 is faster on a GPU, and moves probabilities a little")
    item_batch_size: int = Field(32, ge=1, description="items asked together; lower it when memory runs out")


class VllmConfig(JudgeConfig):
    """As `transformers`, through vLLM: on GPUs, or in its CPU build. More GPUs: more shards, or tensor parallel."""

    engine: Literal["vllm"] = "vllm"
    precision: Precision = Field("bf16", description="fp32 where a result must not depend on its neighbours at all")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share the model")
    kv_cache_gb: float | None = Field(None, gt=0, description="memory of the cache; none: what vLLM finds free")
    enforce_eager: bool = Field(False, description="no graphs: a quicker start, slower steps")
    reviews_in_flight: int = Field(64, ge=1, description="reviews asked about at a time")


class ServerConfig(StrictConfig):
    """A server that speaks one of OpenAI's interfaces, and how it is asked."""

    # All of this is left out of a task's identity: another address for the same model makes nothing stale.
    base_url_env: VariableName = runtime("OPENAI_BASE_URL", description="the variable that holds the server's URL")
    api_key_env: VariableName = runtime("OPENAI_API_KEY", description="the variable that holds its key")
    reviews_in_flight: int = runtime(16, ge=1, description="reviews asked about at a time, each with all its items")
    num_retries: int = runtime(8, ge=0, description="of a request, with growing waits, where the server has trouble")
    timeout_seconds: float = runtime(600.0, gt=0, description="for an answer, the time in the server's queue included")


class OpenAIConfig(JudgeConfig, ServerConfig):
    """The same prompts and answers through a server that speaks OpenAI's completions; its tokenizer is read here."""

    engine: Literal["openai"] = "openai"
    served_model_name: str | None = Field(None, min_length=1, description="the server's name for the model, if another")


class ChatConfig(ServerConfig):
    """A server that has chat completions alone: prompts are text, and answers are words among its likeliest tokens."""

    unread_with = {"top_logprobs": ("votes",)}
    engine: Literal["chat"] = "chat"
    model_name_or_path: str = Field(min_length=1, description="the server's name for the model")
    include_paper: IncludePaper = Field("none", description="what of the paper stands before the review")
    # 20 is the most that OpenAI's own interface gives.
    top_logprobs: int = Field(20, ge=0, le=20, description="as many as the server gives; 0: none, count sampled votes")
    votes: int = Field(16, ge=2, description="answers sampled an item where top_logprobs is 0")
    extra_body: dict[str, Any] = Field({}, description="more of a request, such as {max_completion_tokens: 1}")

    @field_validator("extra_body")
    @classmethod
    def _leaves_the_question(cls, extra: dict[str, Any]) -> dict[str, Any]:
        if taken := sorted(extra.keys() & {"messages", "model", "stream"}):
            raise ValueError(f"extra_body: {taken[0]} is of the request itself, leave it out")
        if secret := [key for key in extra if key.lower().replace("-", "_") in _SECRETS]:
            said = f"{secret[0]} would be recorded: give it in the variable that api_key_env names"
            raise PydanticCustomError(HIDDEN, said)
        return extra

    @model_validator(mode="after")
    def _samples_its_votes(self) -> Self:
        if not self.top_logprobs and self.extra_body.get("temperature") == 0:
            raise ValueError("temperature 0 in extra_body samples no votes, leave it out (top_logprobs is 0)")
        return self


AnyEngineConfig = LexicalConfig | TransformersConfig | VllmConfig | OpenAIConfig | ChatConfig
# With a discriminator pydantic reports the named engine's faults alone, not those of all five.
EngineConfig = Annotated[AnyEngineConfig, Field(discriminator="engine")]


@dataclass(frozen=True)
class Outcome:
    """What became of one review: its answers by item id, or why it has none; `num_cut_tokens` were not read."""

    review_id: str
    paper_id: str
    answers: Mapping[str, Answer]
    failure: str | None = None
    num_cut_tokens: int = 0


class Engine(ABC):
    """Answers a checklist for reviews. `name` goes into every row."""

    name: ClassVar[str]

    def __init__(self, checklist: Checklist) -> None:
        self.checklist = checklist
        self.temperature: float | None = None  # of judge_quality; yes and no do not depend on it
        self.num_requests = 0  # an item asked about a review
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0  # of the prompts' tokens, those that were not read again
        self.num_answer_tokens = 0  # as a server counts them, thoughts included

    @abstractmethod
    def score(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[Outcome]:
        """One outcome for every review, in the order given and not later than needed; failures do not raise.

        A review's outcome depends on that review, its paper and the checklist alone, not on its neighbours.
        """

    def score_as_done(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[Outcome]:
        """The same outcomes as soon as each is there, in any order: for a caller who keeps what is done."""
        return self.score(papers)

    def prompt(self, paper: Paper, review: Review) -> str | None:
        """What a model is shown to answer the first item, for people to read; None where there is no model."""
        return None

    @property
    def label(self) -> str:
        """What rows say of it: its name, and of a server the model that answers, where that has another name."""
        return self.name

    def remember(self, folder: Path) -> None:  # noqa: B027 (a model that is loaded here has nothing to remember)
        """Refuse answers by another model than that of earlier attempts, whose rows `folder` keeps."""

    def tell_costs(self) -> None:
        """Print what a server was asked, by which it is paid."""
        if self.num_answer_tokens:
            counts = f"{self.num_prompt_tokens:,} tokens of prompts, {self.num_answer_tokens:,} of answers"
            print(f"{self.label} was asked {self.num_requests:,} times: {counts}", flush=True)

    @property
    def cache_hit_rate(self) -> float | None:
        """The share of the prompts' tokens that came from a cache, in [0, 1]; None where nobody knows."""
        return self.num_cached_tokens / self.num_prompt_tokens if self.num_prompt_tokens else None

    def evaluate(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[ReviewEvaluation]:
        """The evaluation of every review, in the order given; raises InputError on the first that failed."""
        for outcome in self.score(papers):
            if outcome.failure is not None:
                raise InputError(
                    "a review could not be scored", where=f"review {outcome.review_id} of paper {outcome.paper_id}",
                    got=outcome.failure,
                    fix="shorten it, set the engine's truncate_reviews=true, or serve a longer context to engine chat",
                )  # fmt: skip
            yield self.evaluation(outcome)

    def evaluation(self, outcome: Outcome) -> ReviewEvaluation:
        """The row of a review that was scored, every p_yes tempered where there is a temperature."""
        answers = self._tempered(outcome.answers)
        return {
            "review_id": outcome.review_id, "paper_id": outcome.paper_id, "answers": answers,
            # Adding 0.0: the sum of no yes is the integer 0, and a score is always a float.
            "checkmark_score": sum(item.weight for item in self.checklist.items if answers[item.id]["yes"]) + 0.0,
            "mean_p_yes": round(sum(answer["p_yes"] for answer in answers.values()) / len(answers), 6),
            "engine": self.label,
        }  # fmt: skip

    def _tempered(self, answers: Mapping[str, Answer]) -> dict[str, Answer]:
        if self.temperature is None:
            return dict(answers)
        # Imported here, as it needs numpy, which neither rules nor the configuration load.
        from prefmill.checklist.calibration import temper

        return temper(answers, self.temperature)
