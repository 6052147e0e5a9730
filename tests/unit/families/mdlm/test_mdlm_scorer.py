"""The scorer: bidirectional, equal to a single pass in values and gradients, flat in memory, shifted, remote-like."""

from __future__ import annotations

import random
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import prefmill.families.mdlm.scorer
from prefmill.core.errors import ConfigError, InputError
from prefmill.families.mdlm.estimator import Draws
from prefmill.families.mdlm.evaluated_model import bounds, chain
from prefmill.families.mdlm.family import Drawing
from prefmill.families.mdlm.loading import check_remote_code, load_diffusion_model, mask_token_of, predicts_next
from prefmill.families.mdlm.scorer import chunks, encode_samples, patch_forward, restore_forward, score_batch

MASK = 3


@pytest.fixture
def model(tiny_folder: Path) -> Any:
    loaded = load_diffusion_model(str(tiny_folder), precision="fp32").double()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.mul_(4.0)  # so that predictions are far from uniform
    return loaded


def samples(count: int = 5, longest: int = 9) -> list[tuple[list[int], list[int]]]:
    rng = random.Random(0)
    return [([rng.randrange(5, 60) for _ in range(4)], [rng.randrange(5, 60) for _ in range(longest - n % 3)])
            for n in range(count)]  # fmt: skip


def batch_of(rows: list[tuple[list[int], list[int]]], num_draws: int) -> Any:
    drawing = Drawing(num_draws, "balanced", 0)
    return encode_samples(rows, [drawing.of(*row, 0) for row in rows])


def single_pass(model: Any, batch: Any, shifted: bool = False) -> Tensor:
    """Full logits of every row and draw at once, as one would write it down."""
    rows = []
    for sample, end in enumerate(batch.ends):
        clean, masked = batch.input_ids[sample, :end], batch.masked[sample, :, :end]
        noisy = torch.where(masked, MASK, clean)
        logps = model(input_ids=noisy).logits.log_softmax(-1)
        if shifted:
            logps = torch.cat([logps[:, :1], logps[:, :-1]], dim=1)
        found = logps.gather(-1, clean.expand_as(masked)[..., None])[..., 0]
        rows.append((batch.weights[sample, :, :end] * found * masked).sum(1))
    return torch.stack(rows)


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("forward_batch_size", [1, 3, 64])
def test_values_and_gradients_are_those_of_a_single_pass(model: Any, forward_batch_size: int, shifted: bool) -> None:
    batch = batch_of(samples(), num_draws=8)
    expected = single_pass(model, batch, shifted)
    expected.mean(1).square().sum().backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters()}
    model.zero_grad()
    patch_forward(model, mask_token_id=MASK, shifted=shifted, forward_batch_size=forward_batch_size)
    found = score_batch(model, batch)
    found.mean(1).square().sum().backward()
    assert found.shape == (5, 8)
    assert (found - expected).abs().max() < 1e-9
    for name, value in model.named_parameters():
        scale = gradients[name].abs().max()
        assert (value.grad - gradients[name]).abs().max() < 1e-6 * max(1.0, float(scale)), name
    restore_forward(model)
    assert model(input_ids=torch.tensor([[5, 6]])).logits.shape[:2] == (1, 2)


def test_it_attends_both_ways(model: Any) -> None:
    """A token before the end is predicted from what follows it: a causal model's score would not move."""
    masked = np.array([[True, False, False]])
    scores = []
    for last in (7, 8):
        batch = encode_samples([([5], [6, 9, last])], [Draws(masked, np.array([3.0]))])
        scores.append(score_batch(patch_forward(model, mask_token_id=MASK), batch).item())
        restore_forward(model)
    assert abs(scores[0] - scores[1]) > 1e-6


def test_the_prompt_is_never_masked() -> None:
    batch = batch_of(samples(), num_draws=16)
    assert not batch.masked[:, :, :4].any()
    for sample, end in enumerate(batch.ends):
        assert not batch.masked[sample, :, end:].any()
        assert batch.masked[sample, :, 4:end].any(1).all()


