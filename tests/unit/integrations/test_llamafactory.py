"""LLaMA-Factory's configurations: every key taken over, known to be without effect, or refused; losses equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from prefmill.cli.main import main
from prefmill.core.config import load
from prefmill.core.errors import ConfigError
from prefmill.core.stage import Task
from prefmill.integrations.llamafactory import import_config
from prefmill.store.jsonl import read_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from stages.dpo import DpoConfig, run
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


TAGS = {"role_tag": "who", "content_tag": "text", "user_tag": "H", "assistant_tag": "B", "system_tag": "S"}


def write(tmp_path: Path, **keys: Any) -> Path:
    columns = {"messages": "talk", "chosen": "best", "rejected": "worst"}
    entry = {"file_name": "mine.json", "ranking": True, "formatting": "sharegpt", "columns": columns, "tags": TAGS}
    info = {"mine": entry, "sft": {"file_name": "x.json"},
            "orca": {"hf_hub_url": "a/b", "ranking": True, "subset": "en", "columns": {
                "prompt": "question", "chosen": "chosen", "rejected": "rejected", "system": "system"}}}  # fmt: skip
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    (data / "dataset_info.json").write_text(json.dumps(info))
    (data / "mine.json").write_text(json.dumps(rows()))
    given = {**GIVEN, "dataset_dir": str(data), **keys}
    path = tmp_path / "lf.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
    return path


def test_every_key_is_taken_over(tmp_path: Path) -> None:
    config, notes = import_config(write(tmp_path, bf16=True, pref_ftx=0.3, max_samples=9), num_gpus=4)
    assert config == {
        "pair_format": "sharegpt", "dataset": str(tmp_path / "data" / "mine.json"),
        "columns": {"conversations": "talk", "chosen": "best", "rejected": "worst"},
        "tags": {"role": "who", "content": "text", "user": "H", "assistant": "B", "system": "S"},
        "image_folder": str(tmp_path / "data"), "max_rows": 9, "beta": 0.2, "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.3], "label_smoothing": 0.0, "num_train_epochs": 1, "warmup_steps": 0.25,
        "report_to": [], "precision": "bf16", "activation_checkpointing": True, "max_length": 256,
        "on_overlong": "drop", "effective_batch_size": 16, "model_name_or_path": "m", "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine", "seed": 42, "per_device_train_batch_size": 2, "logging_steps": 1,
        "save_steps": 500, "layout": "group",
    }  # fmt: skip
    assert any("4 GPUs" in note for note in notes)


def test_what_the_file_leaves_out_is_llamafactorys_default(tmp_path: Path) -> None:
    silent = ["finetuning_type", "learning_rate", "num_train_epochs", "lr_scheduler_type", "pref_beta", "warmup_ratio",
              "per_device_train_batch_size", "gradient_accumulation_steps", "cutoff_len", "pref_loss"]  # fmt: skip
    config, _ = import_config(write(tmp_path, **dict.fromkeys(silent)))
    assert config["lora"] == {"r": 8, "alpha": 16.0, "use_dora": False, "target_modules": "all-linear"}
    assert (config["learning_rate"], config["num_train_epochs"], config["lr_scheduler_type"]) == (5e-5, 3, "linear")
    assert (config["effective_batch_size"], config["max_length"], config["beta"]) == (8, 2048, 0.1)
    assert (config["precision"], config["loss_type"]) == ("fp32", ["sigmoid"])


def test_hub_datasets_and_columns_left_out(tmp_path: Path) -> None:
    config, _ = import_config(write(tmp_path, dataset="orca"))
    assert (config["dataset"], config["subset"], config["split"]) == ("a/b", "en", "train")
    assert (config["pair_format"], config["columns"]) == ("alpaca", {"instruction": "question"})


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"stage": "sft"}, "stage(.|\n)*sft"), ({"pref_loss": "orpo"}, "orpo"),
        ({"use_galore": True}, "use_galore=True"),
        ({"finetuning_type": "freeze"}, "freeze"), ({"dataset": "mine,orca"}, "one dataset at a time"),
        ({"dataset": "nosuch"}, "mine, sft, orca"), ({"dataset": "sft"}, "not one of preferences"),
        ({"dataset_dir": "nowhere"}, "run this in the folder"), ({"num_train_epochs": 1.5}, "whole epochs"),
        ({"lora_dropout": 0.1}, "dropout"),
        ({"ref_model": "x", "quantization_bit": 4}, "quantization_bit=4, ref_model=x"),
        ({"val_size": 100}, "val_size"), ({"pref_bco_weight": 1.0}, "BCO"), ({"freeze_vision_tower": True}, "vision"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Path, keys: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        import_config(write(tmp_path, **keys))


def test_the_command_writes_a_configuration_that_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "mine.yaml"
    assert main(["import", "llamafactory", str(write(tmp_path)), "--output", str(output)]) == 0
    assert load(DpoConfig, output).beta == 0.2
    assert f"python -m stages.dpo {output}" in capsys.readouterr().out
    assert main(["import", "llamafactory", str(write(tmp_path, use_galore=True)), "--output", str(output)]) == 2


def chatml(*turns: tuple[str, str]) -> str:
    """What LLaMA-Factory's template `qwen` makes of a chat."""
    return "".join(f"<|im_start|>{role}\n{said}<|im_end|>\n" for role, said in turns)


