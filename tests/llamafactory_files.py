"""A folder as LLaMA-Factory has it: a configuration, its registry of datasets and their files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from tests.tiny import sentence

# The shape of the examples that LLaMA-Factory ships, with this file's own values.
GIVEN: dict[str, Any] = {
    "model_name_or_path": "m", "stage": "dpo", "do_train": True, "finetuning_type": "full", "pref_beta": 0.2,
    "pref_loss": "sigmoid", "dataset": "mine", "template": "qwen", "cutoff_len": 256, "overwrite_cache": True,
    "preprocessing_num_workers": 16, "output_dir": "saves/x", "logging_steps": 1, "save_steps": 500,
    "plot_loss": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
    "num_train_epochs": 1.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.25, "ddp_timeout": 180000000,
}  # fmt: skip


def rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {
            "talk": [{"who": "S", "text": "Be brief."}, {"who": "H", "text": sentence(n // 2, 7)}],
            "best": {"who": "B", "text": sentence(100 + n // 2, 5)},
            "worst": {"who": "B", "text": sentence(200 + n, 3 + n % 4)},
        }
        for n in range(count)
    ]


LORA = {"finetuning_type": "lora"}
TAGS = {"role_tag": "who", "content_tag": "text", "user_tag": "H", "assistant_tag": "B", "system_tag": "S"}


def write(tmp_path: Path, **keys: Any) -> Path:
    columns = {"messages": "talk", "chosen": "best", "rejected": "worst"}
    entry = {"file_name": "mine.json", "ranking": True, "formatting": "sharegpt", "columns": columns, "tags": TAGS}
    talks = {"file_name": "talks.json", "formatting": "sharegpt", "columns": {"messages": "talk", "tools": "can"}}
    info = {"mine": entry, "sft": {"file_name": "x.json"}, "talks": {**talks, "tags": TAGS},
            "drawn": {**talks, "tags": TAGS, "num_samples": 3}, "part": {**talks, "tags": TAGS, "split": "train[:1]"},
            "called": {**talks, "file_name": "called.json",
                       "tags": {**TAGS, "observation_tag": "T", "function_tag": "C"}},
            "clips": {**talks, "columns": {"messages": "talk", "videos": "v"}},
            "pictures": {**talks, "columns": {"messages": "talk", "images": "shown"}, "tags": TAGS},
            "pairs_of_pictures": {**entry, "columns": {**columns, "images": "shown"}},
            "other": {**entry, "file_name": "other.json"},
            "orca": {"hf_hub_url": "a/b", "ranking": True, "subset": "en", "columns": {
                "prompt": "question", "chosen": "chosen", "rejected": "rejected", "system": "system"}}}  # fmt: skip
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    (data / "dataset_info.json").write_text(json.dumps(info))
    (data / "mine.json").write_text(json.dumps(rows()))
    (data / "other.json").write_text(json.dumps(rows(30)))
    (data / "x.json").write_text(json.dumps([{"instruction": "Q?", "input": "", "output": "A"}]))
    turns = [{"who": "H", "text": "Q?"}, {"who": "B", "text": "A"}]
    (data / "talks.json").write_text(json.dumps([{"talk": turns * 2, "can": "[]"}]))
    call = {"who": "C", "text": json.dumps({"name": "look", "arguments": {"at": "it"}})}
    called = [turns[0], call, {"who": "T", "text": "4"}, turns[1]]
    (data / "called.json").write_text(json.dumps([{"talk": called, "can": json.dumps([{"name": "look"}])}]))
    given = {**GIVEN, "dataset_dir": str(data), **keys}
    path = tmp_path / "lf.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
    return path
