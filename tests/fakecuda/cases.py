"""What a training runs on a GPU, forward and backward, on fake CUDA tensors: one function a case, raises at a mix."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.fakecuda.device import fake, fake_cuda, on_cuda

CUDA = torch.device("cuda")
BF16, FP32 = torch.bfloat16, torch.float32


def autocast(enabled: bool) -> Any:
    """A training's mixed precision."""
    return torch.autocast("cuda", dtype=BF16, enabled=enabled)


def groups() -> list[Any]:
    """Two prompts with three responses each; some are longer than their prompt."""
    from prefmill.training.data import Group, Pair

    def group(prompt: int, lengths: tuple[int, ...]) -> Group:
        responses = [list(range(5, 5 + length)) for length in lengths]
        return Group(list(range(1, prompt + 1)), responses, [Pair("a", 0, 1), Pair("b", 2, 1)])

    return [group(40, (12, 30, 55)), group(20, (30, 25, 10))]


def parts() -> list[Any]:
    """Every pair of both groups."""
    from prefmill.training.batches import GroupPart

    return [GroupPart(0, (0, 1)), GroupPart(1, (0, 1))]


def causal_model() -> nn.Module:
    """A Qwen2 with grouped-query attention."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2, bos_token_id=0, eos_token_id=0)  # fmt: skip
    return Qwen2ForCausalLM(config)


def causal(layout: str, weights: torch.dtype, mixed: bool, checkpointing: bool) -> None:
    """The causal scorer in a layout, and the gradient of a DPO loss of its scores."""
    from prefmill.families.causal.group_attention import use_group_attention
    from prefmill.families.causal.group_layout import encode_groups
    from prefmill.families.causal.scorer import encode_pairwise, patch_forward, score_batch

    batch = encode_groups(groups(), parts()) if layout == "group" else encode_pairwise(groups(), parts(), 0)
    model = causal_model()
    with fake_cuda() as mode:
        model = on_cuda(model, weights)
        if layout == "group":
            use_group_attention(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        moved = fake(mode, batch).to(CUDA)
        with autocast(mixed):
            scores = score_batch(patch_forward(model), moved)
        _backward(-nn.functional.logsigmoid(scores[moved.chosen] - scores[moved.rejected]), model)


def trainer_step() -> None:
    """A microbatch through PreferenceTrainer, from the encoded batch to the telemetry and the gradients."""
    from prefmill.families.causal.group_attention import use_group_attention
    from prefmill.families.causal.group_layout import encode_groups
    from prefmill.families.causal.scorer import patch_forward, score_batch
    from prefmill.training.family import Family

    family = Family(lambda groups, parts, epoch: encode_groups(groups, parts), score_batch)
    model = causal_model()
    use_group_attention(model)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, family, Path(folder))
        inputs = dict(trainer.train_dataset[0])
        with fake_cuda() as mode:
            inputs = {name: fake(mode, value) for name, value in inputs.items()}
            with autocast(True):
                loss = trainer.training_step(patch_forward(on_cuda(model)), inputs)
            assert loss.is_cuda
            _has_gradients(model)


def _trainer(model: nn.Module, family: Any, folder: Path) -> Any:
    """A trainer of one microbatch that takes itself to be on the GPU."""
    from transformers import TrainingArguments

    from prefmill.training.batches import Microbatch
    from prefmill.training.family import by_group
    from prefmill.training.objectives import Settings, mix
    from prefmill.training.telemetry import Telemetry
    from prefmill.training.trainer import PreferenceData, PreferenceTrainer

    class OnTheGpu(TrainingArguments):
        place_model_on_device = False

        @property
        def device(self) -> torch.device:
            assert super().device == torch.device("cpu")  # which sets up what the Trainer asks for
            return CUDA

    data = PreferenceData(groups(), by_group([torch.zeros(3), torch.zeros(3)]), [Microbatch(tuple(parts()), 4, 0, 0)])
    args = OnTheGpu(output_dir=str(folder), use_cpu=True, report_to="none")
    settings = Settings(0.1)
    objective = mix(["sigmoid"], [1.0], settings)
    return PreferenceTrainer(model, args, data, None, family, objective, settings, Telemetry(folder, 0), [])


def masked_diffusion() -> None:
    """The masked-diffusion family: values of every draw, the pairs' margins and their gradient."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefmill.families.mdlm.estimator import draws_of
    from prefmill.families.mdlm.family import DiffusionFamily, LiveVariance
    from prefmill.families.mdlm.scorer import encode_samples, patch_forward, score_batch

    samples = [(list(range(1, 11)), list(range(1, length))) for length in (21, 16)]
    draws = [draws_of([*prompt, *response], len(response), 4, "balanced", 0, 0) for prompt, response in samples]
    batch = encode_samples(samples, draws, [0], [1])
    model = LlamaForCausalLM(LlamaConfig(vocab_size=500, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                         num_attention_heads=4, is_causal=False))  # fmt: skip
    with fake_cuda() as mode:
        model = patch_forward(on_cuda(model), mask_token_id=499)
        moved = fake(mode, batch).to(CUDA)
        family = DiffusionFamily(None, score_batch, LiveVariance(4, 0.1, 0.01))  # type: ignore[arg-type]
        reference = torch.zeros(1, 4, device=CUDA)
        with autocast(True):
            scores = family.pair_scores(model, moved, reference, reference)
        _backward(scores.margin, model)