def llamafactory_losses(folder: Path, data: list[dict[str, Any]], steps: int, ftx: float, loss: str) -> list[float]:
    """The losses of LLaMA-Factory's DPO, four pairs a step, from its formulas, on full logits, one row at a time."""
    from transformers import get_scheduler

    from prefmill.families.causal.loading import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(folder))
    policy, reference = (load_model(str(folder), precision="fp32") for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3, weight_decay=0.0)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=1, num_training_steps=steps)

    def logps(model: Any, row: dict[str, Any], side: str) -> tuple[torch.Tensor, int]:
        roles = {"S": "system", "H": "user", "B": "assistant"}
        prompt = chatml(*((roles[turn["who"]], turn["text"]) for turn in row["talk"])) + "<|im_start|>assistant\n"
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"]
               for text in (prompt, row[side]["text"] + "<|im_end|>\n")]  # fmt: skip
        logits = model(torch.tensor([ids[0] + ids[1]])).logits[0, len(ids[0]) - 1 : -1]
        total = logits.float().log_softmax(-1).gather(1, torch.tensor(ids[1])[:, None]).sum()
        return total, len(ids[1])

    losses = []
    for step in range(steps):
        found = []
        for row in data[4 * step : 4 * step + 4]:
            (good, length), (bad, other) = logps(policy, row, "best"), logps(policy, row, "worst")
            with torch.no_grad():
                ref_good, ref_bad = logps(reference, row, "best")[0], logps(reference, row, "worst")[0]
            if loss == "ipo":
                difference = (good - ref_good) / length - (bad - ref_bad) / other
                value = (difference - 1 / (2 * 0.2)) ** 2
            else:
                value = -torch.nn.functional.logsigmoid(0.2 * ((good - bad) - (ref_good - ref_bad)))
            found.append(value - ftx * good / length)
        mean = torch.stack(found).mean()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(mean.item())
    return losses


@pytest.mark.slow
@pytest.mark.parametrize(("loss", "ftx"), [("sigmoid", 0.0), ("sigmoid", 0.3), ("ipo", 0.0)])
def test_an_imported_run_has_llamafactorys_losses(loss: str, ftx: float, tmp_path: Path, tiny_qwen2: Path) -> None:
    output = tmp_path / "mine.yaml"
    keys = {"model_name_or_path": str(tiny_qwen2), "pref_loss": loss, "pref_ftx": ftx, "warmup_ratio": 0.33}
    assert main(["import", "llamafactory", str(write(tmp_path, **keys)), "--output", str(output)]) == 0
    (tmp_path / "out").mkdir()
    task = Task("r", "dpo", "all", {}, {}, {}, tmp_path / "out", tmp_path / "logs")
    run(load(DpoConfig, output), task)
    found = [row["loss"] for row in read_curve(tmp_path / "logs" / STEPS) if "loss" in row]
    log = read_jsonl(tmp_path / "logs" / "margins" / "margins_log.jsonl")
    order = [int(row["pair_id"].removeprefix("row-")) for row in log]
    assert sorted(order) == list(range(12))
    data = rows()
    expected = llamafactory_losses(tiny_qwen2, [data[place] for place in order], 3, ftx, loss)
    assert found == pytest.approx(expected, abs=2e-5)
    assert len(set(found)) > 1
