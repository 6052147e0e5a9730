"""DeepSpeed files as people bring them: used, or refused with the key, both values and a fix that is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.distributed.deepspeed_file import _KEPT, ZERO, deepspeed_settings, following, zero_stage
from prefmill.training.config import TrainingConfig, accumulation
from tests.conftest import REPOSITORY

AUTO = "auto"
ADAMW = {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_min_lr": AUTO, "warmup_max_lr": AUTO, "warmup_num_steps": AUTO}}
SIZES = {"train_batch_size": AUTO, "train_micro_batch_size_per_gpu": AUTO, "gradient_accumulation_steps": AUTO}
FP16 = {"enabled": AUTO, "loss_scale": 0, "loss_scale_window": 1000, "initial_scale_power": 16, "hysteresis": 2}
OF_LLAMAFACTORY = {
    **SIZES, "gradient_clipping": AUTO, "zero_allow_untested_optimizer": True, "fp16": FP16, "bf16": {"enabled": AUTO},
    "zero_optimization": {
        "stage": 3, "overlap_comm": False, "sub_group_size": 1e9, "reduce_bucket_size": AUTO,
        "stage3_prefetch_bucket_size": AUTO, "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}  # fmt: skip
EXAMPLE = {
    "train_batch_size": 8, "steps_per_print": 2000, "gradient_clipping": 1.0, "wall_clock_breakdown": False,
    "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
    "bf16": {"enabled": True}, "elasticity": {"enabled": False}, "zero_optimization": {"stage": 0},
}  # fmt: skip
ITS_KEYS = {"effective_batch_size": 8, "weight_decay": 3e-7, "precision": "bf16"}


def trained_by(folder: Path, content: Any, **keys: Any) -> TrainingConfig:
    path = folder / "deepspeed.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    given = {"learning_rate": 0.001, "num_train_epochs": 1, "per_device_train_batch_size": 2}
    return validate(TrainingConfig, {**given, "deepspeed": str(path), **keys})


@pytest.mark.parametrize(
    ("content", "keys", "stage"),
    [
        (OF_LLAMAFACTORY, {}, 3),
        ({**OF_LLAMAFACTORY, "optimizer": ADAMW}, {"precision": "fp16"}, 3),
        (EXAMPLE, ITS_KEYS, 0),
        ({"zero_optimization": {"stage": 2}}, {"max_grad_norm": 0.5}, 2),
        ('\ufeff{ // mine\n"zero_optimization": {"stage": 3, /* all */}, # end\n}', {}, 3),
        ({"bfloat16": {"enabled": True}}, {}, 0),
        ({"activation_checkpointing": {"partition_activations": False}}, {}, 0),
    ],
)
def test_what_says_the_same_is_used(tmp_path: Path, content: Any, keys: dict[str, Any], stage: int) -> None:
    config = trained_by(tmp_path, content, **keys)
    assert config.deepspeed is not None
    used = following(deepspeed_settings(config.deepspeed))
    assert zero_stage(config.deepspeed) == stage
    # The Trainer fills these from its arguments, also where the file leaves them to DeepSpeed's defaults.
    assert {used[key] for key in (*SIZES, "gradient_clipping") if key != "train_batch_size"} == {AUTO}
    assert [used[name]["enabled"] for name in ("bf16", "fp16")] == [AUTO, AUTO]
    assert not {"optimizer", "train_batch_size"} & used.keys()


@pytest.mark.parametrize(
    ("content", "keys", "said"),
    [
        ([1], {}, "the file is of another kind"),
        ({"zero_optimization": [3]}, {}, "zero_optimization is of another kind"),
        ({"zero_optimization": True}, {}, "zero_optimization is of another kind"),
        ({"zero_optimization": {"stage": "3"}}, {}, "zero_optimization.stage is of another kind"),
        ({"zero_optimization": {"stage": 3, "offload_param": "cpu"}}, {}, "offload_param is of another kind"),
        ('{"zero_optimization": {"stage": 3, "stage": 2}}', {}, "given twice"),
        ({"zero_optimisation": {"stage": 3}}, {}, "did you mean 'zero_optimization'"),
        ({"zero_optimization": {"stage": 3, "offload_optimzer": {}}}, {}, "did you mean 'offload_optimizer'"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, {}, "rounded on their way"),
        ({"checkpoint": {"load_universal": True}}, {}, "resumed as they were written"),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, {}, "activation_checkpointing=true"),
        ({"scheduler": WARMUP}, {}, "constant_with_warmup"),
        ({"optimizer": {"type": "Lamb"}}, {}, "optimizer: Lamb, and optim: None"),
        ({"optimizer": ADAMW}, {"optim": "adafactor"}, "optimizer: AdamW, and optim: adafactor"),
        ({"train_batch_size": 8}, {}, "train_batch_size: 8, and effective_batch_size: 16"),
        ({"train_micro_batch_size_per_gpu": 1}, {}, "and per_device_train_batch_size: 2"),
        ({"gradient_accumulation_steps": 3}, {}, "per_device_train_batch_size: 8, on all ranks together"),
        ({"gradient_clipping": 0.3}, {}, "gradient_clipping: 0.3, and max_grad_norm: 1.0"),
        ({"bf16": {"enabled": True}}, {"precision": "fp16"}, "bf16.enabled: true, and precision: fp16"),
        ({"bf16": {"enabled": False}}, {}, "bf16.enabled: false, and precision: bf16"),
        ({"optimizer": {"params": {"betas": [0.8, 0.999]}}}, {}, "and the Trainer's: [0.9, 0.999]"),
        ("compute_environment: LOCAL_MACHINE\ndeepspeed_config:\n  zero_stage: 2\n", {}, "deepspeed/zero2.json"),
        ("distributed_type: FSDP\nfsdp_config: {}\n", {}, "fsdp=true"),
        ({"fsdp_transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}, {}, "a configuration of FSDP"),
        ('{"zero_optimization": ', {}, "cannot read the DeepSpeed file"),
    ],
)  # fmt: skip
def test_anything_else_is_refused_with_both_values(
    tmp_path: Path, content: Any, keys: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        trained_by(tmp_path, content, **keys)
    assert said in str(error.value)
    assert error.value.details["where"] == tmp_path / "deepspeed.json"


def test_accumulation_is_compared_where_the_ranks_are_known(tmp_path: Path) -> None:
    config = trained_by(tmp_path, {"gradient_accumulation_steps": 4})
    assert accumulation(config, 2) == 4
    with pytest.raises(ConfigError, match=r"gradient_accumulation_steps: 4, and .*: 8"):
        accumulation(config, 1)


@pytest.mark.parametrize("stem", ["zero1", "zero2", "zero3", "zero3_offload"])
def test_shipped_files_are_used_with_any_keys(stem: str) -> None:
    path = REPOSITORY / "configs" / "deepspeed" / f"{stem}.json"
    for precision in ("bf16", "fp16", "fp32"):
        keys = {"learning_rate": 0.1, "num_train_epochs": 1, "precision": precision, "max_grad_norm": 0.1}
        assert validate(TrainingConfig, {**keys, "deepspeed": str(path)}).deepspeed == path


@pytest.mark.parametrize("given", ["full_shard auto_wrap", "true", {"version": 2}, ["full_shard"]])
def test_fsdp_is_one_switch(given: Any) -> None:
    with pytest.raises(ConfigError, match=r"true shards all \(full_shard auto_wrap\)"):
        validate(TrainingConfig, {"learning_rate": 0.1, "num_train_epochs": 1, "fsdp": given})


@pytest.mark.slow
def test_names_are_deepspeeds_own() -> None:
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    looked_at = set()

    class Noting(dict[str, Any]):
        def get(self, key: str, *default: Any) -> Any:
            looked_at.add(key)
            return super().get(key, *default)

        def __contains__(self, key: object) -> bool:
            looked_at.add(key)
            return super().__contains__(key)

    DeepSpeedConfig(Noting(train_micro_batch_size_per_gpu=1))
    assert {field.alias or name for name, field in DeepSpeedZeroConfig.model_fields.items()} == ZERO
    assert looked_at >= _KEPT - {"aio", "flops_profiler"}  # looked for among .keys()
