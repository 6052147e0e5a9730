"""The configuration of mdlm_evaluate; importing it imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, field_validator, model_validator

from prefmill.core.config import runtime
from prefmill.core.precision import Precision
from prefmill.families.mdlm.benchmarks import BenchmarkConfig
from prefmill.families.mdlm.config import DiffusionModelConfig, Sampling

if TYPE_CHECKING:
    from prefmill.families.mdlm.generation import Unmasking


class DiffusionEvaluationConfig(DiffusionModelConfig):
    """Which models, what they are shown, how they write."""

    model_name_or_path: str | None = Field(None, description="the model, where no checkpoint is given")
    revision: str | None = Field(None, description="of a hub model")
    trust_remote_code: bool = Field(False, description="run the model's own code")
    attn_implementation: str | None = Field(None, description="as transformers names it; none: its choice")
    precision: Precision = Field("bf16", description="fp32 where results must not depend on the hardware")
    num_pairs: int | None = Field(None, ge=1, description="held-out pairs to take, from the first; none: all")
    diffusion_steps: int = Field(64, ge=2, description="draws for a likelihood")
    sampling: Sampling = "balanced"
    exact_chain: bool = Field(True, description="also the chain of conditionals, one forward a token")
    samples_per_prompt: int = Field(1, ge=1, description="answers to every held-out prompt")
    num_tokens: int = Field(128, ge=1, description="tokens of an answer")
    block_tokens: int | None = Field(None, ge=1, description="semi-autoregressive blocks; none: one block")
    num_steps: int | None = Field(None, ge=1, description="steps of unmasking in all; none: one a token")
    temperature: float = Field(0.0, ge=0, description="0 takes the likeliest token")
    remasking: Literal["low_confidence", "margin", "entropy", "random"] = "low_confidence"
    guidance: float = Field(0.0, ge=0, description="classifier-free guidance: weight of the prompt beyond 1")
    prefix_cache: bool = Field(False, description="keep keys and values of what precedes a block: faster, not exact")
    wanted_pattern: str | None = Field(None, description="a regular expression that wanted answers match")
    benchmarks: list[BenchmarkConfig] = []
    batch_size: int = Field(32, ge=1, description="answers generated together")
    forward_batch_size: int = runtime(16, formerly="rows_at_once", ge=1)
    seed: int = 0

    @field_validator("wanted_pattern")
    @classmethod
    def _is_an_expression(cls, pattern: str | None) -> str | None:
        import re

        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _blocks_divide(self) -> Self:
        block = self.block_tokens or self.num_tokens
        steps = self.num_steps or self.num_tokens
        if self.num_tokens % block or steps > self.num_tokens or steps % (self.num_tokens // block):
            raise ValueError("num_tokens must be a multiple of block_tokens, num_steps of the number of blocks")
        return self

    @property
    def unmasking(self) -> Unmasking:
        """How answers are written."""
        return self._unmasking(self.temperature)

    @property
    def greedy(self) -> Unmasking:
        """How answers are written that are to be right."""
        return self._unmasking(0.0)

    def _unmasking(self, temperature: float) -> Unmasking:
        from prefmill.families.mdlm.generation import Unmasking

        block, steps = self.block_tokens or self.num_tokens, self.num_steps or self.num_tokens
        return Unmasking(
            self.num_tokens, block, steps, temperature, self.remasking, self.seed, self.guidance, self.prefix_cache
        )
