"""What SDXL training hangs into the Trainer: the moving average of the weights, and samples as a grid."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prefmill.core.files import replacing
from prefmill.core.precision import torch_dtype
from prefmill.distributed.scoring import inner_model
from prefmill.families.sdxl.backbone import prompt_arguments
from prefmill.families.sdxl.config import SdxlPreferenceConfig
from prefmill.families.sdxl.encoding import TextKeys
from prefmill.families.sdxl.generator import decode, unpacked
from prefmill.families.sdxl.loading import SdxlFolder
from prefmill.store.tensor_cache import TensorCache

EMA_FILE = "ema.safetensors"
SAMPLES = "samples"
_log = logging.getLogger(__name__)


class TensorBoardCurves(TensorBoardCallback):
    """TensorBoard's curves without the model's configuration: transformers' own fails on that of a diffusers model."""

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Open the file of curves; it is the model, left out here, whose configuration would be written."""
        super().on_train_begin(args, state, control)


class Ema(TrainerCallback):
    """The exponential moving average of what is trained, kept in every checkpoint; the finished model is the average.

    The decay grows as (1 + n) / (10 + n) with the steps n up to its final value, so that the first weights fade.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self._average: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Begin with the weights, or go on from the checkpoint."""
        self._average = {name: value.detach().clone() for name, value in _trained(model)}
        if state.global_step:
            kept = load_file(self._path(args, state))
            for name, value in self._average.items():
                value.copy_(kept[name])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Take in the new weights."""
        decay = min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        for name, value in _trained(model):
            self._average[name].lerp_(value.detach(), 1 - decay)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the average beside the weights; must come before the checkpoint is marked as complete."""
        # Ranks hold the same weights, and so the same average: one file is enough.
        if state.is_world_process_zero:
            save_file({name: value.cpu() for name, value in self._average.items()}, self._path(args, state))

    def copy_to(self, model: Any) -> None:
        """Give `model` the average for its weights."""
        with torch.no_grad():
            for name, value in _trained(model):
                value.copy_(self._average[name])

    def _path(self, args: TrainingArguments, state: TrainerState) -> Path:
        return Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / EMA_FILE


class SampleGrid(TrainerCallback):
    """Draws the prompts every `sample_steps`, each from its own fixed noise, side by side in one picture in the logs.

    As the configuration has it; in its precision.
    """

    def __init__(
        self, prompts: Sequence[str], config: SdxlPreferenceConfig, folder: SdxlFolder, cache: TensorCache,
        texts: TextKeys, logs: Path,
    ) -> None:  # fmt: skip
        self.prompts, self.config, self.folder = prompts, config, folder
        self.cache, self.texts, self.logs = cache, texts, logs

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Tell where there will be none."""
        if (asked := self.config.sample_steps or 0) > state.max_steps:
            _log.warning("sample_steps is %d, this training has %d: no sample is drawn", asked, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Draw them; nothing random of the training is used up."""
        if not state.is_world_process_zero or state.global_step % self.config.sample_steps:
            return
        model.eval()
        precision = self.config.precision
        autocast = torch.autocast(args.device.type, torch_dtype(precision), enabled=precision != "fp32")
        with torch.no_grad(), autocast:
            # The adapter stays in effect: peft has put it into the UNet's own layers.
            images = self.draw(inner_model(model), args.device)
        model.train()
        path = self.logs / SAMPLES / f"step_{state.global_step:05}.png"
        save_grid(images, path)
        log_picture(self.config.report_to, self.logs, SAMPLES, path, state.global_step)

    def draw(self, unet: Any, device: torch.device) -> list[Any]:
        """An image of every prompt as generate_images draws it; one at a time, as training leaves little memory."""
        from diffusers import AutoencoderKL

        # Loaded for each drawing and let go after it: between two, training needs the memory.
        backbone = self.folder.backbone
        parts = {backbone.part: unet, **dict.fromkeys(self.folder.encoders)}
        pipeline = self.folder.load_pipeline(**parts, vae=self.folder.load(AutoencoderKL, "vae", "fp32").to(device))
        pipeline.set_progress_bar_config(disable=True)
        # Given too: a pipeline in which no prompt is not zeros would need its encoders for it.
        nothing = prompt_arguments(self._embeddings(None, device), "negative_") if backbone.free_guidance else {}
        side, images = self.config.resolution, []
        told = backbone.told(self.folder.denoiser_settings, self.config.guidance_scale)
        # No guidance where the model was made for none: with it Turbo's pictures burn out.
        told = 1.0 if told is None and self.folder.few_steps(self.config.model_name_or_path) else told
        for number, prompt in enumerate(self.prompts):
            given = self._embeddings(prompt, device)
            drawn = pipeline(
                **prompt_arguments(given), **nothing, height=side, width=side,
                guidance_scale=backbone.guidance if told is None else told,
                num_inference_steps=self.config.sample_inference_steps,
                # On the CPU: the same noise at every step and on every device, so that grids can be compared.
                generator=torch.Generator().manual_seed(number), output_type="latent",
            )  # fmt: skip
            images += [decode(pipeline, latents) for latents in unpacked(pipeline, drawn.images, side, side)]
        return images

    def _embeddings(self, prompt: str | None, device: torch.device) -> dict[str, Tensor]:
        kept = self.cache.load(self.texts.of(prompt))
        return {name: value[None].to(device) for name, value in kept.items()}


def save_grid(images: Sequence[Any], path: Path) -> None:
    """Images of one size side by side, in rows of four."""
    from diffusers.utils import make_image_grid
    from PIL import Image

    columns = min(4, len(images))
    filled = [*images, *[Image.new("RGB", images[0].size)] * (-len(images) % columns)]
    grid = make_image_grid(filled, len(filled) // columns, columns)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as stream:
        grid.save(stream, format="PNG")


def _trained(model: Any) -> list[tuple[str, Tensor]]:
    return [(name, value) for name, value in model.named_parameters() if value.requires_grad]


def log_picture(trackers: Sequence[str], logs: Path, name: str, path: Path, step: int) -> None:
    """Hand the picture at `path` to those of `trackers` (keys of `report_to`) that show pictures, as of `step`."""
    for tracker in trackers:
        if tracker in _LOGGERS:
            _LOGGERS[tracker](logs, name, path, step)


def _tensorboard(logs: Path, name: str, path: Path, step: int) -> None:
    import numpy as np
    from PIL import Image
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(logs / "tensorboard")) as writer:  # a file of its own beside the curves'
        writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")


def _wandb(logs: Path, name: str, path: Path, step: int) -> None:
    import wandb

    if wandb.run is not None:
        # Not `step=`: W&B drops what comes for a step that it has closed; transformers logs by this name too.
        wandb.run.log({name: wandb.Image(str(path)), "train/global_step": step})


def _trackio(logs: Path, name: str, path: Path, step: int) -> None:
    import trackio
    from PIL import Image

    # Not `step=`: trackio counts its own calls; transformers logs by this name too.
    trackio.log({name: trackio.Image(Image.open(path)), "train/global_step": step})


_LOGGERS: dict[str, Callable[[Path, str, Path, int], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
