"""evaluate: plumbing with a tiny untrained model, resuming, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from evaluation_artifacts import make_corpus, make_task, publish_as
from training_artifacts import kill_when

from prefmill.core.artifact import Artifact
from prefmill.core.config import load
from prefmill.core.errors import ConfigError, InputError, PipelineError
from prefmill.distributed import isolation
from prefmill.store.jsonl import read_jsonl, write_jsonl
from stages.evaluate import STAGE, EvaluateConfig, run
from tests.tiny import save_tiny_qwen2

SETTINGS: dict[str, Any] = {
    "max_new_tokens": 24, "samples_per_paper": 2, "batch_size": 6, "temperature": 1.0, "top_p": 1.0,
    "precision": "fp32",
}  # fmt: skip
PAYLOAD = ["evaluations.jsonl", "generations.jsonl", "metrics.json"]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("workspace")


@pytest.fixture(scope="module")
def corpus(workspace: Path) -> Artifact:
    return make_corpus(workspace, 24)


@pytest.fixture(scope="module")
def base(workspace: Path, corpus: Artifact) -> Artifact:
    folder = workspace / "checkpoints" / "run" / "tiny_model" / "all"
    save_tiny_qwen2(folder)
    return publish_as(folder, "checkpoint", corpus=corpus)


def evaluate(corpus: Artifact, output: Path, checkpoint: Artifact | None = None, **config: Any) -> dict[str, Any]:
    inputs = {"corpus": [corpus], "checkpoint": [checkpoint] if checkpoint else []}
    return run(EvaluateConfig(**{**SETTINGS, **config}), make_task("evaluate", output, inputs))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in PAYLOAD}


def folder_of(root: Path, name: str) -> Path:
    return root / "data" / "run" / "evaluate" / name


def test_a_model_is_evaluated_on_test_papers_only(corpus: Artifact, base: Artifact, workspace: Path) -> None:
    output = folder_of(workspace, "base-clean")
    metrics = evaluate(corpus, output, base, model="base")
    papers = {row["paper_id"]: row for row in read_jsonl(corpus.file("papers.jsonl"))}
    generations = list(read_jsonl(output / "generations.jsonl"))
    evaluations = list(read_jsonl(output / "evaluations.jsonl"))
    assert {papers[row["paper_id"]]["split"] for row in generations} == {"test"}
    assert len(generations) == 2 * sum(paper["split"] == "test" for paper in papers.values())
    assert [row["review_id"] for row in evaluations] == [f"{row['paper_id']}#{row['sample']}" for row in generations]
    assert generations == sorted(generations, key=lambda row: (row["paper_id"], row["sample"]))
    assert set(generations[0]) == {"paper_id", "sample", "text", "rating", "decision", "truncated", "num_tokens"}
    written = json.loads((output / "metrics.json").read_text())
    assert metrics["num_reviews"] == len(generations) == written["num_reviews"]
    assert written["overall"]["num_factors"] is not None
    assert len(written["items"]) == 24
    assert len({row["text"] for row in generations}) > 5


def test_the_model_given_is_the_one_evaluated(corpus: Artifact, base: Artifact, tmp_path: Path) -> None:
    """The same weights under another label say the same; other weights do not."""
    evaluate(corpus, folder_of(tmp_path, "base"), base, model="base")
    evaluate(corpus, folder_of(tmp_path, "named"), None, model="named", model_name_or_path=str(base.path))
    other = save_tiny_qwen2(tmp_path / "other", seed=1)
    evaluate(corpus, folder_of(tmp_path, "other"), None, model="other", model_name_or_path=str(other))
    first, named, third = (contents(folder_of(tmp_path, name)) for name in ("base", "named", "other"))
    assert named["generations.jsonl"] == first["generations.jsonl"] != third["generations.jsonl"]


def test_the_payload_holds_nothing_of_this_machine(corpus: Artifact, base: Artifact, tmp_path: Path) -> None:
    evaluate(corpus, folder_of(tmp_path, "base"), base, model="base")
    for content in contents(folder_of(tmp_path, "base")).values():
        assert str(tmp_path).encode() not in content
        assert str(base.path).encode() not in content


def test_batches_do_not_matter_in_float32(corpus: Artifact, base: Artifact, tmp_path: Path) -> None:
    evaluate(corpus, folder_of(tmp_path, "six"), base, model="base")
    evaluate(corpus, folder_of(tmp_path, "one"), base, model="base", batch_size=1)
    assert contents(folder_of(tmp_path, "six")) == contents(folder_of(tmp_path, "one"))


@pytest.mark.slow
def test_a_writing_process_started_anew_writes_the_same(
    corpus: Artifact, base: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with GPUs, where it is not forked."""
    evaluate(corpus, folder_of(tmp_path, "forked"), base, model="base")
    monkeypatch.setattr(isolation, "_start_method", lambda: "spawn")
    evaluate(corpus, folder_of(tmp_path, "anew"), base, model="base")
    assert contents(folder_of(tmp_path, "anew")) == contents(folder_of(tmp_path, "forked"))


