"""Tokens beyond a model's embeddings: no matter where nothing uses them, refused by name where something does.

Gemma 3's 1B and 270M have 262,144 embeddings, and their tokenizer has the larger models' image token, number 262,144:
https://github.com/huggingface/transformers/issues/37011.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from prefmill.core.config import validate
from prefmill.core.errors import InputError
from prefmill.core.stage import Task
from prefmill.store.jsonl import write_jsonl
from prefmill.training.config import TrainingConfig
from prefmill.training.preference_config import PreferenceConfig
from tests.tiny import TEMPLATE, pair_rows

TOKEN = "<image_soft_token>"


SMALL = {
    "learning_rate": 1e-3, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 8, "logging_steps": 1,
    "save_steps": 1, "max_length": 64, "report_to": [],
}  # fmt: skip
REFUSED = rf"has no embedding for a token(.|\n)*'{TOKEN}', number (.|\n)*take it out of the data or the chat template"


@pytest.fixture
def model(tiny_qwen2: Path, tmp_path: Path) -> Path:
    """A model without an embedding for the last token of its tokenizer, a special one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shutil.copytree(tiny_qwen2, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]})
    tokenizer.save_pretrained(folder)
    size = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().num_embeddings
    assert tokenizer.convert_tokens_to_ids(TOKEN) == size
    return folder


def task_in(folder: Path) -> Task:
    (folder / "out").mkdir(parents=True)
    return Task("r", "train", "clean", {}, {}, {}, folder / "out", folder / "logs")


def dpo(folder: Path, model: Path, rows: Path, **keys: object) -> None:
    from prefmill.families.causal.dpo import train_dpo

    config = validate(PreferenceConfig, {**SMALL, "layout": "pairwise", **keys})
    train_dpo(config, task_in(folder), str(model), rows, None)


def sft(folder: Path, model: Path, answers: list[str]) -> None:
    from prefmill.families.causal.sft import train_sft

    rows = [
        {"id": str(n), "messages": [{"role": "user", "content": "a model"}, {"role": "assistant", "content": answer}]}
        for n, answer in enumerate(answers)
    ]
    write_jsonl(folder / "rows" / "data.jsonl", rows)
    train_sft(validate(TrainingConfig, SMALL), task_in(folder), str(model), folder / "rows" / "data.jsonl", None)


@pytest.mark.slow
def test_a_token_that_no_text_uses_ends_no_training(model: Path, pairs_file: Path, tmp_path: Path) -> None:
    dpo(tmp_path / "dpo", model, pairs_file, ref_name=str(shutil.copytree(model, tmp_path / "reference")))
    sft(tmp_path / "sft", model, ["the result is new", "the table is old"])
    for stage in ("dpo", "sft"):
        assert (tmp_path / stage / "out" / "model.safetensors").is_file()


def test_a_row_with_such_a_token_is_refused(model: Path, tmp_path: Path) -> None:
    rows = pair_rows(4)
    rows[3]["rejected"] = {"from": "gpt", "value": f"a model {TOKEN} was"}
    write_jsonl(tmp_path / "data.jsonl", rows)
    with pytest.raises(InputError, match="the model " + REFUSED):
        dpo(tmp_path / "dpo", model, tmp_path / "data.jsonl")
    with pytest.raises(InputError, match="the model " + REFUSED):
        sft(tmp_path / "sft", model, ["the result is new", f"the {TOKEN} is old"])


def test_a_token_that_fills_rows_up_needs_an_embedding(model: Path, pairs_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = TOKEN
    tokenizer.save_pretrained(model)
    with pytest.raises(InputError, match=rf"'{TOKEN}', number (.|\n)*set pad_token to the end token"):
        dpo(tmp_path / "dpo", model, pairs_file)


def test_a_judge_is_refused_by_what_its_template_writes(model: Path, tmp_path: Path) -> None:
    from prefmill.checklist.engine import TransformersConfig
    from prefmill.checklist.engines import open_engine
    from prefmill.checklist.items import load_checklist

    text = f"{TOKEN} stands here"
    judge = open_engine(TransformersConfig(model_name_or_path=str(model)), load_checklist())
    assert len(judge.prompts.foreign(text)) > 3  # of a review the token is taken apart
    (tmp_path / "other.jinja").write_text(TOKEN + TEMPLATE)
    config = {"model_name_or_path": str(model), "chat_template": str(tmp_path / "other.jinja")}
    with pytest.raises(InputError, match="the model " + REFUSED):
        open_engine(validate(TransformersConfig, config), load_checklist())
