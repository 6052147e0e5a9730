"""LLaMA-Factory's configurations: every key taken over, known to be without effect, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefmill.cli.main import main
from prefmill.core.config import load, validate
from prefmill.core.errors import ConfigError
from prefmill.integrations.llamafactory import import_config
from prefmill.integrations.llamafactory_keys import NO_EFFECT, REFUSED, TAKEN
from prefmill.pairs.chats import write_chats
from prefmill.pairs.writing import write_pairs
from prefmill.store.jsonl import read_jsonl
from stages.dpo import DpoConfig
from stages.sft import SftConfig
from tests.llamafactory_files import LORA, write


def test_every_key_is_taken_over(tmp_path: Path) -> None:
    _, config, notes = import_config(write(tmp_path, bf16=True, pref_ftx=0.3, max_samples=9), num_gpus=4)
    assert config == {
        "pair_format": "sharegpt", "dataset": str(tmp_path / "data" / "mine.json"),
        "columns": {"conversations": "talk", "chosen": "best", "rejected": "worst", "system": None, "tools": None,
                    "images": None},
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
    assert (config["pair_format"], config["columns"]) == ("alpaca", {
        "instruction": "question", "input": None, "history": None, "tools": None, "images": None,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (None, ["I\nX"]), ({"prompt": "instruction", "response": "output"}, ["I"]),
        ({"prompt": "input", "response": "output"}, ["X"]),
        ({"prompt": "instruction", "response": "output", "history": "history", "system": "system"}, [*"Sab", "I"]),
    ],
)  # fmt: skip
def test_a_column_that_the_registry_does_not_name_is_not_read(columns: Any, said: list[str], tmp_path: Path) -> None:
    """As in LLaMA-Factory's converter, for which only `instruction`, `input` and `output` have names by themselves."""
    path = write(tmp_path, stage="sft", dataset="mine")
    entry = {"file_name": "mine.json", **({"columns": columns} if columns else {})}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    row = {"instruction": "I", "input": "X", "output": "O", "system": "S", "history": [["a", "b"]]}
    (tmp_path / "data" / "mine.json").write_text(json.dumps([row]))
    config = validate(SftConfig, import_config(path).config)
    train, _ = write_chats(config, tmp_path / "own", tmp_path / "bad.json")
    (chat,) = read_jsonl(train)
    assert [turn["content"] for turn in chat["messages"]] == [*said, "O"]


def test_what_may_be_a_secret_is_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="other_hub_token: not known here") as raised:
        import_config(write(tmp_path, other_hub_token="hf_abc"))
    assert "hf_abc" not in str(raised.value)


def test_trackers_that_are_not_there_are_told(tmp_path: Path) -> None:
    _, config, notes = import_config(write(tmp_path, report_to=["wandb", "swanlab"]))
    assert config["report_to"] == ["wandb"]
    assert "report_to: nothing is sent to swanlab" in notes


@pytest.mark.parametrize("entry", [[], {"file_name": "x.json", "columns": "messages"}])
def test_an_entry_of_another_kind_is_told(entry: Any, tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"mine": entry}))
    with pytest.raises(ConfigError, match="the entry of 'mine' is of another kind"):
        import_config(path)


SFT = {"stage": "sft", "dataset": "sft"}
PICTURES = {**LORA, "stage": "sft", "dataset": "pictures"}


def full(**keys: Any) -> dict[str, Any]:
    return {"r": 8, "alpha": 16.0, "use_dora": False, "target_modules": "all-linear", **keys}


# For every key that is taken: LLaMA-Factory's lines, and prefmill's keys that must come of them.
EXPECTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage": (SFT, {"train_on": "all_assistant_turns", "pair_format": "instruction_output"}),
    "model_name_or_path": ({"model_name_or_path": "x/y"}, {"model_name_or_path": "x/y"}),
    "model_revision": ({"model_revision": "v2"}, {"revision": "v2"}),
    "moe_aux_loss_coef": ({**SFT, "moe_aux_loss_coef": 0.01}, {"router_aux_loss_coef": 0.01}),
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
    "lr_scheduler_kwargs": ({"lr_scheduler_kwargs": {"min_lr": 1e-6}}, {"lr_scheduler_kwargs": {"min_lr": 1e-6}}),
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
    (tmp_path / "ds.json").write_text("{}")
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


def test_what_fsdp2_does_not_do_is_noted(tmp_path: Path) -> None:
    _, config, notes = import_config(write(tmp_path, fsdp="full_shard auto_wrap offload"))
    assert config["fsdp"] is True
    assert "fsdp: FSDP2 shards all, without offload" in notes


def test_several_files_are_a_mixture_of_all_their_rows(tmp_path: Path) -> None:
    _, config, _ = import_config(write(tmp_path, dataset="mine, other", max_samples=20))
    assert [(Path(part["file"]).name, part["weight"]) for part in config["mixture"]] == [
        ("mine.json", 12.0), ("other.json", 20)
    ]  # fmt: skip
    made = validate(DpoConfig, config)
    train, _ = write_pairs(made, tmp_path / "own", tmp_path / "bad.json")
    assert len(list(read_jsonl(train))) == 12 + 20


ROLES = {
    "sft": ["user", "assistant"], "talks": ["user", "assistant"] * 2,
    "called": ["user", "assistant", "tool", "assistant"],
}  # fmt: skip


@pytest.mark.parametrize("name", ROLES)
def test_chats_are_read_as_the_registry_says(name: str, tmp_path: Path) -> None:
    _, config, _ = import_config(write(tmp_path, stage="sft", dataset=name))
    train, _ = write_chats(validate(SftConfig, config), tmp_path / "own", tmp_path / "bad.json")
    (row,) = read_jsonl(train)
    assert [turn["role"] for turn in row["messages"]] == ROLES[name]
    calls = [turn["tool_calls"][0]["function"]["name"] for turn in row["messages"] if "tool_calls" in turn]
    assert calls == (["look"] if name == "called" else [])


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
        ({"dataset": "nosuch"}, "mine, sft, talks(.|\n)*"), ({"dataset": "sft"}, "not one of preferences"),
        ({"dataset_dir": "nowhere"}, "run this in the folder"), ({"num_train_epochs": 1.5}, "whole epochs"),
        ({"lora_dropout": 0.1}, "lora_dropout"), ({"dataset": "clips", "stage": "sft"}, "not known: videos"),
        ({"dataset": "drawn", "stage": "sft"}, "not known: num_samples"),
        ({"dataset": "part", "stage": "sft"}, "not known: split"),
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
