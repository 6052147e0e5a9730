"""evaluate on papers with figures and page images, by a tiny vision-language model and through transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_artifacts import make_task, publish_as
from page_checks import opens_cleanly
from PIL import Image
from pipeline_runs import REPOSITORY, executed, ran, run

from prefmill.core.artifact import Artifact
from prefmill.core.config import load, validate
from prefmill.core.errors import InputError
from prefmill.core.records import Modality
from prefmill.core.stage import load_stage
from prefmill.families.causal.loading import load_model
from prefmill.families.causal.vllm_loading import ImageTextProcessor
from prefmill.reviews.prompt import review_images, review_messages, split_completion
from prefmill.reviews.scale import COMMON_SCALE
from prefmill.store.jsonl import read_jsonl, write_jsonl
from stages.evaluate import STAGE
from stages.evaluate import run as evaluate_stage
from tests.tiny import save_tiny_qwen2

pytestmark = pytest.mark.slow

MODALITIES: tuple[Modality, ...] = ("clean_images", "vision")
KEYS: dict[str, Any] = {
    "model": "base", "max_new_tokens": 12, "batch_size": 3, "temperature": 0.0, "precision": "fp32",
}  # fmt: skip
PIPELINE = """
name: modalities
workspace: {workspace}
stages:
  ingest_reviews: {{ config: demo, set: {{ sources: [{{ format: generated, num_papers: 60, images: true }}] }} }}
  score_reviews: {{ config: demo }}
  build_datasets: {{ config: demo, set: {{ modalities: [clean_images, vision], decisions: [accepted, rejected] }} }}
  validate_datasets: {{ config: demo }}
  sft:
    config: demo
    set: {{ model_name_or_path: {model}, max_length: 4096, num_train_epochs: 1, effective_batch_size: 8 }}
    array: {{ modality: [clean_images, vision] }}
  evaluate:
    config: demo
    set: {{ model_name_or_path: {model}, num_papers: 3, samples_per_paper: 1, max_new_tokens: 12 }}
    array: {{ model: [human, base, sft], modality: [clean_images, vision] }}
    needs: {{ checkpoint: {{ by: model, stages: {{ sft: sft }} }} }}
  report: {{ config: demo, set: {{ num_resamples: 1000 }} }}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """A corpus with a page and a figure for each paper but one of the test papers, which has neither."""
    folder = tmp_path_factory.mktemp("workspace") / "data" / "run" / "ingest_reviews" / "all"
    stage = load_stage("ingest_reviews")
    config = validate(stage.config, {"sources": [{"format": "generated", "num_papers": 80, "images": True}]})
    stage.run(config, make_task("ingest_reviews", folder, {}))
    papers = list(read_jsonl(folder / "papers.jsonl"))
    next(paper for paper in papers if paper["split"] == "test").update(pages=[], figures=[])
    write_jsonl(folder / "papers.jsonl", papers)
    return publish_as(folder, "review_corpus")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny vision-language model with larger weights: as it comes, it says the same of every picture."""
    from prefmill.demo.tiny_models import build

    folder = build("qwen2_5_vl", tmp_path_factory.mktemp("vl"))
    model = load_model(str(folder), precision="fp32")
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15, generator=random)
    model.save_pretrained(folder)
    return folder


def evaluate(corpus: Artifact, base: Path, output: Path, **keys: Any) -> list[Any]:
    folder = output / "data" / "run" / "evaluate" / "base"
    config = load(STAGE.config, {**KEYS, "model_name_or_path": str(base), **keys})
    evaluate_stage(config, make_task("evaluate", folder, {"corpus": [corpus]}))
    return list(read_jsonl(folder / "generations.jsonl"))


def with_images(corpus: Artifact) -> list[Any]:
    papers = read_jsonl(corpus.file("papers.jsonl"))
    return [paper for paper in papers if paper["split"] == "test" and paper["pages"]]


@pytest.mark.parametrize("modality", MODALITIES)
def test_its_reviews_are_those_of_the_models_own_processor(
    corpus: Artifact, base: Path, tmp_path: Path, modality: Modality
) -> None:
    """One paper at a time, through the processor and generate() of transformers, against batches of ours."""
    found = {row["paper_id"]: row["text"] for row in evaluate(corpus, base, tmp_path, modality=modality)}
    model, processor = load_model(str(base), precision="fp32"), ImageTextProcessor.from_pretrained(str(base))
    papers = with_images(corpus)
    assert set(found) == {paper["paper_id"] for paper in papers}  # the paper without images is not among them
    for paper in papers:
        images = [Image.open(corpus.path / name) for name in review_images(paper, modality)]
        (message,) = review_messages(paper, modality)
        texts = message["content"].split("<image>")
        parts: list[dict[str, str]] = [{"type": "text", "text": texts[0]}, *({"type": "image"} for _ in images)]
        chat = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        given = processor(text=[chat], images=images, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**given, max_new_tokens=12, do_sample=False)[0, given["input_ids"].shape[1] :]
        text = processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert found[paper["paper_id"]] == split_completion(text, COMMON_SCALE)[0]
    assert len(set(found.values())) > 1


def test_batches_do_not_matter_but_pictures_do(corpus: Artifact, base: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"modality": "vision", "temperature": 1.0, "num_papers": 4}
    first = evaluate(corpus, base, tmp_path / "three", **keys)
    assert evaluate(corpus, base, tmp_path / "one", **keys, batch_size=1) == first
    smaller = evaluate(corpus, base, tmp_path / "small", **keys, max_pixels=784 * 2)
    assert [row["paper_id"] for row in smaller] == [row["paper_id"] for row in first]
    assert [row["text"] for row in smaller] != [row["text"] for row in first]


def test_people_are_compared_on_the_same_papers(corpus: Artifact, base: Path, tmp_path: Path) -> None:
    human = evaluate(corpus, base, tmp_path, model="human", modality="vision", num_papers=3)
    model = evaluate(corpus, base, tmp_path / "model", modality="vision", num_papers=3)
    assert {row["paper_id"] for row in human} <= {row["paper_id"] for row in model}
    with pytest.raises(InputError, match="too few test papers with images for the modality vision"):
        evaluate(corpus, base, tmp_path / "many", modality="vision", num_papers=len(with_images(corpus)) + 1)


def test_what_cannot_see_is_refused(corpus: Artifact, tmp_path: Path) -> None:
    blind = save_tiny_qwen2(tmp_path / "blind")
    with pytest.raises(InputError, match="this model cannot be shown images"):
        evaluate(corpus, blind, tmp_path, modality="vision")


def test_a_pipeline_evaluates_every_model_on_every_modality(base: Path, tmp_path: Path, chromium: str) -> None:
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    file = tmp_path / "configs" / "pipelines" / "modalities.yaml"
    file.write_text(PIPELINE.format(workspace=tmp_path, model=base))
    printed = run(tmp_path, pipeline=file)
    tasks = {f"evaluate:{model}-{modality}" for model in ("human", "base", "sft") for modality in MODALITIES}
    assert tasks <= ran(printed)
    data = tmp_path / "data" / "modalities"
    texts = {}
    for modality in MODALITIES:
        for model in ("base", "sft"):
            folder = data / "evaluate" / f"{model}-{modality}"
            assert json.loads((folder / "metrics.json").read_text())["modality"] == modality
            texts[model, modality] = (folder / "generations.jsonl").read_text()
    assert len(set(texts.values())) == 4  # every checkpoint and every modality has its own
    comparison = json.loads((data / "report" / "all" / "comparison.json").read_text())
    assert [part["modality"] for part in comparison["modalities"]] == list(MODALITIES)
    assert executed(tmp_path)
    opens_cleanly(chromium, tmp_path, (data / "report" / "all" / "report.html").read_text(), width=390)
