"""One step of every family, tiny or at its true size, for whatever device: a model, a batch, and the losses of both."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from prefmill.families.causal.group_attention import use_group_attention
from prefmill.families.causal.group_layout import encode_groups
from prefmill.families.causal.scorer import encode_pairwise, patch_forward, score_batch
from prefmill.training.batches import GroupPart
from prefmill.training.data import Group, Pair
from prefmill.training.objectives import Settings, mix

SizeName = Literal["tiny", "true"]


@dataclass(frozen=True)
class Step:
    """`losses(model, batch, *constants)` gives losses [N]; `batch.to(device)` moves it, the constants stay behind."""

    model: Any
    batch: Any
    losses: Callable[..., Tensor]
    constants: tuple[Tensor, ...] = ()


def groups() -> list[Group]:
    """Two prompts with three responses each; some are longer than their prompt."""

    def group(prompt: int, lengths: tuple[int, ...]) -> Group:
        responses = [list(range(5, 5 + length)) for length in lengths]
        return Group(list(range(1, prompt + 1)), responses, [Pair("a", 0, 1), Pair("b", 2, 1)])

    return [group(40, (12, 30, 55)), group(20, (30, 25, 10))]


PARTS = [GroupPart(0, (0, 1)), GroupPart(1, (0, 1))]

_QWEN2: Mapping[SizeName, dict[str, int]] = {
    "tiny": {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    # Qwen2.5-0.5B
    "true": {"vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
             "num_attention_heads": 14, "num_key_value_heads": 2},
}  # fmt: skip


def qwen2(size: SizeName, **given: Any) -> Any:
    """A Qwen2 with grouped-query attention and random weights."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(**{**_QWEN2[size], **given}, bos_token_id=0, eos_token_id=0, max_position_embeddings=32_768,
                         tie_word_embeddings=size == "true")  # fmt: skip
    return Qwen2ForCausalLM(config)


def causal(layout: Literal["group", "pairwise"], size: SizeName = "tiny") -> Step:
    """DPO's loss without a reference, of a layout's scores."""
    model = qwen2(size)
    if layout == "group":
        use_group_attention(model)
    batch = encode_groups(groups(), PARTS) if layout == "group" else encode_pairwise(groups(), PARTS, 0)

    def losses(model: Any, batch: Any) -> Tensor:
        scores = score_batch(model, batch)
        return -nn.functional.logsigmoid(scores[batch.chosen] - scores[batch.rejected])

    return Step(patch_forward(model), batch, losses)


