"""generate_images: payload, seeds, shards, batches, memory, kills, adapters and bad input, on a tiny SDXL."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from image_artifacts import publish_as, task_for
from PIL import Image

import prefmill.images.generation as generation
import stages.generate_images as stage
from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.stage import Task
from prefmill.demo import tiny_models as tiny
from prefmill.families.sdxl.generator import ADAPTER_FILE, add_adapter, open_pipeline
from prefmill.images.sampling import ImageSampling
from prefmill.store.artifacts import payload
from prefmill.store.jsonl import read_jsonl

NUM_PROMPTS = 5


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("sdxl")
    tiny.build("sdxl", folder)
    return publish_as(folder, "checkpoint")


@pytest.fixture(scope="module")
def opened(model: Artifact) -> Any:
    """The pipeline, opened once for the module."""
    task = task_for(Path(model.path) / "work", "generate_images", model=model)
    return open_pipeline(stage_source(task))


@pytest.fixture(autouse=True)
def open_once(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run of the same checkpoint takes the pipeline that is open already."""
    monkeypatch.setattr("prefmill.families.sdxl.generator.open_pipeline", lambda source: opened)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.csv"
    path.write_text("prompt_id,prompt\n" + "".join(f"p{n},picture {n} über ☃\n" for n in reversed(range(NUM_PROMPTS))))
    return path


def stage_source(task: Task) -> Any:
    from prefmill.families.sdxl.generator import choose_source

    return choose_source(settings(prompts="x"), task.input("model"), None, "test")


def settings(**given: Any) -> stage.GenerateImagesConfig:
    return validate(
        stage.GenerateImagesConfig, {"num_inference_steps": 2, "precision": "fp32", "batch_size": 4, **given}
    )


def generate(task: Task, prompts: Path, **given: Any) -> dict[str, Any]:
    return stage.run(settings(prompts=str(prompts), **given), task)


def contents(task: Task) -> dict[str, bytes]:
    return {path.relative_to(task.output).as_posix(): path.read_bytes() for path in payload(task.output)}


def pixels(task: Task) -> Any:
    import numpy as np

    rows = read_jsonl(task.output / "images.jsonl")
    return np.stack([np.asarray(Image.open(task.output / row["file"])).astype(int) for row in rows])


def count_drawn(monkeypatch: pytest.MonkeyPatch, then: Callable[[int], None] = lambda size: None) -> list[int]:
    """The sizes of the batches that are drawn from now on."""
    sizes: list[int] = []
    draw = generation.draw_latents

    def counted(model: Any, jobs: Any, sampling: Any) -> Any:
        then(len(jobs))
        sizes.append(len(jobs))
        return draw(model, jobs, sampling)

    monkeypatch.setattr(generation, "draw_latents", counted)
    return sizes


def test_what_it_writes(tmp_path: Path, model: Artifact, prompts: Path) -> None:
    task = task_for(tmp_path / "t", "generate_images", model=model)
    metrics = generate(task, prompts)
    rows = list(read_jsonl(task.output / "images.jsonl"))
    assert [row["image_id"] for row in rows] == [f"p{n}/{seed}" for n in range(NUM_PROMPTS) for seed in (0, 1)]
    assert metrics == {"num_prompts": NUM_PROMPTS, "num_images": len(rows), "num_cut_prompts": 0}
    assert sorted(contents(task)) == sorted(
        [*(row["file"] for row in rows), "images.jsonl", "prompts.jsonl", "summary.json"]
    )
    assert len({row["sha256"] for row in rows}) == len(rows)
    assert [row["prompt_id"] for row in read_jsonl(task.output / "prompts.jsonl")] == [f"p{n}" for n in range(5)]
    image = Image.open(task.output / rows[3]["file"])
    assert image.size == (rows[3]["width"], rows[3]["height"]) == (32, 32)
    label = f"test@{model.manifest.content_digest[:12]}"
    assert image.text == {  # type: ignore[attr-defined]
        "prompt": "picture 1 über ☃", "negative_prompt": "", "seed": "1", "model": label, "steps": "2",
        "guidance": "5.0",
    }  # fmt: skip
    assert json.loads((task.output / "summary.json").read_text())["model"] == label


