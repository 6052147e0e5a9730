"""mdlm_sft: what it writes, that it learns, resuming after SIGKILL, its other names for keys, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from mdlm_artifacts import SHAPE, SMALL, make_toy, run_stage
from PIL import Image
from safetensors.torch import load_file, save_file
from training_artifacts import content, executed_steps, kill_after, publish_as

from prefmill.core.artifact import Artifact
from prefmill.core.config import validate
from prefmill.core.errors import ConfigError, InputError, PipelineError
from prefmill.demo.toy_language import THINGS
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from stages.mdlm_sft import MdlmSftConfig

KEYS: dict[str, Any] = {**SMALL, "new_model": SHAPE, "learning_rate": 3e-3}


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, datasets: Artifact) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    run_stage("mdlm_sft", folder, KEYS, datasets=datasets)
    return folder


def test_it_learns_and_writes_a_plain_folder_that_still_attends_both_ways(undisturbed: Path) -> None:
    from prefmill.families.mdlm.loading import load_diffusion_model, load_diffusion_tokenizer, mask_token_of

    evaluated = [row["eval_loss"] for row in read_curve(undisturbed / "logs" / STEPS) if "eval_loss" in row]
    assert len(evaluated) == 2
    assert evaluated[1] < evaluated[0]
    model = load_diffusion_model(str(undisturbed / "out"), precision="fp32")
    tokenizer = load_diffusion_tokenizer(str(undisturbed / "out"))
    assert mask_token_of(model, tokenizer) == tokenizer.mask_token_id
    assert not (undisturbed / "logs" / "margins").exists()


@pytest.mark.timing
@pytest.mark.slow
def test_killed_and_rerun_it_ends_with_the_same_bytes(tmp_path: Path, undisturbed: Path, datasets: Artifact) -> None:
    kill_after(7, tmp_path, lambda: run_stage("mdlm_sft", tmp_path, KEYS, datasets=datasets))
    run_stage("mdlm_sft", tmp_path, KEYS, datasets=datasets)
    assert content(tmp_path) == content(undisturbed)
    assert sorted(set(executed_steps(tmp_path))) == list(range(1, 17))


@pytest.mark.slow
def test_resuming_can_be_forbidden_or_start_from_another_folder(
    tmp_path: Path, undisturbed: Path, datasets: Artifact
) -> None:
    """Anew ends as undisturbed; from its checkpoint only the steps after it are taken."""
    (tmp_path / "a" / "out" / "checkpoint-3").mkdir(parents=True)
    run_stage("mdlm_sft", tmp_path / "a", {**KEYS, "resume_from_checkpoint": False}, datasets=datasets)
    assert content(tmp_path / "a") == content(undisturbed)
    saved = str(tmp_path / "a" / "out" / "checkpoint-15")
    run_stage("mdlm_sft", tmp_path / "b", {**KEYS, "resume_from_checkpoint": saved}, datasets=datasets)
    assert executed_steps(tmp_path / "b") == [16]
    assert content(tmp_path / "b") == content(undisturbed)
    # A checkpoint that lacks a weight would go on from a random one.
    weights = load_file(f"{saved}/model.safetensors")
    weights.pop(next(name for name in weights if "layers" in name))
    save_file(weights, f"{saved}/model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PipelineError, match="lacks weights"):
        run_stage("mdlm_sft", tmp_path / "c", {**KEYS, "resume_from_checkpoint": saved}, datasets=datasets)


def test_a_file_of_prompts_and_completions_tunes_a_checkpoint(tmp_path: Path, undisturbed: Path) -> None:
    rows = [{"prompt": f"how is the {thing}", "completion": f"it is clear and {word}"}
            for word in ("old", "new") for thing in THINGS[:8]]  # fmt: skip
    write_jsonl(tmp_path / "chats.jsonl", rows)
    keys = {**SMALL, "num_train_epochs": 1, "sft_data_path": str(tmp_path / "chats.jsonl")}
    model = publish_as(undisturbed / "out", "checkpoint")
    exported = tmp_path / "mine"
    assert run_stage("mdlm_sft", tmp_path / "a", {**keys, "output_dir": str(exported)}, model=model)["train_rows"] == 16
    assert (exported / "model.safetensors").read_bytes() == content(tmp_path / "a")["model.safetensors"]


def test_rows_are_read_as_sft_reads_them(tmp_path: Path, undisturbed: Path) -> None:
    """A system column is part of the prompt, rows at fault are refused by name or dropped, and images are refused."""
    path, model = tmp_path / "chats.jsonl", publish_as(undisturbed / "out", "checkpoint")
    good = {"system": "be brief", "prompt": "how is the table", "completion": "it is clear and old"}
    write_jsonl(path, [good, {"prompt": "how is the proof", "completion": ""}, {"question": "x"}])
    keys = {**SMALL, "num_train_epochs": 1, "effective_batch_size": 4, "sft_data_path": str(path)}
    with pytest.raises(InputError, match="row"):
        run_stage("mdlm_sft", tmp_path / "a", keys, model=model)
    assert run_stage("mdlm_sft", tmp_path / "b", {**keys, "on_bad_row": "drop"}, model=model)["train_rows"] == 1
    assert len(json.loads((tmp_path / "b" / "logs" / "bad_rows.json").read_text())) == 2
    (kept,) = read_jsonl(next((tmp_path / "b").rglob("sft_train/data.jsonl")))
    assert [turn["role"] for turn in kept["messages"]] == ["system", "user", "assistant"]
    write_jsonl(path, [{**good, "images": ["a.png"], "prompt": "<image>"}])
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    with pytest.raises(InputError, match="cannot be shown images"):
        run_stage("mdlm_sft", tmp_path / "c", {**keys, "on_bad_row": "drop"}, model=model)


def test_a_token_without_an_embedding_is_refused_by_name(tmp_path: Path, undisturbed: Path) -> None:
    """In training and in evaluation: an IndexError before, when all was loaded."""
    from transformers import AutoTokenizer

    model, token = shutil.copytree(undisturbed / "out", tmp_path / "model"), "<later>"
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_special_tokens({"additional_special_tokens": [token]})
    tokenizer.save_pretrained(model)
    write_jsonl(tmp_path / "chats.jsonl", [{"prompt": "how is it", "completion": f"it is {token} old"}])
    keys = {**SMALL, "model_name_or_path": str(model), "sft_data_path": str(tmp_path / "chats.jsonl")}
    with pytest.raises(InputError, match=rf"no embedding for a token(.|\n)*'{token}', number"):
        run_stage("mdlm_sft", tmp_path / "a", keys)
    pair = {"prompt": f"how is {token}", "chosen": "it is old", "rejected": "it is new"}
    write_jsonl(tmp_path / "pairs.jsonl", [pair])
    keys = {"precision": "fp32", "diffusion_steps": 4, "num_tokens": 8, "block_tokens": 4, "num_steps": 4,
            "model_name_or_path": str(model), "pairs_path": str(tmp_path / "pairs.jsonl")}  # fmt: skip
    with pytest.raises(InputError, match=rf"no embedding for a token(.|\n)*'{token}', number"):
        run_stage("mdlm_evaluate", tmp_path / "b", keys)


def test_keys_have_the_names_this_field_knows() -> None:
    config = validate(
        MdlmSftConfig,
        {
            "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8, "use_mixed_precision": False,
            "gradient_checkpointing": True, "resume_from_checkpoint": "x", "output_dir": "y",
        },
    )  # fmt: skip
    assert (config.effective_batch_size, config.precision, config.activation_checkpointing) == (16, "fp32", True)
    assert isinstance(config.resume_from_checkpoint, Path)
    with pytest.raises(ConfigError, match="another name of precision"):
        validate(MdlmSftConfig, {"use_mixed_precision": True, "precision": "fp32"})
    with pytest.raises(ConfigError, match="add a lora section"):
        validate(MdlmSftConfig, {"quantization": "4bit"})


def test_what_it_refuses(tmp_path: Path, datasets: Artifact, undisturbed: Path) -> None:
    model = publish_as(undisturbed / "out", "checkpoint")
    with pytest.raises(PipelineError, match="a model to start from and a new one"):
        run_stage("mdlm_sft", tmp_path, KEYS, datasets=datasets, model=model)
    with pytest.raises(PipelineError, match="no dataset"):
        run_stage("mdlm_sft", tmp_path, KEYS)
    with pytest.raises(PipelineError, match="no model to start from"):
        run_stage("mdlm_sft", tmp_path, {**SMALL}, datasets=datasets)
    with pytest.raises(ConfigError, match="nothing is ever truncated"):
        run_stage("mdlm_sft", tmp_path, {**KEYS, "max_length": 10}, datasets=datasets)
