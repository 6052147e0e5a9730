"""The page on extending: its code, as it stands there, makes a working objective, stage and model family."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prefmill.core.config import validate
from prefmill.core.stage import Task
from prefmill.store.jsonl import read_jsonl
from prefmill.training import objectives
from prefmill.training.batches import GroupPart, plan_batches
from prefmill.training.data import Group, Pair
from prefmill.training.family import Family
from prefmill.training.objectives import PairScores, Settings, mix
from prefmill.training.telemetry import Telemetry
from prefmill.training.trainer import PreferenceData, PreferenceTrainer, plan_arguments
from stages.dpo import DpoConfig
from tests.conftest import REPOSITORY

_, OBJECTIVE, STAGE, FAMILY = re.split(r"^## ", (REPOSITORY / "docs" / "extending.md").read_text(), flags=re.MULTILINE)
NUM_TOKENS = 12
PARTS = [GroupPart(0, (0,)), GroupPart(1, (0,))]
TINY: dict[str, Any] = {
    "vocab_size": NUM_TOKENS + 1, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2,
}  # fmt: skip


def code(section: str) -> str:
    """The Python block of a section."""
    (block,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return str(block)


@pytest.fixture
def squared_hinge(monkeypatch: pytest.MonkeyPatch) -> str:
    """The page's objective, entered where it says."""
    monkeypatch.setattr(objectives, "OBJECTIVES", dict(objectives.OBJECTIVES))
    monkeypatch.setitem(objectives.NEEDS, "squared_hinge", frozenset())  # taken out again at the end
    exec(compile("from __future__ import annotations\n" + code(OBJECTIVE), "extending.md", "exec"), vars(objectives))
    monkeypatch.setattr(objectives, "squared_hinge", vars(objectives)["squared_hinge"], raising=False)
    return "squared_hinge"


def pair_scores(margin: float) -> PairScores:
    one = torch.ones(1, dtype=torch.float64)
    return PairScores(margin * one, 0 * one, one, one, 0 * one, 0 * one)


def test_the_objective(squared_hinge: str) -> None:
    settings = Settings(beta=0.5)
    assert validate(DpoConfig, {"loss_type": [squared_hinge]}).loss_type == [squared_hinge]
    loss = mix([squared_hinge], [1.0], settings).loss
    assert loss(pair_scores(0.0), settings).item() == 1.0
    assert loss(pair_scores(1.0), settings).item() == 0.25  # (1 - 0.5)^2
    assert loss(pair_scores(4.0), settings).item() == 0.0