def test_an_image_is_diffusers_own(tmp_path: Path, model: Artifact, prompts: Path, opened: Any) -> None:
    """What diffusers makes of the prompt and a generator with that seed, alone and in its own decoding."""
    import numpy as np
    import torch

    task = task_for(tmp_path / "t", "generate_images", model=model)
    generate(task, prompts, seeds=[7], negative_prompt="dull")
    theirs = opened(
        "picture 2 über ☃", negative_prompt="dull", num_inference_steps=2, guidance_scale=5.0,
        generator=torch.Generator("cpu").manual_seed(7),
    ).images[0]  # fmt: skip
    assert np.abs(pixels(task)[2] - np.asarray(theirs).astype(int)).max() <= 1


def test_images_do_not_depend_on_the_batch_or_the_shards(tmp_path: Path, model: Artifact, prompts: Path) -> None:
    import numpy as np

    whole = task_for(tmp_path / "whole", "generate_images", model=model)
    generate(whole, prompts, batch_size=10)
    for batch_size in (1, 3):
        task = task_for(tmp_path / f"t{batch_size}", "generate_images", model=model)
        generate(task, prompts, batch_size=batch_size)
        assert np.abs(pixels(task) - pixels(whole)).max() <= 1
    parts = [task_for(tmp_path / f"s{index}", "generate_images", (index, 3), model=model) for index in range(3)]
    for part in parts:
        generate(part, prompts)
    ids = [row["image_id"] for part in parts for row in read_jsonl(part.output / "images.jsonl")]
    assert sorted(ids) == [row["image_id"] for row in read_jsonl(whole.output / "images.jsonl")]


def test_a_killed_task_makes_what_is_missing_and_the_same(
    tmp_path: Path, model: Artifact, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = task_for(tmp_path / "whole", "generate_images", model=model)
    generate(whole, prompts)
    task = task_for(tmp_path / "t", "generate_images", model=model)
    child = os.fork()
    if child == 0:
        seen: list[str] = []
        monkeypatch.setattr(generation, "metadata", _dying(generation.metadata, after=6, seen=seen))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        generate(task, prompts)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(task.output.rglob("images/*/*.png"))) == 6
    sizes = count_drawn(monkeypatch)
    generate(task, prompts)
    assert sizes == [4, 2]  # the first block was whole, the second is made again
    assert contents(task) == contents(whole)
    sizes.clear()
    generate(task, prompts)
    assert sizes == []