def test_rows_of_different_lengths_never_share_a_chunk() -> None:
    ends, counts, seen = (5, 7, 5, 6), [[1, 2, 4]] * 4, []
    for rows in chunks(ends, counts, forward_batch_size=4, device=torch.device("cpu")):
        places = list(zip(rows.sample.tolist(), rows.draw.tolist(), strict=True))
        assert len(places) <= 4
        assert all(ends[sample] == rows.end for sample, _ in places)
        assert rows.num_masked == sum(counts[sample][draw] for sample, draw in places)
        seen += places
    assert sorted(seen) == [(sample, draw) for sample in range(4) for draw in range(3)]


class Live(TorchDispatchMode):
    """Counts the bytes of the tensors that are made within and not yet freed; `most` is their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self.sizes:
                storage = tensor.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, storage._cdata)
                self.most = max(self.most, sum(self.sizes.values()))
        return made


@pytest.mark.slow
def test_memory_does_not_grow_with_the_draws(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peak over forward and backward, and that keeping the last chunk's activations does not raise it."""
    patch_forward(model, mask_token_id=MASK, forward_batch_size=4)
    rows = samples(2, longest=60)

    def peak(num_draws: int) -> int:
        model.zero_grad()
        batch = batch_of(rows, num_draws)
        with Live() as live:
            score_batch(model, batch).sum().backward()
        return live.most

    few, many = peak(4), peak(64)
    monkeypatch.setattr(prefmill.families.mdlm.scorer, "recomputed", all_recomputed)
    assert many < 1.5 * few, "16 times the draws: a chunk with more masked tokens among them"
    assert many <= peak(64)
    monkeypatch.setattr(
        prefmill.families.mdlm.scorer, "recomputed", lambda work, chunks: [work(*chunk) for chunk in chunks]
    )
    assert peak(64) > 5 * few, "and what is measured would grow"


def all_recomputed(work: Any, chunks: list[Any]) -> list[Tensor]:
    return [checkpoint(work, *chunk, use_reentrant=False) for chunk in chunks]


