"""The group layout against one unpadded sequence at a time: the same scores and gradients, from far fewer tokens."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from prefmill.core.errors import ConfigError
from prefmill.families.causal import group_attention, scorer
from prefmill.families.causal.chat import encode
from prefmill.families.causal.group_attention import GROUP_ATTENTION, use_group_attention
from prefmill.families.causal.group_layout import cut_responses, encode_groups, pack
from prefmill.families.causal.loading import load_model, load_tokenizer
from prefmill.families.causal.scorer import encode_pairwise, patch_forward, score_batch
from prefmill.store.jsonl import write_jsonl
from prefmill.training.batches import GroupPart
from prefmill.training.data import Group, Pair, group_by_prompt, read_pairs
from tests.threads import same_bits
from tests.tiny import pair_rows, save_tiny_qwen2


@pytest.fixture(scope="module")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_qwen2(tmp_path_factory.mktemp("tiny") / "qwen2")


@pytest.fixture(scope="module")
def groups(tiny_qwen2: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Group]:
    path = tmp_path_factory.mktemp("pairs") / "data.jsonl"
    write_jsonl(path, pair_rows(4, pairs=3))
    tokenizer = load_tokenizer(str(tiny_qwen2))
    return group_by_prompt(read_pairs(path), partial(encode, tokenizer))


@pytest.fixture(autouse=True)
def norms_in_the_models_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers normalises in float32 whatever the model's dtype, which would hide what is compared here."""
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    def forward(self: Any, hidden: torch.Tensor) -> torch.Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(Qwen2RMSNorm, "forward", forward)


@pytest.fixture
def shared(tiny_qwen2: Path) -> Any:
    model = load_model(str(tiny_qwen2), precision="fp32").double()
    use_group_attention(model)
    return patch_forward(model)


def whole(groups: list[Group]) -> list[GroupPart]:
    return [GroupPart(index, tuple(range(len(group.pairs)))) for index, group in enumerate(groups)]


def one_at_a_time(model: Any, prompt: list[int], response: list[int]) -> torch.Tensor:
    """The sum of log p over a response, from full logits of one unpadded sequence."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).sum()


def assert_same_gradients(left: Any, right: Any, tolerance: float) -> None:
    for (name, one), other in zip(left.named_parameters(), right.parameters(), strict=True):
        assert one.grad is not None, name
        assert other.grad is not None, name
        assert (one.grad - other.grad).abs().max() <= tolerance * one.grad.abs().max(), name


def test_scores_and_gradients_equal_one_sequence_at_a_time(
    tiny_qwen2: Path, groups: list[Group], shared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scorer, "LOGITS_AT_ONCE", 7)
    plain = load_model(str(tiny_qwen2), precision="fp32").double()
    expected = torch.stack([one_at_a_time(plain, group.prompt, r) for group in groups for r in group.responses])
    expected.square().sum().backward()
    found = score_batch(shared, pack([(group.prompt, group.responses) for group in groups]))
    found.square().sum().backward()
    assert (found - expected).abs().max() < 1e-9
    assert_same_gradients(plain, shared, 1e-9)


def test_the_pairs_are_those_of_the_pairwise_layout(tiny_qwen2: Path, groups: list[Group], shared: Any) -> None:
    pairwise_model = patch_forward(load_model(str(tiny_qwen2), precision="fp32").double())
    pairwise, grouped = encode_pairwise(groups, whole(groups), pad=0), encode_groups(groups, whole(groups))
    one, other = score_batch(pairwise_model, pairwise), score_batch(shared, grouped)
    for side in ("chosen", "rejected"):
        left, right = getattr(pairwise, side), getattr(grouped, side)
        assert (one[left] - other[right]).abs().max() < 1e-9
        assert torch.equal(pairwise.lengths[left], grouped.lengths[right])
    assert len(grouped.lengths) < len(pairwise.lengths)
    assert grouped.input_ids.numel() < pairwise.attention_mask.sum()


def test_some_pairs_of_a_group_bring_only_their_responses(groups: list[Group]) -> None:
    batch = encode_groups(groups, [GroupPart(1, (2,)), GroupPart(0, (0,))])
    first, second = groups[1].pairs[2], groups[0].pairs[0]
    assert batch.lengths.tolist() == [
        len(groups[1].responses[place]) for place in sorted((first.chosen, first.rejected))
    ] + [len(groups[0].responses[place]) for place in sorted((second.chosen, second.rejected))]
    assert len(batch.chosen) == len(batch.rejected) == 2


def test_a_response_sees_neither_another_response_nor_another_group(groups: list[Group], shared: Any) -> None:
    packed = [(group.prompt, list(group.responses)) for group in groups[:2]]
    before = score_batch(shared, pack(packed))
    packed[0][1][0] = [(token + 1) % 300 for token in packed[0][1][0]]
    after = score_batch(shared, pack(packed))
    assert before[0] != after[0]
    assert torch.equal(before[1:], after[1:])


def test_responses_of_one_token(shared: Any, tiny_qwen2: Path) -> None:
    plain = load_model(str(tiny_qwen2), precision="fp32").double()
    group = Group([5, 6, 7], [[8], [9, 10]], [Pair("p", 0, 1)])
    expected = torch.stack([one_at_a_time(plain, group.prompt, response) for response in group.responses])
    assert (score_batch(shared, encode_groups([group], whole([group]))) - expected).abs().max() < 1e-9


def test_activation_checkpointing_changes_nothing(groups: list[Group], shared: Any, tiny_qwen2: Path) -> None:
    batch = encode_groups(groups, whole(groups))
    score_batch(shared, batch).sum().backward()
    checkpointed = load_model(str(tiny_qwen2), precision="fp32").double()
    use_group_attention(checkpointed)
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed.train()
    calls = []
    original = group_attention.loop_attention
    group_attention.loop_attention = lambda *given: calls.append(1) or original(*given)  # type: ignore[func-returns-value]
    try:
        scores = score_batch(patch_forward(checkpointed), batch)
        forward = len(calls)
        scores.sum().backward()
    finally:
        group_attention.loop_attention = original
    assert len(calls) == 2 * forward, "the layers ran once more in the backward pass"
    assert_same_gradients(shared, checkpointed, 1e-12)


def test_the_last_layer_leaves_a_prompt_out_but_for_its_last_token(groups: list[Group], shared: Any) -> None:
    seen: list[torch.Tensor] = []
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0][0]))
        for layer in shared.model.layers
    ]
    score_batch(shared, pack([next(iter(cut_responses(groups[0], None)))]))
    for hook in hooks:
        hook.remove()
    before = len(groups[0].prompt) - 1
    with pytest.raises(IndexError):  # nothing predicts a first token; -1 would read the sequence's last state
        score_batch(shared, pack([([], groups[0].responses)]))
    *others, last = [(attended.abs().sum(-1) > 0).tolist() for attended in seen]
    assert others == [[True] * len(last)] * len(others) != []
    assert last == [False] * before + [True] * (len(last) - before)


def test_no_mask_over_the_packed_sequence(groups: list[Group], shared: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two-dimensional intermediate of the attention spans the packed sequence on both sides."""
    masks, sizes = [], []
    original = group_attention.scaled_dot_product_attention

    def spy(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> torch.Tensor:
        masks.append(settings.pop("attention_mask", None))
        sizes.append((query.shape[2], key.shape[2]))
        return original(query, key, value, **settings)

    monkeypatch.setattr(group_attention, "scaled_dot_product_attention", spy)
    batch = encode_groups(groups, whole(groups))
    score_batch(shared, batch)
    longest = max(len(group.prompt) + max(map(len, group.responses)) for group in groups)
    assert set(masks) == {None}
    assert max(keys for _, keys in sizes) <= longest < batch.input_ids.shape[1]


def test_no_copy_of_the_prompt_is_kept_for_each_response() -> None:
    """What autograd keeps grows with the tokens, not with responses times the prompt."""

    def attend(num_responses: int) -> int:
        prompt, length = 500, 4
        tokens = prompt + num_responses * length
        query, key, value = (torch.randn(1, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2))
        spans = tuple((prompt + n * length, prompt + (n + 1) * length) for n in range(num_responses))
        storages: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: (
                storages.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()}) or tensor
            ),
            lambda tensor: tensor,
        ):
            group_attention.group_attention(
                None, query, key, value, None, segments=[group_attention.Segment((0, prompt), spans)]
            )
        return sum(storages.values())

    kept = [attend(num_responses) for num_responses in (1, 6)]
    assert kept[1] < 1.1 * kept[0]