@pytest.mark.timing
@pytest.mark.slow
def test_killed_at_any_point_it_ends_with_the_same_bytes(corpus: Artifact, base: Artifact, tmp_path: Path) -> None:
    """SIGKILL, several times, each when another stored batch has appeared; then to the end."""
    whole, killed = folder_of(tmp_path, "whole"), folder_of(tmp_path, "killed")
    evaluate(corpus, whole, base, model="base", batch_size=2)
    for stored in (1, 3):
        kill_when(
            lambda stored=stored: len(_batches(killed)) >= stored,
            lambda: evaluate(corpus, killed, base, model="base", batch_size=2),
        )
        assert not (killed / "metrics.json").exists()
    before = {path: path.stat().st_mtime_ns for path in _batches(killed)}
    assert len(before) < 8
    evaluate(corpus, killed, base, model="base", batch_size=2)
    assert {path: path.stat().st_mtime_ns for path in before} == before  # resumed, not made again
    assert contents(killed) == contents(whole)


def _batches(folder: Path) -> list[Path]:
    return sorted((folder / "work").glob("generated-*.jsonl"))


def test_human_reviews_are_a_reference_point_without_a_model(corpus: Artifact, tmp_path: Path) -> None:
    metrics = evaluate(corpus, folder_of(tmp_path, "human"), model="human")
    reviews = {row["paper_id"]: row for row in read_jsonl(corpus.file("reviews.jsonl"))}
    rows = list(read_jsonl(folder_of(tmp_path, "human") / "generations.jsonl"))
    assert {row["paper_id"] for row in rows} <= set(reviews)
    assert metrics["has_rating"] == 1
    assert metrics["rating_rank_correlation"] is None
    assert metrics["num_factors"] > 2


def test_quality_factors_are_left_out_on_a_corpus_of_other_origin(base: Artifact, tmp_path: Path) -> None:
    corpus = make_corpus(tmp_path, 24, generated=False)
    metrics = evaluate(corpus, folder_of(tmp_path, "human"), model="human")
    assert metrics["num_factors"] is None
    assert json.loads((folder_of(tmp_path, "human") / "metrics.json").read_text())["factors"] is None


def test_a_paper_trained_on_is_refused(corpus: Artifact, base: Artifact, tmp_path: Path) -> None:
    test_paper = next(row["paper_id"] for row in read_jsonl(corpus.file("papers.jsonl")) if row["split"] == "test")
    datasets = tmp_path / "data" / "run" / "build_datasets" / "all"
    write_jsonl(datasets / "dpo_clean_train" / "data.jsonl", [{"group": test_paper}])
    built = publish_as(datasets, "preference_datasets")
    tuned = tmp_path / "checkpoints" / "run" / "dpo" / "clean"
    save_tiny_qwen2(tuned)
    checkpoint = publish_as(tuned, "checkpoint", policy=base, datasets=built)
    with pytest.raises(PipelineError, match=f"trained on(.|\n)*{test_paper}"):
        evaluate(corpus, folder_of(tmp_path, "dpo-clean"), checkpoint, model="dpo")
    assert not (folder_of(tmp_path, "dpo-clean") / "metrics.json").exists()