def reward() -> None:
    """The reward model on CLIP, its loss of every head, and the telemetry's gradient coefficient."""
    from prefmill.families.reward.family import REWARD_OBJECTIVE, RewardBatch, RewardFamily, score_batch
    from prefmill.families.reward.model import MultiHeadReward, MultiHeadRewardConfig
    from prefmill.training.objectives import Settings
    from prefmill.training.telemetry import gradient_coefficient

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 3}
    clip = {"text_config": text, "vision_config": {**size, "image_size": 32, "patch_size": 8}, "projection_dim": 16}
    model = MultiHeadReward(MultiHeadRewardConfig(clip_config=clip, hidden_size=8))
    tokens = torch.ones(2, 16, dtype=torch.long)
    batch = RewardBatch(torch.rand(4, 3, 32, 32), tokens, tokens, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2]),
                        torch.tensor([1, 3]), torch.rand(2, 5), torch.ones(2))  # fmt: skip
    settings = Settings(1.0)
    with fake_cuda() as mode:
        model, moved = on_cuda(model), fake(mode, batch).to(CUDA)
        with autocast(True):
            scores = RewardFamily(None, score_batch).pair_scores(model, moved)  # type: ignore[arg-type]
        assert gradient_coefficient(scores, REWARD_OBJECTIVE, settings).is_cuda
        _backward(REWARD_OBJECTIVE.loss(scores, settings), model)


def sdxl(adapter: str | None, weights: torch.dtype, objective: Any) -> None:
    """SDXL's denoising errors and the gradient of an objective, whole or with an adapter."""
    from prefmill.families.sdxl.family import SdxlFamily
    from prefmill.families.sdxl.noise import NoiseSchedule
    from prefmill.families.sdxl.objectives import DspoFactors, choose
    from prefmill.training.objectives import Settings

    residuals = objective == "dspo"
    batch, model, alphas = _sdxl_batch(residuals), _with_adapter(_unet(), adapter), torch.linspace(0.99, 0.01, 1000)
    with fake_cuda() as mode:
        model, moved = on_cuda(model, weights), fake(mode, batch).to(CUDA)
        schedule = NoiseSchedule(mode.from_tensor(alphas), "epsilon", 5.0)
        family = SdxlFamily(None, None, schedule, residuals, winner_alone=residuals)  # type: ignore[arg-type]
        reference = torch.zeros(2, device=CUDA)
        with autocast(weights == BF16):
            scores = family.pair_scores(model, moved, reference, reference)
        _backward(choose(objective, 0.0, DspoFactors()).loss(scores, Settings(5000.0)), model)


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=64,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80,
    )  # fmt: skip


def _with_adapter(unet: Any, adapter: str | None) -> Any:
    import peft

    from prefmill.families.sdxl.dora import make_exact
    from prefmill.families.sdxl.lora import make_lean

    if adapter is None:
        return unet
    config = peft.LoraConfig(r=4, use_dora=adapter == "dora", target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    model = peft.get_peft_model(unet, config)
    make_exact(model)
    make_lean(model)
    return model


def _sdxl_batch(residuals: bool) -> Any:
    from prefmill.families.sdxl.family import SdxlBatch

    latents = torch.randn(4, 4, 16, 16)
    return SdxlBatch(latents, latents, torch.randint(1000, (4,)), torch.randn(4, 7, 64), torch.randn(4, 32),
                     torch.rand(4, 6), torch.ones(2), None, latents[:2] if residuals else None)  # fmt: skip


def _backward(losses: Tensor, model: nn.Module) -> None:
    assert losses.is_cuda
    losses.sum().backward()
    _has_gradients(model)


def _has_gradients(model: nn.Module) -> None:
    trained = {name: value.grad for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert [name for name, gradient in trained.items() if gradient is not None and not gradient.is_cuda] == []
    assert any(gradient is not None for gradient in trained.values())


def _name(*parts: object) -> str:
    return " ".join(str(part).removeprefix("torch.") for part in parts if part)


_CAUSAL = product(("group", "pairwise"), ((BF16, False), (FP32, True), (FP32, False)), (False, True))
_SDXL = (
    (None, BF16, "dpo"),
    (None, FP32, "dspo"),
    ("lora", BF16, "dspo"),
    ("lora", FP32, "dpo"),
    ("dora", BF16, "dspo"),
)
CASES: Mapping[str, Callable[[], None]] = {
    **{
        _name("causal", layout, weights, mixed and "autocast", again and "checkpointing"): partial(
            causal, layout, weights, mixed, again
        )
        for layout, (weights, mixed), again in _CAUSAL
    },
    "trainer step": trainer_step,
    "masked diffusion": masked_diffusion,
    "reward": reward,
    **{_name("sdxl", adapter or "whole", *rest): partial(sdxl, adapter, *rest) for adapter, *rest in _SDXL},
}
