"""Fine-tunes SDXL, SD 1.5, SD 3 or FLUX.1 on pairs of images, by DPO, Flow-DPO, DSPO or MaPO; LoRA, DoRA or whole."""

from __future__ import annotations

from pydantic import model_validator

from prefmill.core.stage import Metrics, Reads, Stage, Task
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.training.config import start_model
from prefmill.training.objective_names import VAL_METRICS


class SdxlDpoConfig(SdxlPreferenceConfig):
    """Which objective, which adapter, and how it is trained."""

    @model_validator(mode="after")
    def _reward_keys(self) -> SdxlDpoConfig:
        given = self.changed("reward_temperature", "reward_weights")
        if given and self.objective != "dspo_rm":
            raise ValueError(f"{', '.join(given)}: only objective dspo_rm asks a reward model")
        return self


def run(config: SdxlDpoConfig, task: Task) -> Metrics:
    """Train, and write the adapter as diffusers and ComfyUI read it, or the whole pipeline."""
    from prefmill.families.sdxl.dpo import train_sdxl_dpo

    return train_sdxl_dpo(config, task, start_model(config, task, "model"), task.input("pairs"))


STAGE = Stage(
    name="sdxl_dpo",
    config=SdxlDpoConfig,
    run=run,
    root="checkpoints",
    on="images",
    trains=True,
    metrics=tuple(VAL_METRICS),
    writes="image_checkpoint",
    reads={
        "pairs": Reads("image_pairs", "build_image_pairs"),
        "model": Reads("checkpoint", optional=True, instead_of=("model_name_or_path",)),
        "reward": Reads("reward_model", optional=True, asked_by="objective=dspo_rm"),
    },
    preload=("torch", "transformers.trainer", "diffusers", "peft", "safetensors.torch"),
)

if __name__ == "__main__":
    from prefmill.cli.stage import main

    main(STAGE)
