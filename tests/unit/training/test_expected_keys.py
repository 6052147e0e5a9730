"""Keys under transformers' names: each reaches the training, and unset it leaves the identity as it was."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from prefmill.core.config import identity, validate
from prefmill.core.errors import ConfigError, DivergedError
from prefmill.core.stage import Task, load_stage
from prefmill.pipeline.manual_submission import stage_plan
from prefmill.pipeline.subprocess_runner import allocator
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.training.arguments import trainer_arguments
from prefmill.training.callbacks import check_every_step
from prefmill.training.checkpoints import STEPS, read_curve
from prefmill.training.config import TrainingConfig
from prefmill.training.telemetry import ALARMS
from prefmill.training.transformers_names import OPTIMIZERS, SCHEDULES
from tests.tiny import pair_rows
from tests.unit.training.test_group_training import SMALL, curve, train

TRAININGS = ("sft", "dpo", "mdlm_sft", "mdlm_dpo", "sdxl_dpo", "train_reward", "tiny_model")


def arguments(tmp_path: Path, **keys: Any) -> TrainingArguments:
    task = Task("r", "sft", "clean", {}, {}, {}, tmp_path / "out", tmp_path / "logs")
    return TrainingArguments(**trainer_arguments(validate(TrainingConfig, {**SMALL, **keys}), task, 1))


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Determinism and the compiler's variables are this process' own business again."""
    before = dict(os.environ)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = False
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize(
    ("keys", "name", "value"),
    [
        ({}, "optim", "adamw_torch_fused"),
        ({"optim": "adafactor"}, "optim", "adafactor"),
        ({"deterministic": True}, "full_determinism", True),
        ({"torch_compile": True}, "torch_compile", True),
        ({}, "torch_compile", False),
        ({}, "ddp_timeout", 6 * 3600),
        ({"ddp_timeout": 60}, "ddp_timeout", 60),
    ],
)
def test_a_key_reaches_the_trainer(keys: dict[str, Any], name: str, value: Any, tmp_path: Path, restored: None) -> None:
    assert getattr(arguments(tmp_path, **keys), name) == value


@pytest.mark.parametrize(
    ("key", "typed", "meant"), [("optim", "adamw_torhc", "adamw_torch"), ("lr_scheduler_type", "linaer", "linear")]
)
def test_a_misspelt_name_of_transformers_is_refused_before_the_queue(key: str, typed: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} = '{typed}'.*did you mean '{meant}'"):
        stage_plan("sft", [f"{key}={typed}", "model_name_or_path=m", "dataset=d.jsonl"])


def test_its_names_are_those_that_transformers_has() -> None:
    assert set(SCHEDULES) == {item.value for item in SchedulerType}
    assert set(OPTIMIZERS) == {item.value for item in OptimizerNames}


def test_a_schedule_takes_its_keys(tmp_path: Path, tiny_qwen2: Path) -> None:
    """The formula of `cosine_with_min_lr`: rate (m + (1 - m) (1 + cos(pi k / N)) / 2)."""
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    keys = {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.5}}
    steps = train(tmp_path, tiny_qwen2, tmp_path / "pairs.jsonl", **keys)["steps"]
    rates = [row["learning_rate"] for row in read_curve(tmp_path / "logs" / STEPS) if "learning_rate" in row]
    expected = [1e-3 * (0.5 + 0.25 * (1 + math.cos(math.pi * step / steps))) for step in range(steps)]
    assert rates == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ConfigError, match="min_rate"):
        train(
            tmp_path / "wrong", tiny_qwen2, tmp_path / "pairs.jsonl", **keys | {"lr_scheduler_kwargs": {"min_rate": 1}}
        )


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"lr_scheduler_type": "cosin"}, "did you mean 'cosine'"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "requires an eval strategy"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "num_decay_steps"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "min_lr"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 2}, "begins at the full rate whatever warmup_steps says"),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"min_lr_rate": 1}}, "reads no lr_scheduler_kwargs"),
        ({"optim": "lomo"}, "pip install lomo-optim"),
    ],
)
def test_what_the_trainer_could_not_make_is_refused_before_the_reference_is_scored(
    keys: dict[str, Any], why: str, tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefmill.families.causal.dpo.reference_scores", lambda *_: pytest.fail("scored"))
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(4))
    with pytest.raises(ConfigError, match=why):
        train(tmp_path, tiny_qwen2, tmp_path / "pairs.jsonl", **keys)


