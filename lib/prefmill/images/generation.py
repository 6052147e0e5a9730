"""Making images so that one depends on its own prompt and seed, not on its batch, and each is kept once it is made."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import ConfigError, InputError
from prefmill.core.files import replacing, write_atomic
from prefmill.core.image_rows import GeneratedImage, ImagePrompt
from prefmill.distributed.devices import has_gpu
from prefmill.distributed.limits import ProcessLimits
from prefmill.families.sdxl.backbone import BACKBONES, Backbone, denoiser
from prefmill.families.sdxl.generator import decode, too_long, unpacked
from prefmill.families.sdxl.loading import require_patches
from prefmill.families.sdxl.noise import few_steps, require_steps
from prefmill.images.files import inspect_image
from prefmill.images.sampling import ImageSampling
from prefmill.store.missing import Progress, silent

if TYPE_CHECKING:
    import torch
    from PIL.PngImagePlugin import PngInfo

_log = logging.getLogger(__name__)
_LARGEST_BATCH = 64
_FEW = 8  # steps, the most that a distilled model is published for
_SHARE_OF_FREE_MEMORY = 0.8
_CPU_BYTES_PER_PIXEL = 5_000  # of an SDXL-sized UNet in fp32 with guidance, rounded up
_LARGEST_CPU_BATCH = 16


@dataclass(frozen=True)
class ImageJob:
    """An image to make."""

    prompt_id: str
    prompt: str
    seed: int

    @property
    def image_id(self) -> str:
        """`<prompt_id>/<seed>`."""
        return f"{self.prompt_id}/{self.seed}"

    @property
    def file(self) -> str:
        """Where the image lies below the artifact."""
        return f"images/{self.image_id}.png"


def plan_jobs(prompts: Iterable[ImagePrompt], seeds: Iterable[int]) -> list[ImageJob]:
    """Every prompt with every seed, sorted."""
    ordered = sorted(set(seeds))
    return [
        ImageJob(prompt["prompt_id"], prompt["prompt"], seed)
        for prompt in sorted(prompts, key=lambda item: item["prompt_id"])
        for seed in ordered
    ]


def make_images(
    open_model: Callable[[], Any], jobs: Sequence[ImageJob], sampling: ImageSampling, label: str, output: Path,
    work: Path, batch_size: int | None = None, progress: Progress = silent,
) -> list[GeneratedImage]:  # fmt: skip
    """Make what is missing of `jobs` below `output`, in batches that fit in memory; returns the rows, in their order.

    `open_model` returns a pipeline as `sdxl.generator.open_pipeline` does; it is not called when nothing
    is missing. `label` names the model in the files. A batch that does not fit is halved. Batches are blocks of the
    whole list, so that an interrupted call and an undisturbed one compute the same; between batch sizes images
    differ by rounding alone. Raises InputError where the latents are not finite.
    """
    from tqdm import tqdm

    with tqdm(total=len(jobs), desc="generate", unit="image") as bar:
        # Looked at before the model is opened: loading it takes minutes, and a finished shard does not need it.
        if any(not (output / job.file).is_file() for job in jobs):
            model = open_model()
            sampling = followed(model, sampling, label)
            _tell_cut(model, jobs, sampling)
            size = _BatchSize(work / "batch_size", batch_size, lambda: fitting_batch(model, jobs[0], sampling))
            for num_done in _batches(model, jobs, sampling, label, output, size):
                bar.update(num_done - bar.n)
                progress(num_done, len(jobs), "images")
    return [_row(job, output) for job in jobs]


def followed(model: Any, sampling: ImageSampling, label: str = "") -> ImageSampling:
    """`sampling` as the model called `label` follows it; raises ConfigError for what it cannot.

    `guidance_scale` is the pipeline's where none is given, and 0 where the model has none; the log says so.
    """
    backbone, settings = BACKBONES[type(model).__name__], denoiser(model).config
    _require_drawable(model, sampling, backbone, settings)
    if not (backbone.free_guidance or settings.get("guidance_embeds")):
        if sampling.guidance_scale:
            _log.warning("this model has no guidance: guidance_scale has no effect, and is written as 0")
        return sampling.model_copy(update={"guidance_scale": 0.0})
    few = few_steps(model.scheduler.config, settings, label)
    if few and sampling.num_inference_steps > _FEW:
        _log.warning("this model seems to be made for 1 to %d steps (%s), and not for num_inference_steps", _FEW, few)
    if sampling.guidance_scale is not None:
        return sampling
    if few:
        raise ConfigError(
            "this model seems to be made for few steps without guidance", where="guidance_scale", got=few,
            expected="the number on the model's card",
            fix=f"set guidance_scale: 0 (for Turbo, Lightning, Hyper-SD) or 1 (LCM), and num_inference_steps: 4; "
            f"for an ordinary model guidance_scale: {backbone.guidance}",
        )  # fmt: skip
    _log.info("guidance_scale is %s, the default of %s", backbone.guidance, type(model).__name__)
    return sampling.model_copy(update={"guidance_scale": backbone.guidance})


def _require_drawable(model: Any, sampling: ImageSampling, backbone: Backbone, settings: Mapping[str, Any]) -> None:
    require_patches(backbone.patch * model.vae_scale_factor, sampling, "height", "width")
    # LCM's UNets, too, are told their guidance.
    if sampling.negative_prompt and (not backbone.free_guidance or settings.get("time_cond_proj_dim")):
        raise ConfigError(
            "this model's guidance leads away from no prompt", where="negative_prompt", got=sampling.negative_prompt,
            fix="leave out negative_prompt, or take SDXL, SD 1.5 or SD 3",
        )  # fmt: skip
    require_steps(model.scheduler.config, sampling.num_inference_steps, "num_inference_steps")


def draw_latents(model: Any, jobs: Sequence[ImageJob], sampling: ImageSampling) -> torch.Tensor:
    """The denoised latents [B, C, h, w] of a batch; noise comes from a CPU generator of each image's own seed."""
    import torch

    negative = None if sampling.negative_prompt is None else [sampling.negative_prompt] * len(jobs)
    with torch.inference_mode():
        latents: torch.Tensor = model(
            prompt=[job.prompt for job in jobs],
            negative_prompt=negative,
            height=sampling.height,
            width=sampling.width,
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            **BACKBONES[type(model).__name__].reads(denoiser(model).config),
            generator=[torch.Generator("cpu").manual_seed(job.seed) for job in jobs],
            # Latents alone: the VAE is in fp32, and decoding a whole batch at once takes much memory.
            output_type="latent",
        ).images
    return unpacked(model, latents, sampling.height, sampling.width)


