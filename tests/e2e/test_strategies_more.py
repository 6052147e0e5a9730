"""The other strategies, vision-language models under them, and a rounding that DeepSpeed's own linear layer brings."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from strategy_runs import KEYS, SLOW_IMPORTS, STRATEGIES, largest_difference, losses, shares, train_on

from prefmill.store.jsonl import write_jsonl
from tests.forked_ranks import import_before_the_forks
from tests.tiny import pair_rows, save_tiny_qwen2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def _once_before_the_forks() -> None:
    import_before_the_forks(*SLOW_IMPORTS)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linear layers have biases that are not 0, and what one process makes of it."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("text")
    model = AutoModelForCausalLM.from_pretrained(save_tiny_qwen2(folder / "model"))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", pair_rows(8, 2))
    train_on(1, folder / "one", KEYS)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of which half have an image."""
    from prefmill.demo.tiny_models import build

    folder = tmp_path_factory.mktemp("images")
    build("qwen2_5_vl", folder / "model")
    Image.effect_noise((60, 60), 90).convert("RGB").save(folder / "noise.png")
    rows = pair_rows(8, 2)
    for row in rows[::4] + rows[1::4]:
        row["conversations"] = [{"from": "human", "value": f"the<image>{row['group']}"}]
        row["images"] = [str(folder / "noise.png")]
    write_jsonl(folder / "pairs.jsonl", rows)
    train_on(1, folder / "one", KEYS)
    return folder


@pytest.mark.parametrize("name", ["zero1", "zero3_offload"])
def test_two_processes_train_what_one_does(text: Path, name: str) -> None:
    two = train_on(2, text / name, {**KEYS, **STRATEGIES[name]})
    assert losses(two)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(two) == pytest.approx(losses(text / "one"), abs=1e-5)
    assert largest_difference(text / "one", two) < 1e-5
    assert shares(two, "weights") == pytest.approx([0.5, 0.5] if name == "zero3_offload" else [1.0, 1.0], abs=0.02)
    assert shares(two, "moments") == pytest.approx([0.5, 0.5], abs=0.02)


def test_zero3_adds_biases_before_it_rounds(text: Path) -> None:
    """DeepSpeed's linear layer rounds to bf16 first: the policy would not start at its reference."""
    two = train_on(2, text / "bf16", {**KEYS, **STRATEGIES["zero3"], "precision": "bf16"})
    assert losses(two)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(two, "margin")[0] == 0.0


@pytest.mark.parametrize("name", ["zero3", "fsdp"])
def test_another_reference_is_scored_in_shards(text: Path, name: str, tmp_path: Path) -> None:
    """Losses are those of one process; the cache is each run's own, so that every run scores."""
    keys = {**KEYS, "num_train_epochs": 1, "ref_folder": str(save_tiny_qwen2(tmp_path / "other", seed=7))}
    one = train_on(1, text / f"reference-of-{name}-one", keys)
    two = train_on(2, text / f"reference-of-{name}", {**keys, **STRATEGIES[name]})
    assert abs(losses(one)[0] - math.log(2)) > 0.01
    assert losses(two) == pytest.approx(losses(one), abs=1e-4)


@pytest.mark.parametrize("name", ["zero3", "fsdp"])
def test_a_vision_language_model_trains_the_same(images: Path, name: str) -> None:
    two = train_on(2, images / name, {**KEYS, **STRATEGIES[name]})
    assert losses(two)[0] == pytest.approx(math.log(2), abs=1e-5)
    assert losses(two) == pytest.approx(losses(images / "one"), abs=2e-5)
    assert losses(two)[-1] < losses(two)[0] - 0.01
    assert largest_difference(images / "one", two) < 1e-4
    assert shares(two, "weights") == pytest.approx([0.5, 0.5], abs=0.02)