def test_a_trained_label_never_falls_back_on_another_model(corpus: Artifact, base: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no checkpoint for model 'dpo'(.|\n)*only model_name_or_path"):
        evaluate(corpus, folder_of(tmp_path, "dpo"), None, model="dpo", model_name_or_path=str(base.path))
    with pytest.raises(ConfigError, match="no checkpoint for model 'base'"):
        evaluate(corpus, folder_of(tmp_path, "base"), None, model="base")


def test_prompts_too_long_are_refused_or_left_out_and_counted(corpus: Artifact, base: Artifact, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"do not fit the model's context(.|\n)*max_prompt_tokens="):
        evaluate(corpus, folder_of(tmp_path, "all"), base, model="base", max_new_tokens=440)
    lengths = sorted(_prompt_lengths(corpus, base))
    evaluate(corpus, folder_of(tmp_path, "some"), base, model="base", max_prompt_tokens=lengths[3])
    written = json.loads((folder_of(tmp_path, "some") / "metrics.json").read_text())
    kept = sum(length <= lengths[3] for length in lengths)
    assert (written["num_papers"], written["num_papers_left_out"]) == (kept, len(lengths) - kept)
    with pytest.raises(InputError, match="every paper's prompt is longer"):
        evaluate(corpus, folder_of(tmp_path, "none"), base, model="base", max_prompt_tokens=5)


def _prompt_lengths(corpus: Artifact, base: Artifact) -> list[int]:
    from prefmill.families.causal.generation import encode_prompts
    from prefmill.families.causal.loading import load_tokenizer
    from prefmill.reviews.prompt import review_messages

    papers = [row for row in read_jsonl(corpus.file("papers.jsonl")) if row["split"] == "test"]
    chats = {row["paper_id"]: review_messages(row, "clean") for row in papers}
    return [len(item.prompt_ids) for item in encode_prompts(load_tokenizer(str(base.path)), chats, 1)]  # type: ignore[arg-type]


def test_a_template_with_a_token_that_has_no_embedding_is_refused(
    corpus: Artifact, base: Artifact, tmp_path: Path
) -> None:
    """An IndexError before; on a GPU an assertion without a name."""
    from transformers import AutoTokenizer

    folder = shutil.copytree(base.path, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start>"]})
    tokenizer.chat_template = "<start>" + tokenizer.chat_template
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match=r"the model has no embedding for a token(.|\n)*'<start>', number"):
        evaluate(corpus, folder_of(tmp_path, "named"), None, model="named", model_name_or_path=str(folder))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model": "base", "generation": {"engine": "vlm"}}, "generation"),
        ({"model": "a/b"}, "model = 'a/b'"),
        ({"model": "base", "temprature": 1.0}, r"unknown key \(did you mean 'temperature'"),
        ({"model": "base", "top_p": 0.0}, "top_p"),
        ({"model": "base", "engine": {"engine": "lexicl"}}, "engine"),
    ],
)
def test_a_wrong_configuration_is_explained(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load(STAGE.config, config)


@pytest.mark.slow
def test_an_adapter_is_evaluated_as_its_merged_model(corpus: Artifact, base: Artifact, tmp_path: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base.path), lora)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(base.path).save_pretrained(tmp_path / "merged")
    for name in ("adapter", "merged"):
        evaluate(corpus, folder_of(tmp_path, name), None, model="x", model_name_or_path=str(tmp_path / name))
    evaluate(corpus, folder_of(tmp_path, "base"), base, model="x")
    found = {name: contents(folder_of(tmp_path, name)) for name in ("adapter", "merged", "base")}
    assert found["adapter"] == found["merged"] != found["base"]
