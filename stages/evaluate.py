"""Generates reviews of the held-out papers with one model, scores them with the checklist and measures them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from pydantic import Field, model_validator

from prefmill.checklist.engine import AnyEngineConfig, EngineConfig, LexicalConfig
from prefmill.checklist.items import ChecklistFile
from prefmill.checklist.judge_gate import JudgeGate
from prefmill.core.config import later, runtime
from prefmill.core.errors import ConfigError
from prefmill.core.precision import Precision
from prefmill.core.records import Modality
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.evaluation.generators import GenerationEngine, TransformersGeneration
from prefmill.evaluation.rows import HUMAN
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.templates import ChatTemplate
from prefmill.reviews.scale import RatingUnit

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefmill.checklist.items import Checklist
    from prefmill.core.records import ReviewEvaluation
    from prefmill.evaluation.held_out import HeldOut
    from prefmill.evaluation.rows import Generation

TRAINED = ("sft", "dpo")


class EvaluateConfig(ImageLimits, ChatTemplate):
    """Which model to evaluate, how it writes and how its reviews are judged."""

    unread_with = {"temperature=0.0": ("top_p",), "generation.engine=vllm": ("attn_implementation",)}
    model: str = Field(
        description="the model's label: base, sft, dpo or any other; `human` takes the reviews people wrote",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
    )
    modality: Modality = Field("clean", description="what the model is shown of a paper")
    model_name_or_path: str | None = Field(None, description="folder or hub name, where no checkpoint is given")
    revision: str | None = Field(None, description="of a hub model")
    trust_remote_code: bool = Field(False, description="run the hub model's own code")
    attn_implementation: str | None = Field(None, description="as transformers names it; none: its choice")
    precision: Precision = Field("bf16", description="fp32 where results must not depend on the batch size")
    num_papers: int | None = Field(None, ge=2, description="test papers to draw, the same for every model; none: all")
    samples_per_paper: int = Field(1, ge=1, description="reviews to generate for each paper")
    max_prompt_tokens: int | None = Field(None, ge=1, description="leave papers with longer prompts out, counted")
    max_new_tokens: int = Field(1024, ge=1, description="where a review is cut off")
    temperature: float = Field(0.7, ge=0, description="0 takes the likeliest token")
    top_p: float = Field(0.95, gt=0, le=1, description="draw from the smallest set of tokens with this mass")
    batch_size: int = Field(8, ge=1, description="reviews generated together")
    generation: GenerationEngine = Field(TransformersGeneration(), description="what writes: transformers or vllm")
    seed: int = Field(0, description="of the papers drawn and of the tokens")
    engine: EngineConfig = Field(LexicalConfig(), description="the checklist engine; see score_reviews")
    second_engine: EngineConfig | None = Field(None, description="scores them too, to see how far engines agree")
    checklist: ChecklistFile = Field(None, description="as in score_reviews; none: the shipped 24 items")
    accept_rating: float = Field(6.0, description="a rating from here on recommends acceptance, in the rating_unit")
    rating_unit: RatingUnit = later(
        "points", description="points of a scale of 1 to 10, or quantiles (0 to 1) of the venue's own ratings"
    )
    judge: JudgeGate = runtime(JudgeGate(), description="when a model's answers are not believed; as in score_reviews")

    @model_validator(mode="after")
    def _fits_its_unit(self) -> Self:
        if self.rating_unit == "quantiles" and not 0 < self.accept_rating < 1:
            raise ValueError("with rating_unit: quantiles, accept_rating is a share, such as accept_rating: 0.6")
        return self

    @model_validator(mode="after")
    def _are_draws(self) -> Self:
        if self.samples_per_paper > 1 and self.temperature == 0:
            raise ValueError("at temperature 0 all samples_per_paper are the same review: raise it, or write one")
        return self

    @model_validator(mode="after")
    def _two_engines(self) -> Self:
        if self.second_engine == self.engine:
            raise ValueError("second_engine is the same as engine: it would agree with itself")
        return self

    def gate(self, engine: AnyEngineConfig) -> JudgeGate | None:
        """When answers of this engine are not believed; rules always are."""
        if isinstance(engine, LexicalConfig):
            return None
        return self.judge if self.model == HUMAN else self.judge.mass_alone


def run(config: EvaluateConfig, task: Task) -> Metrics:
    """Write `generations.jsonl`, the engines' answers and `metrics.json`; the metrics are the overall figures."""
    from prefmill.checklist.calibration import read_temperature
    from prefmill.checklist.engines import open_engine
    from prefmill.checklist.score import choose_checklist
    from prefmill.core.statistics import Resampling
    from prefmill.evaluation.engine_agreement import engine_agreement
    from prefmill.evaluation.held_out import AcceptRule, human_generations, read_held_out, score_generations
    from prefmill.evaluation.lineage import check_training
    from prefmill.evaluation.record import write_evaluation

    settings = config.engine.model_dump(mode="json")
    temperature = read_temperature(task.optional_input("calibration"), settings)
    held_out = read_held_out(task.input("corpus"), config.num_papers, config.seed, config.modality)
    training = check_training(task.optional_input("checkpoint"), held_out.papers, task.output)
    is_human = config.model == HUMAN
    generations = human_generations(held_out) if is_human else _write_reviews(config, task, held_out)
    checklist = choose_checklist(config.checklist, task.optional_input("checklist"))
    second = _score_again(config, task, held_out, generations, checklist) if config.second_engine else None
    engine, gate = open_engine(config.engine, checklist, temperature), config.gate(config.engine)
    evaluations = score_generations(generations, held_out.papers, engine, checklist.ids, task.work, task.advance, gate)
    heading = {
        "model": config.model,
        "modality": config.modality,
        "generated_with": None if is_human else config.generation.engine,
        "engine": engine.label,
        "engine_temperature": temperature,
        "agreement": second and engine_agreement(generations, evaluations, second, Resampling(seed=config.seed)),
        "training": training,
        "num_papers_left_out": len(held_out.papers) - len({row["paper_id"] for row in generations}),
    }
    accept = AcceptRule.of(task.input("corpus"), config.accept_rating, config.rating_unit)
    metrics = write_evaluation(task.output, heading, generations, evaluations, held_out, checklist, accept)
    return {"num_papers": metrics["num_papers"], "num_reviews": metrics["num_reviews"], **metrics["overall"]}


