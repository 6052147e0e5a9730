"""Tiny random models of the real architectures, for demos and tests without downloads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

Builder = Callable[[Path, Sequence[str], int], None]
_NUM_PAPERS_FOR_TOKENIZERS = 40


def build_all(folder: Path, seed: int = 0) -> list[Path]:
    """Save every tiny model below `folder` as a plain Hugging Face folder; returns the folders.

    `qwen2`, `qwen2_5_vl`, `masked_diffusion` (attends both ways, with a mask token), `clip`, `sdxl`, `sd15`, `sd3`,
    `flux_dev` and `flux_schnell`.
    The weights are random and follow from `seed`; existing files are replaced.
    """
    texts, made = _texts(seed), builders()
    for name, build in made.items():
        build(folder / name, texts, seed)
    return [folder / name for name in made]


def builders() -> dict[str, Builder]:
    """The builder of each model, by the name of its folder."""
    # Here and not above: diffusers and transformers take seconds to import.
    from prefmill.demo.image import build_clip, build_flux_dev, build_flux_schnell, build_sd3, build_sd15, build_sdxl
    from prefmill.demo.text import build_masked_diffusion, build_qwen2, build_qwen2_5_vl

    made = (
        build_qwen2, build_qwen2_5_vl, build_masked_diffusion, build_clip, build_sdxl, build_sd15, build_sd3,
        build_flux_dev, build_flux_schnell,
    )  # fmt: skip
    return {build.__name__.removeprefix("build_"): build for build in made}


def build(name: str, folder: Path, seed: int = 0) -> Path:
    """Save the tiny model `name`, one of `builders()`, to `folder`."""
    builders()[name](folder, _texts(seed), seed)
    return folder


def build_served(folder: Path) -> Path:
    """Save the tiny Qwen2 with heads of 32, the smallest that vLLM serves, to `folder`."""
    from prefmill.demo.text import build_qwen2

    build_qwen2(folder, _texts(0), 0, hidden_size=128)
    return folder


def _texts(seed: int) -> list[str]:
    """What the tokenizers learn from: generated papers and their reviews."""
    from prefmill.reviews.generated import generate

    rows = generate(seed, _NUM_PAPERS_FOR_TOKENIZERS)
    return [text for row in rows for text in (row["title"], row["abstract"], row["text"], row["review_text"])]
