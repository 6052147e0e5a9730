"""Images of Qwen3-VL, Gemma 3 and 4 through the stages: sft, dpo in both layouts, and evaluate on what sft wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import evaluation_artifacts
import pytest
import torch
from PIL import Image
from training_artifacts import make_datasets, make_task, publish_as

from prefmill.core.artifact import Artifact
from prefmill.core.config import load, validate
from prefmill.core.stage import load_stage
from prefmill.families.causal.image_limits import ImageLimits
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.families.causal.vision import with_images
from prefmill.families.causal.vision_families import open_reader
from prefmill.reviews.prompt import review_messages, split_completion
from prefmill.reviews.scale import COMMON_SCALE
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from tests.models.gemma import save_gemma
from tests.tiny import sentence
from tests.unit.families.causal.test_gemma_vision import greedy
from tests.unit.families.causal.test_newer_vision import model_of

pytestmark = pytest.mark.slow
TRAINING: dict[str, Any] = {
    "learning_rate": 2e-3, "num_train_epochs": 2, "precision": "fp32", "per_device_train_batch_size": 2,
    "effective_batch_size": 4, "max_length": 2048, "logging_steps": 1, "report_to": [], "modality": "vision",
}  # fmt: skip
ROWS = [{"id": f"r{n}", "paper_id": f"p{n}", "images": [f"pictures/{k}.png" for k in range(n % 3)]} for n in range(4)]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("datasets")
    (folder / "pictures").mkdir()
    for number, size in enumerate([(24, 40), (50, 20)]):
        Image.effect_noise(size, 80).convert("RGB").save(folder / "pictures" / f"{number}.png")
    said = [sentence(n, 4) + "<image>" * len(row["images"]) for n, row in enumerate(ROWS)]
    chats = [
        {**row, "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": sentence(n + 50, 5)}]}
        for n, (row, text) in enumerate(zip(ROWS, said, strict=True))
    ]
    pairs = [
        {**row, "id": f"{row['id']}{n}", "group": row["id"], "conversations": [{"from": "human", "value": text}],
         "chosen": {"from": "gpt", "value": sentence(70 + n, 5)}, "rejected": {"from": "gpt", "value": sentence(90, 4)}}
        for row, text in zip(ROWS, said, strict=True) for n in range(2)
    ]  # fmt: skip
    return make_datasets(folder, sft_vision_train=chats, dpo_vision_train=pairs)


@pytest.fixture(scope="module", params=["qwen3_vl", "gemma3", "gemma4"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "qwen3_vl":
        from prefmill.demo.tiny_models import build

        tokenizer = load_tokenizer(str(build("qwen2_5_vl", tmp_path_factory.mktemp("vl"))))
        tokenizer.save_pretrained(folder)
        model_of("qwen3_vl", tokenizer, folder, max_position_embeddings=4096).float().save_pretrained(folder)
    else:
        keys = {"use_bidirectional_attention": "vision"} if request.param == "gemma4" else {}
        save_gemma(request.param, folder, sliding_window=12, max_position_embeddings=4096, **keys)
    return publish_as(folder, "checkpoint")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_curve(folder / "logs" / STEPS) if "loss" in row]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, base: Artifact, datasets: Artifact) -> Path:
    folder, stage = tmp_path_factory.mktemp("sft"), load_stage("sft")
    stage.run(validate(stage.config, TRAINING), make_task("sft", folder, model=base, datasets=datasets))
    return folder


def test_sft_starts_at_the_models_own_loss_and_learns(tuned: Path, base: Artifact, datasets: Artifact) -> None:
    model = load_model(str(base.path), precision="fp32")
    reader = open_reader(str(base.path), load_tokenizer(str(base.path)), ImageLimits())
    assert reader is not None
    total, tokens = 0.0, 0
    for row in read_jsonl(datasets.path / "sft_vision_train" / "data.jsonl"):
        images = [str(datasets.path / name) for name in row["images"]]
        prompt, answer = reader.encode(with_images(row["messages"][:1], images), row["messages"][1]["content"])
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logits = model(input_ids=ids, **reader.inputs(images, ids)).logits[0, len(prompt) - 1 : -1]
        total -= logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum().item()
        tokens += len(answer)
    assert losses(tuned)[0] == pytest.approx(total / tokens, abs=1e-4)
    assert losses(tuned)[-1] < losses(tuned)[0]


def test_dpo_starts_at_ln_2_and_learns_alike_in_both_layouts(
    tmp_path: Path, base: Artifact, datasets: Artifact
) -> None:
    stage, curves = load_stage("dpo"), []
    for layout in ("auto", "pairwise"):
        folder = tmp_path / layout
        metrics = stage.run(
            validate(stage.config, {**TRAINING, "layout": layout}),
            make_task("dpo", folder, policy=base, datasets=datasets),
        )
        curves.append(losses(folder))
        assert metrics["layout"] == ("group" if layout == "auto" else layout)
    assert curves[0][0] == pytest.approx(math.log(2), abs=1e-5)
    assert curves[0][-1] < math.log(2)
    assert curves[0] == pytest.approx(curves[1], abs=1e-3)


def test_evaluate_writes_what_the_folder_says(tuned: Path, datasets: Artifact, tmp_path: Path) -> None:
    corpus = evaluation_artifacts.make_corpus(tmp_path, num_papers=6)
    pages = corpus.path / "pages"
    pages.mkdir()
    Image.open(datasets.path / "pictures" / "0.png").save(pages / "0.png")
    papers = [{**paper, "pages": ["pages/0.png"]} for paper in read_jsonl(corpus.file("papers.jsonl"))]
    write_jsonl(corpus.path / "papers.jsonl", papers)
    corpus = evaluation_artifacts.publish_as(corpus.path, "review_corpus")
    stage, folder = load_stage("evaluate"), tmp_path / "data" / "run" / "evaluate" / "base"
    keys = {"model": "base", "model_name_or_path": str(tuned / "out"), "modality": "vision", "max_new_tokens": 8,
            "batch_size": 2, "temperature": 0.0, "precision": "fp32"}  # fmt: skip
    stage.run(load(stage.config, keys), evaluation_artifacts.make_task("evaluate", folder, {"corpus": [corpus]}))
    written = {row["paper_id"]: row["text"] for row in read_jsonl(folder / "generations.jsonl")}
    assert len(written) == 2
    model = load_model(str(tuned / "out"), precision="fp32")
    reader = open_reader(str(tuned / "out"), load_tokenizer(str(tuned / "out")), ImageLimits())
    assert reader is not None
    for paper in papers:
        if paper["split"] == "test":
            prompt = reader.encode_prompt(with_images(review_messages(paper, "vision"), [str(pages / "0.png")]))
            text = greedy(model, reader, prompt, [str(pages / "0.png")], 8)
            assert written[paper["paper_id"]] == split_completion(text, COMMON_SCALE)[0]
