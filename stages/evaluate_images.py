"""Compares a tuned SDXL with its base on held-out prompts: win rates under a scorer that had no part in the tuning."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from prefmill.core.config import ExternalPath, later, runtime
from prefmill.core.image_rows import ImageSplit
from prefmill.core.precision import Precision
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.images.sampling import ImageSampling
from prefmill.training.config import start_model


class EvaluateImagesConfig(ImageSampling):
    """Which prompts, how images are drawn, how they are compared."""

    model_name_or_path: str | None = Field(None, description="the base: folder or hub name, where no model is given")
    revision: str | None = Field(None, description="of a hub model")
    variant: str | None = Field(None, description="of a hub model's weights, such as fp16")
    precision: Precision = Field("fp16", description="of UNet and text encoders; the VAE decodes in fp32")
    prompts: ExternalPath | None = Field(None, description="a table of prompts; none: the pairs' held-out ones")
    published_scorer: ExternalPath | None = later(
        None, description="folder of PickScore, HPSv2, ImageReward or LAION's aesthetics predictor, as scorer"
    )
    splits: list[ImageSplit] = Field(["val", "test"], min_length=1, description="of the pairs: held out")
    num_prompts: int | None = Field(None, ge=2, description="take the first so many, by prompt_id; none: all")
    compare_with: Literal["same_seed", "other_seeds"] = later(
        "same_seed", description="an image is compared with the base's of its seed, or of the prompt's other seeds"
    )
    batch_size: int | None = runtime(None, ge=1, description="images at once; none: found from memory")
    num_grid_prompts: int = Field(12, ge=0, description="prompts whose images are shown side by side")
    drift_draws: int = Field(2, ge=0, description="noise draws a held-out pair for the denoising drift; 0: none")
    resolution: int | None = Field(None, ge=8, multiple_of=8, description="of pairs for the drift; none: the model's")
    num_resamples: int = Field(10_000, ge=1000, le=1_000_000, description="bootstrap samples of the prompts")
    confidence: float = Field(0.95, gt=0.5, lt=1, description="of every interval")
    seed: int = Field(0, ge=0, description="of the bootstrap")

    @model_validator(mode="after")
    def _has_other_seeds(self) -> EvaluateImagesConfig:
        if self.compare_with == "other_seeds" and len(self.seeds) < 2:
            raise ValueError("compare_with: other_seeds needs two seeds or more")
        if self.resolution is not None and self.drift_draws == 0:
            raise ValueError("resolution has no effect with drift_draws: 0, leave it out")
        return self


def run(config: EvaluateImagesConfig, task: Task) -> Metrics:
    """Write the images of both models, `scores.jsonl`, `metrics.json` and `grids/`."""
    from pathlib import Path

    from prefmill.core.statistics import Resampling
    from prefmill.families.sdxl.generator import GeneratorSource
    from prefmill.images.evaluate import ImageEvaluation, evaluate_images

    model = task.optional_input("model")
    base = start_model(config, task, "model")  # type: ignore[arg-type]
    label = Path(base).name if Path(base).is_dir() else base
    if model is not None:
        label = f"{model.manifest.stage}@{model.manifest.content_digest[:12]}"
    wanted = ImageEvaluation(
        base=GeneratorSource(base, label, config.precision, config.revision, config.variant),
        published_scorer=config.published_scorer,
        prompts=config.prompts,
        splits=config.splits,
        num_prompts=config.num_prompts,
        compare_with=config.compare_with,
        sampling=config,
        batch_size=config.batch_size,
        num_grid_prompts=config.num_grid_prompts,
        drift_draws=config.drift_draws,
        resolution=config.resolution,
        resampling=Resampling(config.num_resamples, config.seed, config.confidence),
    )
    return evaluate_images(wanted, task)


STAGE = Stage(
    name="evaluate_images",
    config=EvaluateImagesConfig,
    run=run,
    root="data",
    on="images",
    writes="image_evaluation",
    metrics=("win_rate", "win_rate_low", "win_rate_high", "winner_drift"),
    reads={
        "tuned": Reads("image_checkpoint", "sdxl_dpo", match="elementwise"),
        "model": Reads("checkpoint", optional=True, instead_of=("model_name_or_path",)),
        "scorer": Reads("reward_model", "train_reward", optional=True, instead_of=("published_scorer",)),
        "pairs": Reads("image_pairs", "build_image_pairs", optional=True, keys=("splits", "resolution", "drift_draws")),
    },
    preload=(
        "torch",
        "transformers",
        "diffusers",
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
        "peft",
    ),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