def fitting_batch(model: Any, job: ImageJob, sampling: ImageSampling) -> int:
    """How many images go through the UNet at once: what one needs, measured on a GPU, in the memory that is free."""
    import torch

    if not has_gpu():
        return _fitting_cpu_batch(model, sampling)
    # One step is enough: every step needs the same memory.
    once = sampling.model_copy(update={"num_inference_steps": 1})
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    draw_latents(model, [job], once)
    needed = max(torch.cuda.max_memory_allocated() - before, 1)
    # Memory that torch keeps for its next tensors would not count as free.
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return _power_of_two(min(_SHARE_OF_FREE_MEMORY * free / needed, _LARGEST_BATCH))


def cut_prompts(model: Any, prompts: Iterable[str]) -> list[str]:
    """Those longer than the model's text encoders read, sorted: their ends have no effect."""
    tokenizers = {name: part for name, part in model.components.items() if name.startswith("tokenizer") and part}
    return too_long(tokenizers, BACKBONES[type(model).__name__], denoiser(model).config, prompts)


def _tell_cut(model: Any, jobs: Sequence[ImageJob], sampling: ImageSampling) -> None:
    prompts = {job.prompt for job in jobs}
    if cut := cut_prompts(model, prompts):
        told = f"{cut[0][:60]} ..."
        _log.warning("%d of %d prompts are longer than the text encoders read, as %r", len(cut), len(prompts), told)
    if cut_prompts(model, filter(None, [sampling.negative_prompt])):
        _log.warning("negative_prompt is longer than the text encoders read: its end has no effect")