def causal_step() -> tuple[Family, Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefmill.families.causal.scorer import encode_pairwise, patch_forward, score_batch

    family = Family(lambda groups, parts, epoch: encode_pairwise(groups, parts, 0), score_batch)
    return family, patch_forward(LlamaForCausalLM(LlamaConfig(**TINY))), family.encode(toy_pairs(2), PARTS, 0)


def diffusion_step() -> tuple[Family, Any, Any]:
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefmill.families.mdlm.family import Drawing, LiveVariance, diffusion_family
    from prefmill.families.mdlm.scorer import patch_forward

    family = diffusion_family(Drawing(2, "balanced", 0), LiveVariance(2, 0.5, 0.05))
    model = LlamaForCausalLM(LlamaConfig(**TINY, is_causal=False))
    return family, patch_forward(model, mask_token_id=NUM_TOKENS), family.encode(toy_pairs(2), PARTS, 0)


def image_step() -> tuple[Family, Any, Any]:
    from prefmill.families.sdxl.family import SdxlFamily
    from tests.unit.families.sdxl.toy_diffusion import Denoiser, draw_data, make_batch, make_schedule

    generator, schedule = torch.Generator().manual_seed(0), make_schedule()
    batch = make_batch(draw_data(2, 1, generator), draw_data(2, -1, generator), schedule, generator)
    return SdxlFamily(lambda *_: batch, lambda *_: torch.zeros(1), schedule), Denoiser(), batch


@pytest.mark.parametrize("step", [causal_step, diffusion_step, image_step])
def test_the_objective_reaches_every_family(squared_hinge: str, step: Any) -> None:
    """The policy's own scores as the reference: the margin is 0 and the loss 1, and a step of descent lowers it."""
    torch.manual_seed(0)
    family, model, batch = step()
    settings = Settings(beta=0.5)
    objective = mix([squared_hinge], [1.0], settings, family.supplies)
    model.eval()
    with torch.no_grad():
        before = family.pair_scores(model, batch)
    sides = [shaped(side, family) for side in (before.chosen, before.rejected)]
    losses = objective.loss(family.pair_scores(model, batch, *sides), settings)
    assert losses.tolist() == pytest.approx([1.0] * len(losses), abs=1e-5)
    losses.mean().backward()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.grad is not None:
                weight -= 1e-3 * weight.grad
        after = objective.loss(family.pair_scores(model, batch, *sides), settings)
    assert after.mean() < losses.mean()


def shaped(side: Tensor, family: Family) -> Tensor:
    """A reference of masked diffusion is a value for each of its draws."""
    from prefmill.families.mdlm.family import DiffusionFamily

    return side[:, None] if isinstance(family, DiffusionFamily) else side


@pytest.mark.slow
def test_the_stage(tmp_path: Path) -> None:
    for name in ("lib", "stages", "configs", "pyproject.toml"):
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copyfile
        copy(REPOSITORY / name, tmp_path / name)
    (tmp_path / "stages" / "count_words.py").write_text(code(STAGE))
    (tmp_path / "pipeline.yaml").write_text(
        "name: words\nstages:\n"
        "  ingest_reviews: { set: { sources: [{ format: generated, num_papers: 5 }] } }\n"
        "  count_words: { set: { min_letters: 3 } }\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}/lib:{tmp_path}"}
    command = [sys.executable, "-m", "prefmill.cli.main", "run", "pipeline.yaml"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = {
        row["review_id"]: row["num_words"] for row in read_jsonl(tmp_path / "data/words/count_words/all/counts.jsonl")
    }
    for review in read_jsonl(tmp_path / "data/words/ingest_reviews/all/reviews.jsonl"):
        assert counts[review["review_id"]] == len([word for word in review["text"].split() if len(word) > 2])


def toy_pairs(count: int) -> list[Group]:
    """Every chosen response holds token 1 once more often than the rejected one."""
    generator = torch.Generator().manual_seed(0)
    groups = []
    for index in range(count):
        rest = torch.randint(2, NUM_TOKENS, (6,), generator=generator).tolist()
        groups.append(Group([0], [[1, *rest], [0, *rest]], [Pair(f"p{index}", 0, 1)]))
    return groups


def test_the_family(tmp_path: Path) -> None:
    from prefmill.training.preference_config import PreferenceConfig

    names: dict[str, Any] = {
        "torch": torch, "Tensor": Tensor, "nn": nn, "dataclass": dataclass, "fields": fields, "Sequence": Sequence,
        "Group": Group, "GroupPart": GroupPart, "Family": Family, "NUM_TOKENS": NUM_TOKENS, "__name__": __name__,
    }  # fmt: skip
    exec(compile("from __future__ import annotations\n" + code(FAMILY), "extending.md", "exec"), names)
    config = PreferenceConfig(
        learning_rate=0.3, num_train_epochs=2, precision="fp32", per_device_train_batch_size=4, effective_batch_size=4,
        logging_steps=1, save_steps=100, report_to=[], beta=1.0,
    )  # fmt: skip
    groups, settings = toy_pairs(40), Settings(beta=1.0)
    plan = plan_batches(groups, 2, 4, 1, seed=0)
    model = nn.Linear(NUM_TOKENS, 1, bias=False)
    nn.init.zeros_(model.weight)
    task = Task("r", "dpo", "all", {}, {}, {}, tmp_path / "out", tmp_path / "logs")
    trainer = PreferenceTrainer(
        model=model,
        args=plan_arguments(config, task, plan),
        train=PreferenceData(groups, lambda group, epoch: torch.zeros(2), plan),
        val=None,
        family=names["FAMILY"],
        objective=mix(["sigmoid"], [1.0], settings),
        settings=settings,
        telemetry=Telemetry(task.logs, 0),
        callbacks=[],
    )
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5)
    assert losses[-1] < 0.1
    assert model.weight[0, 1] > 1 > -1 > model.weight[0, 0]
