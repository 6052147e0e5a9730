"""The configuration of mdlm_evaluate; importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, field_validator, model_validator

from prefmill.core.config import ExternalPath, StrictConfig, runtime
from prefmill.core.precision import Precision
from prefmill.families.mdlm.benchmarks import BenchmarkConfig
from prefmill.families.mdlm.config import DiffusionModelConfig, Sampling

if TYPE_CHECKING:
    from prefmill.families.mdlm.generation import Unmasking


class HarnessConfig(StrictConfig):
    """Tasks of lm-evaluation-harness; `path` is a folder of its task files (YAML), which name their local data."""

    tasks: list[str] = Field(min_length=1)
    path: ExternalPath | None = None
    num_fewshot: int | None = Field(None, ge=0)
    num_rows: int | None = Field(None, ge=1)
    chat: bool = False


class DiffusionEvaluationConfig(DiffusionModelConfig):
    """Which models, what they are shown, how they write."""

    model_name_or_path: str | None = Field(None, description="the model, where no checkpoint is given")
    revision: str | None = Field(None, description="of a hub model")
    trust_remote_code: bool = Field(False, description="run the model's own code")
    attn_implementation: str | None = Field(None, description="as transformers names it; none: its choice")
    precision: Precision = Field("bf16", description="fp32 where results must not depend on the hardware")
    num_pairs: int | None = Field(None, ge=1, description="held-out pairs to take, from the first; none: all")
    diffusion_steps: int = Field(64, ge=2, description="draws for a likelihood")
    sampling: Sampling = Field("balanced", description="how masks are drawn for a likelihood; the same for all models")
    exact_chain: bool = Field(True, description="also the chain of conditionals, one forward a token")
    samples_per_prompt: int = Field(1, ge=1, description="answers to every held-out prompt")
    num_tokens: int = Field(128, ge=1, description="tokens of an answer")
    block_tokens: int | None = Field(None, ge=1, description="semi-autoregressive blocks; none: one, or `block_length`")
    num_steps: int | None = Field(None, ge=1, description="steps of unmasking in all; none: one a token")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token")
    remasking: Literal["low_confidence", "margin", "entropy", "random"] = Field(
        "low_confidence", description="which tokens are masked again while generating"
    )
    guidance: float = Field(0.0, ge=0, description="classifier-free guidance: weight of the prompt beyond 1")
    prefix_cache: bool = Field(False, description="keep keys and values of what precedes a block: faster, not exact")
    wanted_pattern: str | None = Field(None, description="a regular expression that wanted answers match")
    benchmarks: list[BenchmarkConfig] = Field([], description="list of {name, kind, file or dataset, ...}")
    harness: HarnessConfig | None = Field(None, description="tasks of lm-evaluation-harness")
    batch_size: int = Field(32, ge=1, description="answers generated together")
    forward_batch_size: int = runtime(16, formerly="rows_at_once", ge=1, description="masked rows per forward pass")
    seed: int = Field(0, description="of the draws; the same for all models")

    @field_validator("wanted_pattern")
    @classmethod
    def _is_an_expression(cls, pattern: str | None) -> str | None:
        import re

        try:
            # Found out here, not after hours of generation.
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @field_validator("benchmarks")
    @classmethod
    def _have_names_of_their_own(cls, benchmarks: list[BenchmarkConfig]) -> list[BenchmarkConfig]:
        names = ["preference", *(item.name for item in benchmarks)]  # preference_accuracy is that of the pairs
        if taken := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"name {', '.join(sorted(taken))} is taken: figures are NAME_accuracy, give another name")
        return benchmarks

    @model_validator(mode="after")
    def _are_draws(self) -> Self:
        if self.samples_per_prompt > 1 and self.temperature == 0 and self.remasking != "random":
            raise ValueError("at temperature 0 all samples_per_prompt are the same answer: raise it, or write one")
        return self

    @model_validator(mode="after")
    def _blocks_divide(self) -> Self:
        # `generate` refuses the same, but only once the model is loaded.
        block = self.block_tokens or self.num_tokens
        steps = self.num_steps or self.num_tokens
        if self.num_tokens % block or steps > self.num_tokens or steps % (self.num_tokens // block):
            raise ValueError("num_tokens must be a multiple of block_tokens, num_steps of the number of blocks")
        return self

    @property
    def unmasking(self) -> Unmasking:
        """How answers are written."""
        return self.unmasking_of(None, self.temperature)

    @property
    def greedy(self) -> Unmasking:
        """How answers are written that are to be right."""
        return self.unmasking_of(None, 0.0)

    def unmasking_of(self, num_tokens: int | None, temperature: float) -> Unmasking:
        """How answers of about `num_tokens` are written: whole blocks, as many steps a token as configured."""
        from prefmill.families.mdlm.generation import Unmasking

        wanted = num_tokens or self.num_tokens
        block = self.block_tokens or wanted
        whole = -(-wanted // block) * block
        steps = (self.num_steps or self.num_tokens) * block // self.num_tokens or 1
        return Unmasking(
            whole, block, steps * (whole // block), temperature, self.remasking, self.seed, self.guidance,
            self.prefix_cache,
        )  # fmt: skip

    def one_by_one(self, num_tokens: int) -> Unmasking:
        """The likeliest token of `num_tokens` first, one a step."""
        from prefmill.families.mdlm.generation import Unmasking

        return Unmasking(num_tokens, num_tokens, num_tokens, 0.0, "low_confidence", self.seed)