def _dying(function: Callable[..., Any], after: int, seen: list[str]) -> Callable[..., Any]:
    def call(job: Any, *rest: Any) -> Any:
        if len(seen) == after:
            os.kill(os.getpid(), signal.SIGKILL)
        seen.append(job.image_id)
        return function(job, *rest)

    return call


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_halved_for_good(
    tmp_path: Path, model: Artifact, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import numpy as np

    def full(size: int) -> None:
        if size > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")

    whole = task_for(tmp_path / "whole", "generate_images", model=model)
    generate(whole, prompts)
    task = task_for(tmp_path / "t", "generate_images", model=model)
    with monkeypatch.context() as patch:
        sizes = count_drawn(patch, full)
        generate(task, prompts, batch_size=8)
        assert sizes == [2] * 5
    assert np.abs(pixels(task) - pixels(whole)).max() <= 1
    assert (task.work / "batch_size").read_text() == "2"
    for message in ("CUDA out of memory. Tried", "shape mismatch"):
        task = task_for(tmp_path / message[:5], "generate_images", model=model)
        with monkeypatch.context() as patch:
            count_drawn(patch, partial(_fail, message))
            with pytest.raises(RuntimeError, match=message):
                generate(task, prompts, batch_size=2)
        assert (task.work / "batch_size").read_text() == ("1" if message.startswith("CUDA") else "2")


def _fail(message: str, size: int) -> None:
    raise RuntimeError(message)


def test_a_batch_is_found_from_memory(tmp_path: Path, model: Artifact, prompts: Path, opened: Any) -> None:
    task = task_for(tmp_path / "t", "generate_images", model=model)
    generate(task, prompts, batch_size=None)
    assert int((task.work / "batch_size").read_text()) in (1, 2, 4, 8, 16)
    job = generation.ImageJob("a", "a", 0)
    large = ImageSampling(num_inference_steps=1, height=200_000, width=200_000)
    assert generation.fitting_batch(opened, job, large) == 1


def test_latents_that_are_not_finite_stop_the_task(
    tmp_path: Path, model: Artifact, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = generation.draw_latents

    def broken(model: Any, jobs: Any, sampling: Any) -> Any:
        latents = draw(model, jobs, sampling).clone()
        latents[1, 0, 0, 0] = float("nan")
        return latents

    monkeypatch.setattr(generation, "draw_latents", broken)
    task = task_for(tmp_path / "t", "generate_images", model=model)
    with pytest.raises(InputError, match=r"not finite[\s\S]*prompt p0, seed 1"):
        generate(task, prompts)


def test_prompts_that_are_cut_are_counted(tmp_path: Path, model: Artifact) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text(f"prompt_id,prompt\nlong,{'word ' * 200}\nshort,word\n")
    task = task_for(tmp_path / "t", "generate_images", model=model)
    assert generate(task, path)["num_cut_prompts"] == 1
    assert json.loads((task.output / "summary.json").read_text())["cut_prompts"] == ["long"]


@pytest.mark.slow
def test_an_adapter_changes_the_images_by_its_scale(
    tmp_path: Path, model: Artifact, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    monkeypatch.undo()
    pipeline = StableDiffusionXLPipeline.from_pretrained(model.path)
    torch.manual_seed(0)
    pipeline.unet.add_adapter(LoraConfig(r=4, lora_alpha=16, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    folder = tmp_path / "adapter"
    StableDiffusionXLPipeline.save_lora_weights(folder, unet_lora_layers=get_peft_model_state_dict(pipeline.unet))
    assert (folder / ADAPTER_FILE).is_file()
    found = {}
    for name, scale in (("none", 0.0), ("one", 1.0)):
        task = task_for(tmp_path / name, "generate_images")
        given = {"model_name_or_path": str(model.path), "adapter": str(folder), "adapter_scale": scale}
        generate(task, prompts, seeds=[0], **given)
        found[name] = pixels(task)
    base = task_for(tmp_path / "base", "generate_images", model=model)
    generate(base, prompts, seeds=[0])
    found["base"] = pixels(base)
    assert (found["base"] == found["none"]).all()
    assert (found["base"] != found["one"]).any()
    artifact = publish_as(folder, "image_checkpoint")
    task = task_for(tmp_path / "as_input", "generate_images", model=model, tuned=artifact)
    generate(task, prompts, seeds=[0])
    assert (pixels(task) == found["one"]).all()
    label = json.loads((task.output / "summary.json").read_text())["model"]
    assert label == " + ".join(f"test@{item.manifest.content_digest[:12]}" for item in (model, artifact))


def test_which_model_must_be_clear(tmp_path: Path, model: Artifact, prompts: Path) -> None:
    with pytest.raises(ConfigError, match="no model to make images with"):
        generate(task_for(tmp_path / "a", "generate_images"), prompts)
    with pytest.raises(ConfigError, match="two models to make images with"):
        generate(task_for(tmp_path / "b", "generate_images", model=model), prompts, model_name_or_path="x/y")
    with pytest.raises(ConfigError, match="two models to make images with"):
        generate(task_for(tmp_path / "c", "generate_images", model=model, tuned=model), prompts)
    whole = task_for(tmp_path / "d", "generate_images", tuned=model)  # a tuned UNet is a pipeline of its own
    assert generate(whole, prompts)["num_images"] == 2 * NUM_PROMPTS
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / ADAPTER_FILE).touch()
    adapter = publish_as(tmp_path / "adapter", "image_checkpoint")
    with pytest.raises(ConfigError, match="two adapters to make images with"):
        generate(task_for(tmp_path / "e", "generate_images", model=model, tuned=adapter), prompts, adapter="x")
    with pytest.raises(ConfigError, match="an adapter_scale without an adapter"):
        generate(task_for(tmp_path / "f", "generate_images", model=model), prompts, adapter_scale=0.5)


def test_a_folder_without_a_pipeline_is_named(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"no diffusers pipeline[\s\S]*model_index.json"):
        generate(task_for(tmp_path / "a", "generate_images"), prompts, model_name_or_path=str(tmp_path))


def test_a_folder_without_an_adapter_is_named(tmp_path: Path, model: Artifact, opened: Any) -> None:
    with pytest.raises(InputError, match=r"no adapter in this folder[\s\S]*pytorch_lora_weights"):
        add_adapter(opened, model.path, 1.0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": [0, 1, 0]}, "seeds: one stands there twice"),
        ({"seeds": [2**64]}, "seeds"),
        ({"num_inference_steps": 1001}, "num_inference_steps"),
        ({"negative_prompt": "blurred", "guidance_scale": 1.0}, "negative_prompt: has no effect"),
        ({"height": 20}, "height = 20"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"steps": 3}, "steps: unknown key"),
    ],
)
def test_bad_settings_are_explained(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(prompts="x", **given)
