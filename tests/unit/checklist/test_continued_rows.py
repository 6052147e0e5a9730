"""Items of a review in a single row, against each alone through the model's own forward."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface

from prefmill.checklist import transformers_engine
from prefmill.checklist.continued_rows import PackedRows, PaddedRows, rows_of
from prefmill.checklist.engine import TransformersConfig
from prefmill.checklist.engines import open_engine
from prefmill.checklist.items import load_checklist
from tests.models.matrix import build, silence

ROWS = [(40, 41, 42, 43, 44), (50, 51, 52, 53, 54, 55, 56, 57, 58), (60, 61, 62), (70, 71, 72, 73, 74, 75, 76)]
PROMPT = tuple(range(5, 29))
PAPER: Any = {"paper_id": "p0", "title": "Sparse masks", "abstract": "We study masks.", "text": ""}


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with silence(), torch.inference_mode():
        yield


def alone(model: Any, row: tuple[int, ...], num_kept: int) -> Tensor:
    """log p of every token at a row's last places, by a forward over prompt and row."""
    logits = model(input_ids=torch.tensor([PROMPT + row]), use_cache=False).logits[0, -num_kept:]
    return logits.double().log_softmax(-1)


@pytest.mark.parametrize("kind", [PackedRows, PaddedRows])
@pytest.mark.parametrize(
    "model_type", ["llama", "qwen3", "qwen2_moe", "gpt2", "gpt_neox", "deepseek_v2", "cohere", "granite", "opt", "phi"]
)
def test_each_row_is_what_it_is_alone(model_type: str, kind: Any) -> None:
    model = build(model_type)
    assert rows_of(model) is PackedRows
    cache = model(input_ids=torch.tensor([PROMPT]), use_cache=True).past_key_values
    rows = kind(model, cache)
    found = rows.extend(ROWS, 2).double().log_softmax(-1)
    assert found.shape[:2] == (len(ROWS), 2)
    further = rows.extend([(80 + n,) for n in range(len(ROWS))]).double().log_softmax(-1)
    for n, row in enumerate(ROWS):
        torch.testing.assert_close(found[n], alone(model, row, 2), atol=2e-5, rtol=0)
        torch.testing.assert_close(further[n], alone(model, (*row, 80 + n), 1), atol=2e-5, rtol=0)
    assert cache.get_seq_length() == len(PROMPT)  # the next rows go on from the same


@pytest.mark.parametrize("model_type", ["mistral", "gemma3_text", "gpt_oss", "bamba", "mamba2", "bloom", "llama4_text"])
def test_windows_states_and_other_masks_keep_batches(model_type: str) -> None:
    assert rows_of(build(model_type)) is PaddedRows


def test_a_model_that_does_not_read_mask_or_positions_keeps_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    own = AttentionInterface()["sdpa"]

    def causal_alone(*args: Any, **kwargs: Any) -> Any:
        return own(*args, **{**kwargs, "attention_mask": None})

    with monkeypatch.context() as patch:
        patch.setitem(AttentionInterface._global_mapping, "sdpa", causal_alone)
        assert rows_of(model) is PaddedRows
    assert rows_of(model) is PackedRows
    forward = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda *args, position_ids, **kwargs: forward(*args, **kwargs))
    assert rows_of(model) is PaddedRows


class LargestKeys(TorchFunctionMode):
    """Notes how many numbers the keys of the largest call of attention have."""

    numbers = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            self.numbers = max(self.numbers, args[1].numel())
        return function(*args, **(kwargs or {}))


def test_a_review_is_held_once_for_all_items(
    tiny_judge: Path, corpus_texts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TransformersConfig(model_name_or_path=str(tiny_judge), include_paper="title_abstract")
    reviews: Any = [{"review_id": f"r{n}", "paper_id": "p0", "text": text} for n, text in enumerate(corpus_texts[:3])]
    found, keys = [], []
    for kind in (PackedRows, PaddedRows):
        monkeypatch.setattr(transformers_engine, "rows_of", lambda _, kind=kind: kind)
        engine = open_engine(config, load_checklist())
        with LargestKeys() as largest:
            outcomes = list(engine.score([(PAPER, reviews)]))
        found.append([answer["p_yes"] for outcome in outcomes for answer in outcome.answers.values()])
        keys.append(largest.numbers)
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    assert keys[0] * 5 < keys[1]
