"""sft and dpo on clean_images and vision: from the generated corpus with images to a vision-language model's folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from training_artifacts import content, kill_after, make_checkpoint, publish_as
from training_artifacts import make_task as training_task

from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.core.records import Modality
from prefmill.core.stage import Task, load_stage
from prefmill.store.artifacts import publish
from prefmill.store.jsonl import read_jsonl
from prefmill.training.checkpoints import STEPS, read_curve

pytestmark = pytest.mark.slow
MODALITIES: tuple[Modality, ...] = ("clean_images", "vision")
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-3, "num_train_epochs": 1, "precision": "fp32", "per_device_train_batch_size": 2,
    "effective_batch_size": 8, "max_length": 4096, "logging_steps": 1, "save_steps": 1, "report_to": [],
}  # fmt: skip


def make(stage_name: str, folder: Path, keys: dict[str, Any], **inputs: Artifact) -> Artifact:
    """Run a stage of data by hand and publish what it wrote."""
    stage = load_stage(stage_name)
    folder.mkdir()
    given = {name: (artifact,) for name, artifact in inputs.items()}
    config = validate(stage.config, keys)
    stage.run(config, Task("r", stage_name, "all", {}, {}, given, folder, folder.with_suffix(".logs")))
    made = Provenance(stage_name, "all", "f", {}, config.model_dump(mode="json"), "0", {})
    return publish(folder, stage.writes, made, {})


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("data")
    sources = [{"format": "generated", "num_papers": 40, "images": True}]
    corpus = make("ingest_reviews", folder / "corpus", {"sources": sources})
    scores = make("score_reviews", folder / "scores", {}, corpus=corpus)
    keys = {"modalities": list(MODALITIES), "decisions": ["accepted", "rejected"]}
    return make("build_datasets", folder / "datasets", keys, corpus=corpus, scores=scores)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    from prefmill.demo.tiny_models import build

    return publish_as(build("qwen2_5_vl", tmp_path_factory.mktemp("vl")), "checkpoint")


def sft(folder: Path, modality: str, base: Artifact, datasets: Artifact, **keys: Any) -> dict[str, Any]:
    config = validate(load_stage("sft").config, {**TRAINING, "modality": modality, **keys})
    return load_stage("sft").run(config, training_task("sft", folder, model=base, datasets=datasets))


def dpo(folder: Path, modality: str, policy: Artifact, datasets: Artifact, **keys: Any) -> dict[str, Any]:
    config = validate(load_stage("dpo").config, {**TRAINING, "modality": modality, "layout": "group", **keys})
    return load_stage("dpo").run(config, training_task("dpo", folder, policy=policy, datasets=datasets))


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_curve(folder / "logs" / STEPS) if "loss" in row]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, base: Artifact, datasets: Artifact) -> dict[str, Path]:
    folders = {modality: tmp_path_factory.mktemp(modality) for modality in MODALITIES}
    for modality, folder in folders.items():
        sft(folder, modality, base, datasets)
    return folders


@pytest.mark.parametrize("modality", MODALITIES)
def test_sft_learns_and_writes_a_folder_that_transformers_loads(modality: str, tuned: dict[str, Path]) -> None:
    from transformers import AutoModelForImageTextToText

    from prefmill.families.causal.vllm_loading import ImageTextProcessor

    out = tuned[modality] / "out"
    assert losses(tuned[modality])[-1] < losses(tuned[modality])[0]
    model = AutoModelForImageTextToText.from_pretrained(out)
    processor = ImageTextProcessor.from_pretrained(str(out))
    from PIL import Image

    text = "<|vision_start|><|image_pad|><|vision_end|>Rating"
    given = processor(text=[text], images=[Image.new("RGB", (60, 60))], return_tensors="pt")
    assert model.generate(**given, max_new_tokens=3, do_sample=False).shape[1] == given["input_ids"].shape[1] + 3


def test_the_first_loss_is_that_of_rows_one_at_a_time(
    tmp_path: Path, base: Artifact, datasets: Artifact, tuned: dict[str, Path]
) -> None:
    """The mean over the completions' tokens of a whole epoch in one step, by transformers' own forward."""
    from prefmill.families.causal.image_limits import ImageLimits
    from prefmill.families.causal.loading import load_model, load_tokenizer
    from prefmill.families.causal.vision import with_images
    from prefmill.families.causal.vision_families import open_reader

    path = datasets.path / "sft_vision_train" / "data.jsonl"
    rows = list(read_jsonl(path))
    count = len(rows) - len(rows) % 2
    model = load_model(str(base.path), precision="fp32")
    reader = open_reader(str(base.path), load_tokenizer(str(base.path)), ImageLimits())
    assert reader is not None
    total, tokens = 0.0, 0
    for row in rows:
        images = [str(datasets.path / name) for name in row["images"]]
        prompt, answer = reader.encode(with_images(row["messages"][:-1], images), row["messages"][-1]["content"])
        ids = torch.tensor([prompt + answer])
        pixels, grids = reader.pixels(images).values()
        with torch.no_grad():
            logits = model(
                input_ids=ids, pixel_values=pixels, image_grid_thw=grids,
                mm_token_type_ids=(ids == reader.image_token).int(),
            ).logits[0, len(prompt) - 1 : -1]  # fmt: skip
        total -= logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
        tokens += len(answer)
    sft(tmp_path, "vision", base, datasets, effective_batch_size=2 * -(-len(rows) // 2), save_steps=50)
    assert count
    assert losses(tmp_path)[0] == pytest.approx(total / tokens, abs=1e-4)


@pytest.fixture(scope="module")
def preferred(
    tmp_path_factory: pytest.TempPathFactory, base: Artifact, datasets: Artifact
) -> dict[tuple[str, str], Path]:
    folders = {}
    for modality, layout in [("vision", "group"), ("vision", "pairwise"), ("clean_images", "group")]:
        folders[modality, layout] = tmp_path_factory.mktemp(f"{modality}_{layout}")
        dpo(folders[modality, layout], modality, base, datasets, layout=layout)
    return folders


def test_dpo_starts_at_ln_2_and_learns(preferred: dict[tuple[str, str], Path]) -> None:
    for folder in preferred.values():
        assert losses(folder)[0] == pytest.approx(math.log(2), abs=1e-5)
        assert losses(folder)[-1] < math.log(2)


def test_bf16_starts_near_ln_2_and_activation_checkpointing_runs(
    tmp_path: Path, base: Artifact, datasets: Artifact
) -> None:
    dpo(tmp_path, "vision", base, datasets, precision="bf16", activation_checkpointing=True)
    assert losses(tmp_path)[0] == pytest.approx(math.log(2), abs=0.02)
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]


def test_both_layouts_give_the_same_margins(preferred: dict[tuple[str, str], Path]) -> None:
    """The plans differ in their microbatches, not in their steps."""
    logs = []
    for layout in ("group", "pairwise"):
        path = preferred["vision", layout] / "logs" / "margins" / "margins_log.jsonl"
        logs.append({(row["step"], row["pair_id"]): row["margin"] for row in read_jsonl(path)})
    assert logs[0].keys() == logs[1].keys()
    for key, margin in logs[0].items():
        assert margin == pytest.approx(logs[1][key], abs=2e-3)


@pytest.mark.timing
def test_dpo_killed_and_rerun_ends_with_the_same_bytes(
    tmp_path: Path, base: Artifact, datasets: Artifact, preferred: dict[tuple[str, str], Path]
) -> None:
    kill_after(2, tmp_path, lambda: dpo(tmp_path, "vision", base, datasets))
    dpo(tmp_path, "vision", base, datasets)
    assert content(tmp_path) == content(preferred["vision", "group"])


def test_another_picture_makes_another_reference_key(base: Artifact, tmp_path: Path) -> None:
    from PIL import Image

    from prefmill.families.causal.image_limits import ImageLimits
    from prefmill.families.causal.loading import load_tokenizer
    from prefmill.families.causal.vision_families import open_reader

    for name, colour in (("a.png", 1), ("b.png", 2)):
        Image.new("RGB", (60, 60), (colour, 0, 0)).save(tmp_path / name)
    reader = open_reader(str(base.path), load_tokenizer(str(base.path)), ImageLimits())
    assert reader is not None
    one, other = (reader.digest([[str(tmp_path / name)]]) for name in ("a.png", "b.png"))
    assert one != other


def test_a_model_of_text_alone_refuses_images(tmp_path: Path, datasets: Artifact) -> None:
    text_model = make_checkpoint(tmp_path / "text")
    for train in (sft, dpo):
        with pytest.raises(InputError, match="vision-language model such as"):
            train(tmp_path / train.__name__, "vision", text_model, datasets)


def test_the_loss_on_image_pairs_is_that_of_trl(tmp_path: Path, base: Artifact, datasets: Artifact) -> None:
    """Three steps of TRL's DPOTrainer on the same pairs in the same order; it runs every image twice for each pair."""
    from datasets import Dataset
    from PIL import Image
    from trl import DPOConfig, DPOTrainer

    from prefmill.families.causal.loading import load_model
    from prefmill.families.causal.vllm_loading import ImageTextProcessor
    from prefmill.store.jsonl import write_jsonl

    rows = list(read_jsonl(datasets.path / "dpo_vision_train" / "data.jsonl"))[:12]
    own = tmp_path / "own" / "dpo"
    write_jsonl(own / "data.jsonl", [
        {**row, "images": [str(datasets.path / name) for name in row["images"]]} for row in rows
    ])  # fmt: skip
    stage = load_stage("dpo")
    keys = {**TRAINING, "learning_rate": 1e-3, "effective_batch_size": 4, "layout": "group",
            "lr_scheduler_type": "constant", "dataset": str(own / "data.jsonl"), "save_steps": 50}  # fmt: skip
    stage.run(validate(stage.config, keys), training_task("dpo", tmp_path, policy=base))
    log = list(read_jsonl(tmp_path / "logs" / "margins" / "margins_log.jsonl"))
    sizes = [sum(row["step"] == step for row in log) for step in sorted({row["step"] for row in log})]
    by_id = {row["id"]: row for row in rows}
    data = []
    for row in (by_id[logged["pair_id"]] for logged in log):
        before, after = row["conversations"][0]["value"].split("<image>")[0], row["conversations"][0]["value"]
        parts = [{"type": "text", "text": before}, *({"type": "image"} for _ in row["images"])]
        assert after == before + "<image>" * len(row["images"])
        data.append({
            "prompt": [{"role": "user", "content": parts}],
            **{side: [{"role": "assistant", "content": [{"type": "text", "text": row[side]["value"]}]}]
               for side in ("chosen", "rejected")},
            "images": [Image.open(datasets.path / name) for name in row["images"]],
        })  # fmt: skip
    trainer = DPOTrainer(
        model=load_model(str(base.path), precision="fp32"), ref_model=load_model(str(base.path), precision="fp32"),
        args=DPOConfig(output_dir=str(tmp_path / "trl"), use_cpu=True, bf16=False, report_to="none", max_length=None,
                       save_strategy="no", per_device_train_batch_size=sizes[0], learning_rate=1e-3,
                       max_steps=2, logging_steps=1, train_sampling_strategy="sequential",
                       lr_scheduler_type="constant"),
        train_dataset=Dataset.from_list(data), processing_class=ImageTextProcessor.from_pretrained(str(base.path)),
    )  # fmt: skip
    trainer.train()
    expected = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    count = 2 if sizes[0] == sizes[1] else 1
    assert losses(tmp_path)[:count] == pytest.approx(expected[:count], abs=2e-5)
    assert count == 2
    assert expected[0] != pytest.approx(expected[1], abs=1e-3)