@pytest.mark.parametrize("kind", ["constant_with_warmup", "linear", "cosine", "inverse_sqrt", "polynomial"])
def test_schedules_with_a_warm_up_are_taken(kind: str, tmp_path: Path, tiny_qwen2: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    train(tmp_path, tiny_qwen2, tmp_path / "pairs.jsonl", lr_scheduler_type=kind, warmup_steps=2)
    rates = [row["learning_rate"] for row in read_curve(tmp_path / "logs" / STEPS) if "learning_rate" in row]
    assert rates[:3] == pytest.approx([0, 5e-4, 1e-3])


def test_a_warm_up_that_begins_above_zero_is_one(tmp_path: Path, tiny_qwen2: Path) -> None:
    """cosine_warmup_with_min_lr begins at 1 / warmup_steps of the rate; it was refused as one that knows no warm-up."""
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    keys = {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": 0.1}}
    train(tmp_path, tiny_qwen2, tmp_path / "pairs.jsonl", warmup_steps=2, **keys)
    rates = [row["learning_rate"] for row in read_curve(tmp_path / "logs" / STEPS) if "learning_rate" in row]
    assert rates[:2] == pytest.approx([5e-4, 1e-3])


def test_a_warm_up_of_the_whole_training_is_told(tmp_path: Path, tiny_qwen2: Path) -> None:
    """One step at a rate of 0: it trains nothing."""
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(3))
    keys = {"warmup_steps": 0.1, "num_train_epochs": 1}
    train(tmp_path, tiny_qwen2, tmp_path / "pairs.jsonl", **keys)
    (row,) = read_jsonl(tmp_path / "logs" / ALARMS)
    assert row["alarm"] == "warm-up takes 1 steps of 1: the rate ends at 0% of its peak"
    train(tmp_path / "two", tiny_qwen2, tmp_path / "pairs.jsonl", **keys | {"num_train_epochs": 2})
    assert not (tmp_path / "two" / "logs" / ALARMS).exists()


class Averaging(torch.optim.SGD):
    """As optimizers without a schedule: trains some weights, and leaves their average."""

    held: tuple[list[Any], list[Any]] | None = None  # the average, and what is trained while the average is in place

    def params(self) -> list[Any]:
        return [value for group in self.param_groups for value in group["params"]]

    def step(self, closure: Any = None) -> None:
        super().step()
        values = [value.detach().clone() for value in self.params()]
        before = self.held[0] if self.held else values
        self.held = ([(old + new) / 2 for old, new in zip(before, values, strict=True)], [])

    def eval(self) -> None:
        if self.held and not self.held[1]:
            self.held[1].extend(value.detach().clone() for value in self.params())
            self._put(self.held[0])

    def train(self) -> None:
        if self.held and self.held[1]:
            self._put(self.held[1])
            self.held[1].clear()

    def _put(self, values: list[Any]) -> None:
        with torch.no_grad():
            for place, value in zip(self.params(), values, strict=True):
                place.copy_(value)


def test_an_optimizer_that_leaves_an_average_publishes_it(
    tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Averaging] = []

    def create(self: Trainer, *_: Any) -> Averaging:
        made.append(Averaging(self.model.parameters(), lr=0.1))
        self.optimizer = made[-1]
        return made[-1]

    monkeypatch.setattr(Trainer, "create_optimizer", create)
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(8))
    train(tmp_path, tiny_qwen2, tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl", learning_rate=0.1)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert made[0].held is not None
    average, trained = made[0].held
    total = [sum(float(value.double().sum()) for value in values) for values in (weights.values(), average, trained)]
    assert total[0] == pytest.approx(total[1], abs=1e-6)
    assert abs(total[0] - total[2]) > 1e-4


def test_an_evaluation_that_is_no_number_ends_the_training(tmp_path: Path, tiny_qwen2: Path) -> None:
    """Every pair of it counted as lost, and an accuracy of 0 was published."""
    write_jsonl(tmp_path / "pairs.jsonl", pair_rows(3))
    keys = {"num_train_epochs": 1, "learning_rate": 1e38, "max_grad_norm": 1e9}
    with pytest.raises(DivergedError, match="an evaluation is not a number"):
        train(tmp_path, tiny_qwen2, tmp_path / "pairs.jsonl", tmp_path / "pairs.jsonl", **keys)


@pytest.mark.parametrize(("scale", "ends"), [(65536.0, False), (1.0, True)])
def test_in_fp16_a_step_is_skipped_only_while_a_smaller_scale_may_help(scale: float, ends: bool) -> None:
    """A gradient that is infinite without any scale would have every step skipped: nothing would be trained."""
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(fp16=True), accelerator=SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale)),
        state=SimpleNamespace(global_step=4, max_steps=6), _tr_loss=torch.tensor(0.5),
        _get_grad_norm=lambda *_, **__: torch.tensor(math.inf),
    )  # fmt: skip
    check_every_step(trainer)
    with pytest.raises(DivergedError, match="step 5") if ends else nullcontext():
        trainer._get_grad_norm(None)


