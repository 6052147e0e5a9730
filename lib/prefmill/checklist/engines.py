"""What a scoring engine is, how one is configured and opened, and the row its answers become."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from prefmill.causal.loading import Precision
from prefmill.checklist.items import Checklist
from prefmill.config import StrictConfig
from prefmill.errors import InputError
from prefmill.records import Answer, Paper, Review, ReviewEvaluation

IncludePaper = Literal["none", "title_abstract", "text"]


class LexicalConfig(StrictConfig):
    """Rules over the review's sentences: no model, thousands of reviews a second, a baseline."""

    engine: Literal["lexical"] = "lexical"
    evidence: bool = Field(True, description="quote the sentence behind each yes")


class TransformersConfig(StrictConfig):
    """A causal language model's next-token probabilities of yes and no, through transformers."""

    engine: Literal["transformers"] = "transformers"
    model_name_or_path: str = Field(description="folder or hub name of a model with a chat template")
    revision: str | None = Field(None, description="of a hub model")
    trust_remote_code: bool = Field(False, description="run the hub model's own code")
    attn_implementation: str | None = Field(None, description="as transformers names it; none: its choice")
    precision: Precision = Field("fp32", description="bf16 is faster on a GPU, and moves probabilities a little")
    include_paper: IncludePaper = Field("none", description="what of the paper stands before the review")
    max_length: int | None = Field(None, ge=1, description="tokens of a whole prompt; none: the model's context")
    truncate_reviews: bool = Field(False, description="cut over-long reviews at their end, and report them")
    item_batch_size: int = Field(32, ge=1, description="items asked together; lower it when memory runs out")


class VllmConfig(StrictConfig):
    """As `transformers`, through vLLM: on GPUs, or in its CPU build. More GPUs: more shards, or tensor parallel."""

    engine: Literal["vllm"] = "vllm"
    model_name_or_path: str = Field(description="folder or hub name of a model with a chat template")
    revision: str | None = Field(None, description="of a hub model")
    trust_remote_code: bool = Field(False, description="run the hub model's own code")
    precision: Precision = Field("bf16", description="fp32 where a result must not depend on its neighbours at all")
    include_paper: IncludePaper = Field("none", description="what of the paper stands before the review")
    max_length: int | None = Field(None, ge=1, description="tokens of a whole prompt; none: the model's context")
    truncate_reviews: bool = Field(False, description="cut over-long reviews at their end, and report them")
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share the model")
    kv_cache_gb: float | None = Field(None, gt=0, description="memory of the cache; none: what vLLM finds free")
    enforce_eager: bool = Field(False, description="no graphs: a quicker start, slower steps")
    reviews_in_flight: int = Field(64, ge=1, description="reviews asked about at a time, and redone after a kill")


AnyEngineConfig = LexicalConfig | TransformersConfig | VllmConfig
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

    @abstractmethod
    def score(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[Outcome]:
        """One outcome for every review, in the order given and not later than needed; failures do not raise.

        A review's outcome depends on that review, its paper and the checklist alone, not on its neighbours.
        """

    def evaluate(self, papers: Iterable[tuple[Paper, Sequence[Review]]]) -> Iterator[ReviewEvaluation]:
        """The evaluation of every review, in the order given; raises InputError on the first that failed."""
        for outcome in self.score(papers):
            if outcome.failure is not None:
                raise InputError(
                    "a review could not be scored", where=f"review {outcome.review_id} of paper {outcome.paper_id}",
                    got=outcome.failure, fix="shorten it, or set the engine's truncate_reviews=true",
                )  # fmt: skip
            yield self.evaluation(outcome)

    def evaluation(self, outcome: Outcome) -> ReviewEvaluation:
        """The row of a review that was scored."""
        answers = dict(outcome.answers)
        return {
            "review_id": outcome.review_id,
            "paper_id": outcome.paper_id,
            "answers": answers,
            "checkmark_score": sum(item.weight for item in self.checklist.items if answers[item.id]["yes"]) + 0.0,
            "mean_p_yes": round(sum(answer["p_yes"] for answer in answers.values()) / len(answers), 6),
            "engine": self.name,
        }


def open_engine(config: AnyEngineConfig, checklist: Checklist) -> Engine:
    """The engine of `config`, ready to answer `checklist`; raises ConfigError or InputError where it cannot."""
    if isinstance(config, LexicalConfig):
        from prefmill.checklist.lexical import LexicalEngine

        return LexicalEngine(config, checklist)
    if isinstance(config, VllmConfig):
        from prefmill.checklist.vllm_engine import VllmEngine

        return VllmEngine(config, checklist)
    from prefmill.checklist.transformers_engine import TransformersEngine

    return TransformersEngine(config, checklist)
