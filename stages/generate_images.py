"""Makes images of prompts with a diffusers checkpoint or adapter, one for every prompt and seed."""

from __future__ import annotations

from functools import partial

from pydantic import Field

from prefmill.core.config import ExternalPath, runtime
from prefmill.core.precision import Precision
from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.images.sampling import ImageSampling


class GenerateImagesConfig(ImageSampling):
    """Which prompts, which model, how images are drawn."""

    prompts: ExternalPath = Field(description="a table with a column prompt, perhaps prompt_id; or a .txt of lines")
    num_prompts: int | None = Field(None, ge=1, description="take the first so many, by prompt_id; none: all")
    model_name_or_path: str | None = Field(None, description="folder or hub name, where no checkpoint is given")
    revision: str | None = Field(None, description="of a hub model")
    variant: str | None = Field(None, description="of a hub model's weights, such as fp16")
    adapter: ExternalPath | None = Field(
        None, description="folder or file: LoRA or DoRA of diffusers, or by kohya's keys"
    )
    adapter_scale: float = Field(1.0, description="how much of the adapter is added")
    precision: Precision = Field("fp16", description="of UNet and text encoders; the VAE decodes in fp32")
    batch_size: int | None = runtime(None, ge=1, description="images at once; none: found from memory")


def run(config: GenerateImagesConfig, task: Task) -> Metrics:
    """Write `images/`, `images.jsonl`, `prompts.jsonl` and `summary.json`; interrupted, it makes what is missing."""
    from prefmill.families.sdxl.generator import choose_source, open_pipeline
    from prefmill.images.generate import generate_images
    from prefmill.images.prompts import read_prompts

    model, tuned = (task.optional_input(name) for name in ("model", "tuned"))
    source = choose_source(config, model, tuned, task.key)
    prompts = read_prompts(config.prompts)[: config.num_prompts]
    opened = partial(open_pipeline, source)
    return generate_images(task, prompts, config, source.label, opened, config.batch_size)


STAGE = Stage(
    name="generate_images",
    config=GenerateImagesConfig,
    run=run,
    root="data",
    on="images",
    writes="generated_images",
    reads={"model": Reads("checkpoint", optional=True), "tuned": Reads("image_checkpoint", optional=True)},
    preload=(
        "torch",
        "transformers",
        "diffusers",
        "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
    ),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
