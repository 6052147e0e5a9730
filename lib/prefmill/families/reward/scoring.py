"""Scoring images with a trained reward model, or with a published scorer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import InputError
from prefmill.core.image_rows import HEADS
from prefmill.distributed.devices import device_type
from prefmill.store.missing import in_batches
from prefmill.store.pictures import open_image

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL.Image import Image


def score_images(folder: Path, prompts: Sequence[str], paths: Sequence[Path]) -> NDArray[np.float32]:
    """Rewards of N images for their prompts, by the reward model in `folder`: see `open_scorer`."""
    return open_scorer(folder)(prompts, paths)


def open_scorer(folder: Path, batch_size: int = 16) -> Callable[[Sequence[str], Sequence[Path]], NDArray[np.float32]]:
    """The reward model in `folder` as a function of N prompts and images: rewards [N, 5], columns as in `HEADS`.

    Those of a published scorer have one column, see `published`. This project's are logits divided by the head's
    temperature: of two images of one prompt, s(a - b) is the probability that the first is the better one. Raises
    InputError when the folder holds no scorer or an image cannot be read.
    """
    import numpy as np
    import torch

    from prefmill.families.reward.published import open_published

    ours = is_trained_here(folder)
    score = _open_reward(folder, device_type()) if ours else open_published(folder, device_type())

    def rewards(prompts: Sequence[str], paths: Sequence[Path]) -> NDArray[np.float32]:
        # An empty first row, so that no images give [0, K]: concatenate needs an array.
        rows = [np.zeros((0, len(HEADS) if ours else 1), dtype=np.float32)]
        for shown, files in zip(in_batches(prompts, batch_size), in_batches(paths, batch_size), strict=True):
            with torch.inference_mode():
                found = score(shown, [open_image(path) for path in files])
            rows.append(found.float().cpu().numpy().reshape(len(files), -1))
            # Compared, NaN is neither more nor less: the picture would lose every time.
            if not np.isfinite(rows[-1]).all():
                raise InputError(
                    "a score that is no number", where=folder, got=f"NaN or infinity for {files[0].name} or near it",
                    fix="download the scorer again, or give another",
                )  # fmt: skip
        return np.concatenate(rows)

    return rewards


def is_trained_here(folder: Path) -> bool:
    """Whether this folder says that it is a reward model of train_reward."""
    config = folder / "config.json"
    return config.is_file() and "prefmill_reward" in config.read_text(encoding="utf-8")


def _open_reward(folder: Path, device: str) -> Callable[[Sequence[str], Sequence[Image]], Any]:
    import torch

    from prefmill.families.reward.model import encode

    model, processor = load_reward(folder)
    model.to(device).eval()
    temperatures = torch.tensor(model.config.temperatures, device=device)

    def score(prompts: Sequence[str], images: Sequence[Image]) -> Any:
        batch = {name: value.to(device) for name, value in encode(processor, prompts, images).items()}
        return model(**batch) / temperatures

    return score


def load_reward(folder: Path) -> tuple[Any, Any]:
    """The reward model in `folder` and its processor; raises InputError where there is none."""
    from prefmill.families.causal.loading import loading
    from prefmill.families.causal.whole import read_whole
    from prefmill.families.reward.model import MultiHeadReward, MultiHeadRewardConfig, open_processor, require_size

    config = MultiHeadRewardConfig.from_pretrained(folder)
    # Order counts too: columns are read by their place in HEADS.
    if config.heads != list(HEADS):
        raise InputError(
            "no reward model with this project's heads", where=folder, got=f"{config.model_type}: {config.heads}",
            expected=", ".join(HEADS), fix="give the output of the stage train_reward",
        )  # fmt: skip
    with loading("the reward model", folder):
        model, processor = read_whole(MultiHeadReward, str(folder), dtype="float32"), open_processor(folder)
        require_size(processor.image_processor, config.clip_config, folder)
        return model, processor
