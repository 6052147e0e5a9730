"""Masked diffusion under ZeRO-3 and FSDP2 on two processes: what one process trains, the reference scored in shards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from strategy_runs import KEYS, SLOW_IMPORTS, STRATEGIES, largest_difference, losses, shares, train_on

from prefmill.store.jsonl import write_jsonl
from tests.forked_ranks import import_before_the_forks
from tests.tiny import pair_rows, save_tiny_qwen2, sentence

pytestmark = pytest.mark.slow
SFT: dict[str, Any] = {key: value for key, value in KEYS.items() if key != "layout"} | {
    "diffusion_steps": 4, "forward_batch_size": 4, "per_device_train_batch_size": 2,
}  # fmt: skip
BLOCKS = {**SFT, "block_length": 4}
DPO = {**SFT, "beta": 0.5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Answers of many lengths, one very long: ranks then run the model unequally often."""
    import_before_the_forks(*SLOW_IMPORTS)
    folder = tmp_path_factory.mktemp("strategies")
    config = save_tiny_qwen2(folder / "model") / "config.json"
    keys = json.loads(config.read_text())
    config.write_text(json.dumps({**keys, "is_causal": False, "mask_token_id": keys["pad_token_id"]}))
    rows: list[Any] = pair_rows(8, 2)
    rows[0]["chosen"] = {"from": "gpt", "value": sentence(5, 290)}
    write_jsonl(folder / "pairs.jsonl", rows)
    for row in rows:
        row["messages"] = [
            {"role": "user", "content": row["conversations"][0]["value"]},
            {"role": "assistant", "content": row["chosen"]["value"]},
        ]
    write_jsonl(folder / "chats.jsonl", [{"id": row["id"], "messages": row["messages"]} for row in rows])
    train_on(1, folder / "dpo", DPO)
    train_on(1, folder / "sft", BLOCKS)
    return folder


@pytest.mark.parametrize(
    ("name", "keys"),
    [("zero3", {}), ("fsdp", {}), ("fsdp", {"activation_checkpointing": True})],
    ids=["zero3", "fsdp", "fsdp-recomputed"],
)
def test_two_processes_tune_what_one_does(folder: Path, name: str, keys: dict[str, Any]) -> None:
    one, two = folder / "dpo", train_on(2, folder / f"dpo-{name}-{len(keys)}", {**DPO, **STRATEGIES[name], **keys})
    assert losses(two)[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)
    assert losses(two, "eval_loss") == pytest.approx(losses(one, "eval_loss"), abs=2e-5)
    assert largest_difference(one, two) < 2e-5
    assert shares(two, "weights") == pytest.approx([0.5, 0.5], abs=0.02)
    assert shares(two, "scoring") == [pytest.approx([0.5], abs=0.02)] * 2


@pytest.mark.parametrize("name", ["zero3", "fsdp"])
def test_two_processes_fine_tune_what_one_does_block_by_block(folder: Path, name: str) -> None:
    one, two = folder / "sft", train_on(2, folder / f"sft-{name}", {**BLOCKS, **STRATEGIES[name]})
    assert losses(two) == pytest.approx(losses(one), abs=2e-5)
    assert largest_difference(one, two) < 2e-5


def test_an_adapter_is_merged_into_whole_weights(folder: Path) -> None:
    keys = {**DPO, "lora": {"r": 4, "alpha": 8}, "num_train_epochs": 1}
    one = train_on(1, folder / "lora", keys)
    for name in ("zero3", "fsdp"):
        two = train_on(2, folder / f"lora-{name}", {**keys, **STRATEGIES[name]})
        assert losses(two) == pytest.approx(losses(one), abs=2e-5)
        assert largest_difference(one, two) < 2e-5