class _BatchSize:
    """The batch size of a task: given or found, halved when it does not fit, and the same again after a kill."""

    def __init__(self, path: Path, given: int | None, find: Callable[[], int]) -> None:
        self._path = path
        # The kept size comes first: measuring again on another GPU would change the batches, and so the bytes.
        kept = int(path.read_text()) if path.is_file() else None
        self.value = min(kept or given or find(), given or _LARGEST_BATCH)
        self._keep()

    def halve(self) -> None:
        self.value = (self.value + 1) // 2
        self._keep()

    def _keep(self) -> None:
        write_atomic(self._path, str(self.value))


def _batches(
    model: Any, jobs: Sequence[ImageJob], sampling: ImageSampling, label: str, output: Path, size: _BatchSize
) -> Iterator[int]:
    """Work through `jobs`; yields how many are done. A batch of which an image is missing is made again whole."""
    from accelerate.utils.memory import should_reduce_batch_size

    start = 0
    while start < len(jobs):
        batch = jobs[start : start + size.value]
        # The whole batch again, not the missing part: with fewer images in it the others round differently.
        if any(not (output / job.file).is_file() for job in batch):
            try:
                latents = draw_latents(model, batch, sampling)
            except RuntimeError as error:
                if size.value == 1 or not should_reduce_batch_size(error):
                    raise
                latents = None
            if latents is None:  # outside the handler, where the failed call's tensors are free
                size.halve()
                _free_memory()
                continue
            _store(model, batch, latents, sampling, label, output)
        start += len(batch)
        yield start


def _store(
    model: Any, batch: Sequence[ImageJob], latents: torch.Tensor, sampling: ImageSampling, label: str, output: Path
) -> None:
    for job, item in zip(batch, latents, strict=True):
        _require_finite(item, job)
        image = decode(model, item)
        target = output / job.file
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as stream:
            image.save(stream, format="PNG", pnginfo=metadata(job, sampling, label))


def metadata(job: ImageJob, sampling: ImageSampling, label: str) -> PngInfo:
    """What a file says about its making, as PNG text."""
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    facts = {
        "prompt": job.prompt,
        "negative_prompt": sampling.negative_prompt or "",
        "seed": str(job.seed),
        "model": label,
        "steps": str(sampling.num_inference_steps),
        "guidance": str(sampling.guidance_scale),
    }
    for key, value in facts.items():
        # iTXt holds UTF-8; the plain text of a PNG is Latin-1, and prompts need not be.
        info.add_itxt(key, value)
    return info


def drawn_guidance(file: Path) -> float:
    """The guidance that an image of ours was drawn with, as its file says; known too where no model is opened."""
    from PIL import Image

    with Image.open(file) as image:
        return float(image.text["guidance"])  # type: ignore[attr-defined]


def _row(job: ImageJob, output: Path) -> GeneratedImage:
    facts = inspect_image(output / job.file)
    return GeneratedImage(
        image_id=job.image_id, prompt_id=job.prompt_id, prompt=job.prompt, seed=job.seed, file=job.file,
        width=facts.width, height=facts.height, sha256=facts.sha256,
    )  # fmt: skip


def _require_finite(latents: torch.Tensor, job: ImageJob) -> None:
    if not bool(latents.isfinite().all()):
        raise InputError(
            "the model made latents that are not finite", where=f"prompt {job.prompt_id}, seed {job.seed}",
            got=f"NaN or infinity at {latents.dtype}",
            fix="set precision to bf16 or fp32; if it stays, the weights are damaged",
        )  # fmt: skip


def _fitting_cpu_batch(model: Any, sampling: ImageSampling) -> int:
    side = BACKBONES[type(model).__name__].side(denoiser(model).config) * model.vae_scale_factor
    pixels = (sampling.height or side) * (sampling.width or side)
    return _power_of_two(min(ProcessLimits().free_memory() / 2 / (pixels * _CPU_BYTES_PER_PIXEL), _LARGEST_CPU_BATCH))


def _power_of_two(limit: float) -> int:
    return 1 << (max(int(limit), 1).bit_length() - 1)


def _free_memory() -> None:
    import torch

    # A traceback and its frames form cycles, which hold the tensors until the collector runs.
    gc.collect()
    if has_gpu():
        torch.cuda.empty_cache()
