"""Pictures in the trackers of a run, beside its curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path


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