def test_the_models_own_mask_is_not_built(groups: list[Group], shared: Any) -> None:
    """transformers makes no mask for an attention implementation that has not registered one."""
    seen = []
    layer = shared.get_decoder().layers[0]
    hook = layer.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    score_batch(shared, encode_groups(groups, whole(groups)))
    hook.remove()
    assert seen == [None]


def test_bfloat16_stays_near_the_pairwise_layout(tiny_qwen2: Path, groups: list[Group]) -> None:
    grouped = load_model(str(tiny_qwen2), precision="bf16")
    use_group_attention(grouped)
    pairwise = patch_forward(load_model(str(tiny_qwen2), precision="bf16"))
    left, right = encode_groups(groups, whole(groups)), encode_pairwise(groups, whole(groups), pad=0)
    one, other = score_batch(patch_forward(grouped), left)[left.chosen], score_batch(pairwise, right)[right.chosen]
    assert ((one - other).abs() / other.abs()).max() < 0.02


@pytest.mark.slow
def test_gradients_are_the_same_bits_every_time_on_several_threads(tiny_qwen2: Path, groups: list[Group]) -> None:
    """300 responses read their prompt's last token; the gradients that threads added to it came in any order."""
    model = patch_forward(load_model(str(tiny_qwen2), precision="fp32"))
    use_group_attention(model)
    batch = pack([(groups[0].prompt, [*(response for group in groups for response in group.responses)] * 20)])
    assert len(batch.lengths) >= 300

    def gradient() -> torch.Tensor:
        model.zero_grad()
        score_batch(model, batch).square().sum().backward()
        found: torch.Tensor = model.model.layers[0].mlp.down_proj.weight.grad
        return found

    assert same_bits(gradient)


def test_cutting_keeps_every_response_and_the_limit(groups: list[Group]) -> None:
    group = groups[0]
    limit = len(group.prompt) + 2 * max(map(len, group.responses))
    cuts = list(cut_responses(group, limit))
    assert [response for _, responses in cuts for response in responses] == group.responses
    assert len(cuts) > 1
    assert all(len(prompt) + sum(map(len, responses)) <= limit for prompt, responses in cuts)
    assert [responses for _, responses in cut_responses(group, None)] == [group.responses]


def test_layers_of_an_unknown_kind_are_refused(tiny_qwen2: Path) -> None:
    model = load_model(str(tiny_qwen2), precision="fp32")
    model.config.layer_types = ["full_attention", "indexed_attention"]
    with pytest.raises(ConfigError, match="set layout=pairwise"):
        use_group_attention(model)


def test_a_model_whose_attention_cannot_be_exchanged_is_refused(
    tiny_qwen2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(tiny_qwen2), precision="fp32")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", lambda self: False)
    with pytest.raises(ConfigError, match="attention that cannot be exchanged"):
        use_group_attention(model)
    assert model.config._attn_implementation != GROUP_ATTENTION