class RemoteLike(nn.Module):
    """A model as LLaDA's code has it: no decoder to call, attention masks unknown, both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type="llada", mask_token_id=MASK)
        self.embed, self.mix, self.head = nn.Embedding(64, 16), nn.Linear(16, 16), nn.Linear(16, 64, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> Any:
        hidden = self.embed(input_ids)
        hidden = torch.tanh(self.mix(hidden + hidden.mean(1, keepdim=True)))
        return SimpleNamespace(logits=self.head(hidden))


def test_models_with_their_own_code_are_scored_by_watching_their_head() -> None:
    torch.manual_seed(0)
    remote = RemoteLike()
    batch = batch_of(samples(), num_draws=4)
    expected = single_pass(remote, batch)
    projected = []
    remote.head.register_forward_hook(lambda *called: projected.append(called[2].shape))
    found = score_batch(patch_forward(remote, mask_token_id=MASK, forward_batch_size=4), batch)
    assert (found - expected).abs().max() < 1e-4
    assert max(shape[:-1].numel() for shape in projected) <= 4 * 9, "logits of masked places only"


def test_a_head_that_is_not_called_is_refused() -> None:
    remote = RemoteLike()
    remote.get_output_embeddings = lambda: nn.Linear(16, 64)  # type: ignore[method-assign]
    with pytest.raises(InputError, match="cannot be watched"):
        score_batch(patch_forward(remote, mask_token_id=MASK), batch_of(samples(1), 2))


def test_the_bound_is_the_mean_of_the_chain_over_all_orders(model: Any) -> None:
    """For one token bound and chain are the same number; for more, the chain of one order differs from the mean."""
    prompt, response = [5, 6, 7], [9]
    scorer = patch_forward(model, mask_token_id=MASK)
    (found,) = bounds(scorer, [(prompt, response)], Drawing(16, "balanced", 0))
    restore_forward(model)
    assert found.bound == pytest.approx(chain(model, prompt, response, MASK, False, 8), abs=1e-5)
    assert found.standard_error == pytest.approx(0, abs=1e-6)
    left_to_right = chain(model, prompt, [9, 10], MASK, False, 8)
    right_to_left = sum(
        _conditional(model, [*prompt, *seen], place) for seen, place in (([MASK, MASK], 4), ([MASK, 10], 3))
    )
    patch_forward(model, mask_token_id=MASK)
    (two,) = bounds(model, [(prompt, [9, 10])], Drawing(256, "balanced", 0))
    restore_forward(model)
    assert two.bound == pytest.approx((left_to_right + right_to_left) / 2, abs=5 * float(two.standard_error or 0))


def _conditional(model: Any, ids: list[int], place: int) -> float:
    target = {3: 9, 4: 10}[place]
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([ids])).logits[0, place].log_softmax(-1)[target])


def test_what_loading_refuses(tiny_folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="earlier tokens only"):
        load_diffusion_model(str(tmp_path), precision="fp32")
    with pytest.raises(ConfigError, match="pinned revision"):
        check_remote_code(True, "someone/model", None)
    check_remote_code(True, "someone/model", "0" * 40)
    check_remote_code(True, str(tiny_folder), None)


def test_mask_token_and_shift_come_from_the_model_unless_given(tiny_folder: Path) -> None:
    embedding = nn.Embedding(10, 2)
    model = SimpleNamespace(
        config=SimpleNamespace(model_type="Dream", mask_token_id=9), get_input_embeddings=lambda: embedding
    )
    tokenizer = SimpleNamespace(mask_token_id=7)
    assert (mask_token_of(model, tokenizer), mask_token_of(model, tokenizer, 9)) == (9, 9)
    with pytest.raises(InputError, match=r"9, as config\.json says"):
        mask_token_of(model, tokenizer, 5)
    words = SimpleNamespace(
        mask_token_id=None, get_vocab=lambda: {"a": 4, "<mask>": 5}, added_tokens_decoder={5: ""}, all_special_ids=[]
    )
    plain: Any = SimpleNamespace(config=SimpleNamespace(model_type="x"), get_input_embeddings=lambda: embedding)
    assert mask_token_of(plain, words, 5) == 5
    with pytest.raises(InputError, match="not the token that the model was trained with"):
        mask_token_of(plain, words, 4)
    assert predicts_next(model)
    assert not predicts_next(model, False)
    assert not predicts_next(SimpleNamespace(config=SimpleNamespace(model_type="llada")))
    with pytest.raises(InputError, match="not in the model's vocabulary"):
        mask_token_of(model, tokenizer, 10)
    with pytest.raises(InputError, match="no mask token"):
        mask_token_of(SimpleNamespace(config=SimpleNamespace(model_type="x")), SimpleNamespace(mask_token_id=None))


class Deep(RemoteLike):
    """The same with layers, and no checkpointing of its own: what LLaDA's code has."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 16)) for _ in range(3))

    def forward(self, input_ids: Tensor, use_cache: bool | None = None) -> Any:
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = hidden + block(hidden + hidden.mean(1, keepdim=True))
        return SimpleNamespace(logits=self.head(hidden))


def test_layers_of_models_without_checkpointing_are_recomputed_to_the_same_gradients() -> None:
    from prefmill.families.mdlm.training import checkpoint_layers

    torch.manual_seed(0)
    model, batch, gradients = Deep().double(), batch_of(samples(2), num_draws=2), []
    patch_forward(model, mask_token_id=MASK)
    runs = [0, 0]
    for recompute in (False, True):
        if recompute:
            checkpoint_layers(model)
        watched: Any = model.blocks[1]
        handle = watched[0].register_forward_hook(lambda *_, n=int(recompute): runs.__setitem__(n, runs[n] + 1))
        model.zero_grad()
        score_batch(model, batch).sum().backward()
        handle.remove()
        gradients.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    assert runs[1] > runs[0]
    assert len(gradients[0]) > 8
    assert all((one - two).abs().max() < 1e-12 for one, two in zip(*gradients, strict=True))
