"""LLaMA-Factory's configurations: every key taken over, known to be without effect, or refused; losses equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from prefmill.cli.main import main
from prefmill.core.config import load, validate
from prefmill.core.errors import ConfigError
from prefmill.core.stage import Task
from prefmill.families.causal.loading import load_model
from prefmill.families.causal.vision_parts import part_of_weights
from prefmill.integrations.llamafactory import import_config
from prefmill.integrations.llamafactory_keys import NO_EFFECT, REFUSED, TAKEN
from prefmill.pairs.chats import write_chats
from prefmill.pairs.sources import write_pairs
from prefmill.store.jsonl import read_jsonl
from prefmill.training.checkpoints import STEPS, read_curve
from stages.dpo import DpoConfig, run
from stages.sft import SftConfig
from stages.sft import run as run_sft
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
    talks = {"file_name": "talks.json", "formatting": "sharegpt", "columns": {"messages": "talk", "tools": "can"}}
    info = {"mine": entry, "sft": {"file_name": "x.json"}, "talks": {**talks, "tags": TAGS},
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
    given = {**GIVEN, "dataset_dir": str(data), **keys}
    path = tmp_path / "lf.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in given.items() if value is not None}))
    return path


def test_every_key_is_taken_over(tmp_path: Path) -> None:
    _, config, notes = import_config(write(tmp_path, bf16=True, pref_ftx=0.3, max_samples=9), num_gpus=4)
    assert config == {
        "pair_format": "sharegpt", "dataset": str(tmp_path / "data" / "mine.json"),
        "columns": {"conversations": "talk", "chosen": "best", "rejected": "worst"},
        "tags": {"role": "who", "content": "text", "user": "H", "assistant": "B", "system": "S"},
        "image_folder": str(tmp_path / "data"), "max_rows": 9, "beta": 0.2, "loss_type": ["sigmoid", "sft"],
        "loss_weights": [1.0, 0.3], "label_smoothing": 0.0, "num_train_epochs": 1, "warmup_steps": 0.25,
        "report_to": [], "precision": "bf16", "activation_checkpointing": True, "max_length": 256,
        "on_overlong": "drop", "effective_batch_size": 16, "model_name_or_path": "m", "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine", "seed": 42, "per_device_train_batch_size": 2, "logging_steps": 1,
        "save_steps": 500, "ddp_timeout": 180000000,
    }  # fmt: skip
    assert any("4 GPUs" in note for note in notes)


def test_what_the_file_leaves_out_is_llamafactorys_default(tmp_path: Path) -> None:
    silent = ["finetuning_type", "learning_rate", "num_train_epochs", "lr_scheduler_type", "pref_beta", "warmup_ratio",
              "per_device_train_batch_size", "gradient_accumulation_steps", "cutoff_len", "pref_loss"]  # fmt: skip
    _, config, _ = import_config(write(tmp_path, **dict.fromkeys(silent)))
    assert config["lora"] == {"r": 8, "alpha": 16.0, "use_dora": False, "target_modules": "all-linear"}
    assert (config["learning_rate"], config["num_train_epochs"], config["lr_scheduler_type"]) == (5e-5, 3, "linear")
    assert (config["effective_batch_size"], config["max_length"], config["beta"]) == (8, 2048, 0.1)
    assert (config["precision"], config["loss_type"]) == ("fp32", ["sigmoid"])


def test_hub_datasets_and_columns_left_out(tmp_path: Path) -> None:
    _, config, _ = import_config(write(tmp_path, dataset="orca"))
    assert (config["dataset"], config["subset"], config["split"]) == ("a/b", "en", "train")
    assert (config["pair_format"], config["columns"]) == ("alpaca", {"instruction": "question"})


LORA = {"finetuning_type": "lora"}
SFT = {"stage": "sft", "dataset": "sft"}
PICTURES = {**LORA, "stage": "sft", "dataset": "pictures"}


def full(**keys: Any) -> dict[str, Any]:
    return {"r": 8, "alpha": 16.0, "use_dora": False, "target_modules": "all-linear", **keys}


# For every key that is taken: LLaMA-Factory's lines, and prefmill's keys that must come of them.
EXPECTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage": (SFT, {"train_on": "all_assistant_turns", "pair_format": "instruction_output"}),
    "model_name_or_path": ({"model_name_or_path": "x/y"}, {"model_name_or_path": "x/y"}),
    "trust_remote_code": ({"trust_remote_code": True}, {"trust_remote_code": True}),
    "adapter_name_or_path": ({**LORA, "adapter_name_or_path": "a"}, {"lora": {"start": "a"}, "ref_name": "m"}),
    "finetuning_type": ({"finetuning_type": "full"}, {"lora": None}),
    "lora_rank": ({**LORA, "lora_rank": 4}, {"lora": full(r=4, alpha=8.0)}),
    "lora_alpha": ({**LORA, "lora_alpha": 5}, {"lora": full(alpha=5.0)}),
    "use_dora": ({**LORA, "use_dora": True}, {"lora": full(use_dora=True)}),
    "use_rslora": ({**LORA, "lora_rank": 4, "use_rslora": True}, {"lora": full(r=4, alpha=16.0)}),
    "lora_target": ({**LORA, "lora_target": ["q_proj", "k_proj"]}, {"lora": full(target_modules=["q_proj", "k_proj"])}),
    "freeze_vision_tower": (PICTURES, {"freeze_vision_tower": True, "freeze_projector": True, "lora": full()}),
    "freeze_multi_modal_projector": (
        {**PICTURES, "freeze_multi_modal_projector": False}, {"freeze_vision_tower": True, "freeze_projector": False}
    ),
    "freeze_language_model": ({"freeze_language_model": True}, {"freeze_language_model": True}),
    "quantization_bit": ({**LORA, "quantization_bit": 4}, {"quantization": "4bit"}),
    "quantization_method": (
        {**LORA, "quantization_bit": 4, "quantization_method": "bnb"}, {"quantization": "4bit"}
    ),
    "double_quantization": ({**LORA, "double_quantization": False}, {"quantization": None}),
    "ref_model": ({"ref_model": "x"}, {"ref_name": "x"}), "pref_beta": ({"pref_beta": 0.3}, {"beta": 0.3}),
    "pref_loss": ({"pref_loss": "ipo"}, {"loss_type": ["ipo_mean"]}),
    "pref_ftx": ({"pref_ftx": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    "simpo_gamma": ({"pref_loss": "simpo", "simpo_gamma": 0.7}, {"loss_type": ["simpo"], "simpo_gamma": 0.7}),
    "dpo_label_smoothing": ({"dpo_label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    "dataset": ({"dataset": "mine, other"}, {"dataset": None}),  # see the test of mixtures
    "dataset_dir": ({}, {"image_folder": "DATA"}), "media_dir": ({"media_dir": "m"}, {"image_folder": "m"}),
    "max_samples": ({"max_samples": 5}, {"max_rows": 5}), "val_size": ({"val_size": 0.2}, {"val_fraction": 0.2}),
    "mask_history": ({**SFT, "mask_history": True}, {"train_on": "last_turn"}),
    "cutoff_len": ({"cutoff_len": 99}, {"max_length": 99, "on_overlong": "drop"}),
    "enable_thinking": ({"enable_thinking": False}, {"chat_template_kwargs": {"enable_thinking": False}}),
    "image_max_pixels": ({**PICTURES, "image_max_pixels": 262144}, {"max_pixels": 262144, "min_pixels": 1024}),
    "image_min_pixels": ({**PICTURES, "image_min_pixels": 2048}, {"max_pixels": 589824, "min_pixels": 2048}),
    "learning_rate": ({"learning_rate": 1}, {"learning_rate": 1.0}),
    "num_train_epochs": ({"num_train_epochs": 2.0}, {"num_train_epochs": 2}),
    "lr_scheduler_type": ({"lr_scheduler_type": "constant"}, {"lr_scheduler_type": "constant"}),
    "warmup_ratio": ({"warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
    "warmup_steps": ({"warmup_ratio": 0.1, "warmup_steps": 7}, {"warmup_steps": 7.0}),
    "weight_decay": ({"weight_decay": 0.1}, {"weight_decay": 0.1}),
    "max_grad_norm": ({"max_grad_norm": 0.5}, {"max_grad_norm": 0.5}),
    "optim": ({"optim": "paged_adamw_8bit"}, {"optim": "paged_adamw_8bit"}), "seed": ({"seed": 1234}, {"seed": 1234}),
    "bf16": ({"bf16": True}, {"precision": "bf16"}), "fp16": ({"fp16": True}, {"precision": "fp16"}),
    "per_device_train_batch_size": (
        {"per_device_train_batch_size": 3}, {"per_device_train_batch_size": 3, "effective_batch_size": 6}
    ),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 5}, {"effective_batch_size": 10}),
    "disable_gradient_checkpointing": ({"disable_gradient_checkpointing": True}, {"activation_checkpointing": False}),
    "gradient_checkpointing": ({"gradient_checkpointing": True}, {"activation_checkpointing": True}),
    "flash_attn": ({**SFT, "flash_attn": "disabled"}, {"attn_implementation": "eager"}),
    "enable_liger_kernel": ({**SFT, "enable_liger_kernel": True}, {"use_liger_kernel": True}),
    "deepspeed": ({"deepspeed": "ds.json"}, {"deepspeed": "ds.json"}),
    "fsdp": ({"fsdp": "full_shard auto_wrap"}, {"fsdp": True}),
    "ddp_timeout": ({"ddp_timeout": 77}, {"ddp_timeout": 77}),
    "logging_steps": ({"logging_steps": 2}, {"logging_steps": 2}), "save_steps": ({"save_steps": 9}, {"save_steps": 9}),
    "save_total_limit": ({"save_total_limit": 3}, {"save_total_limit": 3}),
    "dataloader_num_workers": ({"dataloader_num_workers": 4}, {"dataloader_num_workers": 4}),
    "report_to": ({"report_to": "wandb"}, {"report_to": ["wandb"]}),
}  # fmt: skip


@pytest.mark.parametrize("key", sorted(TAKEN))
def test_a_key_that_is_taken_is_in_the_training(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, expected = EXPECTED[key]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    adapter = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "peft_type": "LORA"}
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "a" / "adapter_model.safetensors").touch()
    stage, config, _ = import_config(write(tmp_path, **given))
    made = validate({"sft": SftConfig, "dpo": DpoConfig}[stage], config)
    for name, value in expected.items():
        found = getattr(made, name)
        if value == "DATA":
            assert str(found) == str(tmp_path / "data")
        elif isinstance(value, dict) and name == "lora":
            assert {field: getattr(found, field) for field in value if field != "start"} == {
                field: item for field, item in value.items() if field != "start"
            }
            assert str(found.start) == (str(tmp_path / "a") if "start" in value else "None")
        else:
            assert (str(found) if isinstance(found, Path) else found) in (value, str(tmp_path / str(value)))


@pytest.fixture(scope="module")
def tiny_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from prefmill.demo.tiny_models import build

    return build("qwen2_5_vl", tmp_path_factory.mktemp("vl"))


@pytest.mark.slow
@pytest.mark.parametrize(("keys", "trained"), [
    ({}, {"language_model"}),
    ({"freeze_vision_tower": False}, {"language_model", "vision_tower"}),
    ({"freeze_multi_modal_projector": False, "freeze_language_model": True}, {"projector"}),
    ({**LORA, "freeze_vision_tower": False}, {"language_model", "vision_tower"}), (LORA, {"language_model"}),
])  # fmt: skip
def test_the_parts_that_move_are_those_that_llamafactory_trains(
    keys: dict[str, Any], trained: set[str], tmp_path: Path, tiny_vl: Path
) -> None:
    """Full trainings and adapters alike, on pictures; its file is silent on what it freezes by default."""
    given = {"stage": "sft", "dataset": "pictures", "model_name_or_path": str(tiny_vl), "learning_rate": 1e-2, **keys}
    path = write(tmp_path, **{"warmup_ratio": 0.0, "cutoff_len": 1024, **given})
    Image.effect_noise((60, 60), 80).convert("RGB").save(tmp_path / "data" / "a.png")
    turns = [{"who": "H", "text": "<image>Q?"}, {"who": "B", "text": "A"}]
    (tmp_path / "data" / "talks.json").write_text(json.dumps([{"talk": turns, "shown": ["a.png"]}]))
    (tmp_path / "out").mkdir()
    config = validate(SftConfig, import_config(path).config)
    run_sft(config, Task("r", "sft", "all", {}, {}, {}, tmp_path / "out", tmp_path / "logs"))
    before, after = (load_model(str(folder), precision="fp32") for folder in (tiny_vl, tmp_path / "out"))
    parts, now = part_of_weights(before), dict(after.named_parameters())
    assert {parts[name] for name, old in before.named_parameters() if not torch.equal(old, now[name])} == trained


def test_several_files_are_a_mixture_of_all_their_rows(tmp_path: Path) -> None:
    _, config, _ = import_config(write(tmp_path, dataset="mine, other", max_samples=20))
    assert [(Path(part["file"]).name, part["weight"]) for part in config["mixture"]] == [
        ("mine.json", 12.0), ("other.json", 20)
    ]  # fmt: skip
    made = validate(DpoConfig, config)
    train, _ = write_pairs(made, tmp_path / "own", tmp_path / "bad.json")
    assert len(list(read_jsonl(train))) == 12 + 20


@pytest.mark.parametrize("name", ["sft", "talks"])
def test_chats_are_read_as_the_registry_says(name: str, tmp_path: Path) -> None:
    _, config, _ = import_config(write(tmp_path, stage="sft", dataset=name))
    train, _ = write_chats(validate(SftConfig, config), tmp_path / "own", tmp_path / "bad.json")
    (row,) = read_jsonl(train)
    roles = [turn["role"] for turn in row["messages"]]
    assert roles == ["user", "assistant"] * (2 if name == "talks" else 1)


def test_every_key_has_one_verdict_and_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "llamafactory", "--keys"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len({line.split()[0] for line in lines}) == len(TAKEN) + len(NO_EFFECT) + len(REFUSED)
    assert EXPECTED.keys() == TAKEN.keys()
    assert ["ddp_timeout", "taken", "ddp_timeout"] in [line.split() for line in lines]


@pytest.mark.parametrize("key", [*sorted(NO_EFFECT), "layout"])
def test_a_key_without_effect_leaves_no_trace(key: str, tmp_path: Path) -> None:
    value: Any = {"lora_dropout": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999}.get(key, True)
    plain, given = (import_config(write(tmp_path, **({} if key == "layout" else {key: found})))[1]
                    for found in (None, value))  # fmt: skip
    assert plain == given
    assert "layout" not in given


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"stage": "kto"}, "stage(.|\n)*kto"), ({"pref_loss": "orpo"}, "orpo"),
        ({"use_galore": True}, "use_galore=True: another optimizer"),
        ({"finetuning_type": "freeze"}, "freeze"), ({"dataset": "mine,orca"}, "where each is a file"),
        ({"dataset": None}, "no dataset is named"), ({"stage": "sft"}, "not one to fine-tune on"),
        ({"max_steps": 7}, "max_steps=7: trainings take whole epochs"), ({"nosuch": 1}, "nosuch=1: not known here"),
        ({"learning_rate": "fast"}, "learning_rate is of another kind"), ({"lora_rank": 8.5}, "lora_rank is of"),
        ({"bf16": "yes"}, "bf16 is of another kind"), ({"adam_beta2": 0.95}, "no adam_beta2"),
        ({"finetuning_type": "lora", "adapter_name_or_path": "a,b"}, "one adapter"),
        ({"adapter_name_or_path": "a"}, "not trained as a whole model"),
        ({"dataset": "nosuch"}, "mine, sft, talks"), ({"dataset": "sft"}, "not one of preferences"),
        ({"dataset_dir": "nowhere"}, "run this in the folder"), ({"num_train_epochs": 1.5}, "whole epochs"),
        ({"lora_dropout": 0.1}, "lora_dropout"), ({"dataset": "clips", "stage": "sft"}, "this kind of dataset"),
        ({"fp8": True, "use_muon": True}, "fp8=True(.|\n)*use_muon"),
        ({"quantization_bit": 4}, "4 bits by bnb(.|\n)*full"), ({**LORA, "quantization_bit": 8}, "8 bits by bnb"),
        ({**LORA, "quantization_bit": 4, "double_quantization": False}, "double_quantization False"),
        ({"val_size": 100}, "val_size"), ({"pref_bco_weight": 1.0}, "pref_bco_weight=1.0: another loss"),
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
    """The losses of LLaMA-Factory's DPO, four pairs per step, from its formulas, on full logits, one row at a time."""
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