def masked_diffusion(size: SizeName = "tiny") -> Step:
    """Margins of a masked-diffusion model over a reference of zero; at true size four layers of LLaDA-8B's width."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefmill.families.mdlm.estimator import draws_of
    from prefmill.families.mdlm.family import DiffusionFamily, LiveVariance
    from prefmill.families.mdlm.scorer import encode_samples, patch_forward, score_batch

    tiny = {"vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 4}  # fmt: skip
    true = {"vocab_size": 126_464, "hidden_size": 4096, "intermediate_size": 12_288, "num_hidden_layers": 4,
            "num_attention_heads": 32}  # fmt: skip
    config = LlamaConfig(**(true if size == "true" else tiny), is_causal=False)
    longer = 20 if size == "true" else 1
    samples = [(list(range(1, 11)), list(range(1, longer * length))) for length in (20, 15)]
    draws = [draws_of([*prompt, *response], len(response), 4, "balanced", 0, 0) for prompt, response in samples]
    family = DiffusionFamily(None, score_batch, LiveVariance(4, 0.1, 0.01))  # type: ignore[arg-type]

    def losses(model: Any, batch: Any) -> Tensor:
        reference = torch.zeros(1, 4, device=batch.weights.device)
        return family.pair_scores(model, batch, reference, reference).margin

    model = patch_forward(LlamaForCausalLM(config), mask_token_id=499)
    return Step(model, encode_samples(samples, draws, [0], [1]), losses)


def reward(size: SizeName = "tiny") -> Step:
    """The reward model's loss of every head; at true size on CLIP ViT-L/14."""
    from transformers import CLIPConfig

    from prefmill.families.reward.family import RewardBatch, RewardFamily, score_batch
    from prefmill.families.reward.model import MultiHeadReward, MultiHeadRewardConfig
    from prefmill.training.telemetry import gradient_coefficient

    width = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text: dict[str, Any] = {**width, "vocab_size": 100, "max_position_embeddings": 16, "eos_token_id": 3}
    vision: dict[str, Any] = {**width, "image_size": 32, "patch_size": 8}
    projection = 16
    if size == "true":
        layers = {"num_hidden_layers": 12, "num_attention_heads": 12}
        text = {"hidden_size": 768, "intermediate_size": 3072, **layers, "max_position_embeddings": 77}
        vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
                  "image_size": 224, "patch_size": 14}  # fmt: skip
        projection = 768
    clip = CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)
    side, tokens = vision["image_size"], torch.ones(2, text["max_position_embeddings"], dtype=torch.long)
    batch = RewardBatch(torch.rand(4, 3, side, side), tokens, tokens, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 2]),
                        torch.tensor([1, 3]), torch.rand(2, 5), torch.ones(2))  # fmt: skip

    settings = Settings(1.0)
    objective = mix(["bradley_terry_heads"], [1.0], settings, RewardFamily.supplies)

    def losses(model: Any, batch: Any) -> Tensor:
        scores = RewardFamily(None, score_batch).pair_scores(model, batch)  # type: ignore[arg-type]
        assert gradient_coefficient(scores, objective, settings).device == scores.chosen.device
        return objective.loss(scores, settings)

    return Step(MultiHeadReward(MultiHeadRewardConfig(clip_config=clip, hidden_size=8)), batch, losses)


def sdxl(size: SizeName = "tiny", adapter: str | None = None, objective: Any = "dpo") -> Step:
    """An objective of SDXL's denoising errors, the UNet whole or with an adapter; at true size 1024 x 1024 pixels."""
    from benchmarks.sdxl_models import FULL, make_unet
    from prefmill.families.sdxl.family import SdxlBatch, SdxlFamily
    from prefmill.families.sdxl.noise import NoiseSchedule

    residuals = objective == "dspo"
    unet = make_unet(FULL) if size == "true" else _tiny_unet()
    side, width, pooled = (128, 2048, 1280) if size == "true" else (16, 64, 32)
    latents = torch.randn(4, 4, side, side)
    batch = SdxlBatch(latents, latents, torch.randint(1000, (4,)), torch.randn(4, 77, width), torch.randn(4, pooled),
                      torch.rand(4, 6), torch.ones(2), None, latents[:2] if residuals else None)  # fmt: skip
    loss = mix([objective], [1.0], Settings(5000.0), SdxlFamily.supplies).loss

    def losses(model: Any, batch: Any, alphas: Tensor) -> Tensor:
        schedule = NoiseSchedule(alphas, "epsilon", 5.0)
        family = SdxlFamily(None, None, schedule, residuals, winner_alone=residuals)  # type: ignore[arg-type]
        reference = torch.zeros(2, device=batch.latents.device)
        return loss(family.pair_scores(model, batch, reference, reference), Settings(5000.0))

    return Step(_with_adapter(unet, adapter), batch, losses, (torch.linspace(0.99, 0.01, 1000),))


def _tiny_unet() -> Any:
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


FAMILIES: Mapping[str, Callable[[SizeName], Step]] = {
    "causal, group": partial(causal, "group"),
    "causal, pairwise": partial(causal, "pairwise"),
    "masked diffusion": masked_diffusion,
    "reward": reward,
    "sdxl": sdxl,
    "sdxl, dspo with LoRA": partial(sdxl, adapter="lora", objective="dspo"),
}
