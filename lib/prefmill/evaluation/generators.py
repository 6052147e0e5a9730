"""What writes the reviews to evaluate, as configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from prefmill.core.config import StrictConfig


class TransformersGeneration(StrictConfig):
    """transformers: everywhere, for every modality."""

    engine: Literal["transformers"] = "transformers"


class VllmGeneration(StrictConfig):
    """vLLM, on GPUs or in its CPU build: for every modality, with draws of its own, many reviews at a time."""

    engine: Literal["vllm"] = "vllm"
    tensor_parallel_size: int = Field(1, ge=1, description="GPUs that share the model")
    kv_cache_gb: float | None = Field(None, gt=0, description="memory of the cache; none: what vLLM finds free")
    enforce_eager: bool = Field(False, description="no graphs: a quicker start, slower steps")


GenerationEngine = Annotated[TransformersGeneration | VllmGeneration, Field(discriminator="engine")]