def _score_again(
    config: EvaluateConfig, task: Task, held_out: HeldOut, generations: Sequence[Generation], checklist: Checklist
) -> list[ReviewEvaluation]:
    from prefmill.evaluation.engine_agreement import SECOND_EVALUATIONS, score_again
    from prefmill.store.jsonl import write_jsonl

    assert config.second_engine is not None
    gate = config.gate(config.second_engine)
    rows = score_again(generations, held_out.papers, config.second_engine, checklist, task.work, task.advance, gate)
    write_jsonl(task.output / SECOND_EVALUATIONS, rows)
    return rows


def _write_reviews(config: EvaluateConfig, task: Task, held_out: HeldOut) -> list[Generation]:
    from prefmill.evaluation.model_reviews import ModelSource, Writing, write_reviews
    from prefmill.families.causal.generation import Sampling

    source = ModelSource(
        name_or_path=_model_of(config, task),
        precision=config.precision,
        revision=config.revision,
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        template=config,
        today=task.began_on,
    )
    writing = Writing(
        modality=config.modality,
        images=task.input("corpus").path,
        limits=ImageLimits(min_pixels=config.min_pixels, max_pixels=config.max_pixels),
        samples_per_paper=config.samples_per_paper,
        max_prompt_tokens=config.max_prompt_tokens,
        batch_size=config.batch_size,
        sampling=Sampling(config.max_new_tokens, config.temperature, config.top_p, config.seed),
        generation=config.generation,
    )
    return write_reviews(source, held_out.papers, writing, task.work, task.advance)


def _model_of(config: EvaluateConfig, task: Task) -> str:
    """The checkpoint's folder, or the configured model; a trained stage's label must not fall back on another model."""
    checkpoint = task.optional_input("checkpoint")
    if checkpoint is not None:
        return str(checkpoint.path)
    if config.model_name_or_path is None or config.model in TRAINED:
        raise ConfigError(
            f"no checkpoint for model '{config.model}'", where=task.key,
            got=config.model_name_or_path and f"only model_name_or_path = {config.model_name_or_path}",
            expected="a checkpoint as input, or for labels other than sft and dpo a model_name_or_path",
            fix="name its stage under needs.checkpoint, give inputs.checkpoint=FOLDER, or use another label",
        )  # fmt: skip
    return config.model_name_or_path


STAGE = Stage(
    name="evaluate",
    config=EvaluateConfig,
    run=run,
    root="data",
    writes="evaluation",
    reads={
        "corpus": Reads("review_corpus", "ingest_reviews"),
        "checkpoint": Reads("checkpoint", match="elementwise", optional=True),
        "checklist": Reads("checklist", "optimize_checklist", optional=True),
        "calibration": Reads("judge_quality", optional=True),  # named by a pipeline that fits one
    },
    preload=("torch", "transformers"),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