def test_in_fp16_not_every_step_may_be_skipped() -> None:
    norms = iter([math.inf, 1.0, math.inf, math.inf, math.inf])
    trainer: Any = SimpleNamespace(
        args=SimpleNamespace(fp16=True), accelerator=SimpleNamespace(scaler=None), _tr_loss=torch.tensor(0.5),
        state=SimpleNamespace(global_step=0, max_steps=2), _get_grad_norm=lambda *_, **__: torch.tensor(next(norms)),
    )  # fmt: skip
    check_every_step(trainer)
    trainer._get_grad_norm(None)
    trainer._get_grad_norm(None)  # one of two was taken
    trainer._get_grad_norm = lambda *_, **__: torch.tensor(next(norms))
    check_every_step(trainer)
    trainer._get_grad_norm(None)
    with pytest.raises(DivergedError, match="fp16 has skipped every step"):
        trainer._get_grad_norm(None)


def test_liger_is_refused_where_it_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    found: dict[str, Any] = {"liger_kernel": None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: found[name] if name in found else find(name, *rest)
    )
    with pytest.raises(ConfigError, match="pip install liger-kernel"):
        arguments(tmp_path, use_liger_kernel=True)
    found["liger_kernel"] = importlib.machinery.ModuleSpec("liger_kernel", None)
    assert arguments(tmp_path, use_liger_kernel=True).use_liger_kernel


@pytest.mark.parametrize("name", TRAININGS)
def test_liger_is_refused_where_a_stage_scores_through_its_own_head(name: str) -> None:
    stage = load_stage(name)
    if name in ("sft", "tiny_model"):
        assert not stage.config.own_head
        return
    with pytest.raises(ConfigError, match="own head, which Liger would replace"):
        validate(stage.config, {"use_liger_kernel": True})


@pytest.mark.parametrize("name", TRAININGS)
def test_unset_they_change_no_identity_and_set_they_do(name: str) -> None:
    """What was made before they were there stays; how long ranks wait is no content."""
    schema = load_stage(name).config
    before, waits = (identity(validate(schema, keys)) for keys in ({}, {"ddp_timeout": 60}))
    assert before == waits
    own = {"optim", "torch_compile"} if name == "sdxl_dpo" else set()  # it had them before, in its identity
    assert {"optim", "use_liger_kernel", "torch_compile", "deterministic"} & set(before) == own
    for keys in ({"deterministic": True}, {"optim": "sgd"}):
        assert identity(validate(schema, keys)) == before | keys
    if name.startswith("mdlm"):
        with pytest.raises(ConfigError, match="torch_compile cannot follow"):
            validate(schema, {"torch_compile": True})
    else:
        assert identity(validate(schema, {"torch_compile": True})) == before | {"torch_compile": True}


def test_a_deterministic_training_is_one(
    tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch, restored: None
) -> None:
    seen: list[bool] = []
    step = Trainer.training_step

    def note(self: Any, *given: Any, **named: Any) -> Any:
        seen.append(torch.are_deterministic_algorithms_enabled())
        return step(self, *given, **named)

    monkeypatch.setattr(Trainer, "training_step", note)
    write_jsonl(tmp_path / "data.jsonl", pair_rows(2, 2))
    keys = {"num_train_epochs": 1, "effective_batch_size": 4}
    train(tmp_path / "plain", tiny_qwen2, tmp_path / "data.jsonl", **keys)
    assert not any(seen)
    seen.clear()
    train(tmp_path / "same", tiny_qwen2, tmp_path / "data.jsonl", **keys, deterministic=True)
    assert seen
    assert all(seen)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["group", "pairwise"])
def test_a_compiled_training_learns_the_same(
    layout: str, tmp_path: Path, tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch, restored: None
) -> None:
    """The backend that compiles nothing: what is tested is that the model is traced, and still scores."""
    compiled: list[Any] = []
    original = torch.compile

    def traced(model: Any, **options: Any) -> Any:
        compiled.append(model)
        return original(model, backend="aot_eager")

    write_jsonl(tmp_path / "data.jsonl", pair_rows(2, 2))
    keys = {"num_train_epochs": 2, "effective_batch_size": 4, "layout": layout}
    train(tmp_path / "plain", tiny_qwen2, tmp_path / "data.jsonl", **keys)
    monkeypatch.setattr(torch, "compile", traced)
    train(tmp_path / "compiled", tiny_qwen2, tmp_path / "data.jsonl", **keys, torch_compile=True)
    assert compiled
    assert curve(tmp_path / "compiled") == pytest.approx(curve(tmp_path / "plain"), abs=1e-5)


@pytest.mark.parametrize(
    ("environment", "trains", "expected"),
    [
        ({}, True, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({}, False, {}),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, True, {}),
        ({"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}, True, {}),
    ],
)
def test_segments_grow_in_trainings_unless_the_user_said_otherwise(
    environment: dict[str, str], trains: bool, expected: dict[str, str]
) -> None:
    assert allocator(environment, trains) == expected


def test_fp16_without_a_gpu_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers computed in fp32, and said nothing."""
    monkeypatch.setattr("prefmill.training.arguments.has_gpu", lambda: False)
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        arguments(tmp_path, precision="fp16")
