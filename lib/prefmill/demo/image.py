"""A tiny CLIP and tiny SDXL, SD 1.5, SD 3 and FLUX.1 pipelines, for the image pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.seeding import seeded
from prefmill.demo.tokenizer import letter_tokenizer, train_clip_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_VOCAB_SIZE = 1000
_MAX_TEXT_LENGTH = 77  # as in every CLIP
_TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
_PROJECTION_DIM = 32
_IMAGE_SIZE = 32
_TIME_EMBED_DIM = 8
_SDXL_TIME_IDS = 6  # original size, crop, target size: height and width of each


def build_clip(folder: Path, texts: Sequence[str], seed: int) -> None:
    """Save a tiny CLIP and its processor to `folder`."""
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = train_clip_tokenizer(texts, _VOCAB_SIZE, _MAX_TEXT_LENGTH)
    vision = {**_TEXT, "image_size": _IMAGE_SIZE, "patch_size": 8, "projection_dim": _PROJECTION_DIM}
    config = CLIPConfig(text_config=_text_config(tokenizer), vision_config=vision, projection_dim=_PROJECTION_DIM)
    with seeded(seed):
        model = CLIPModel(config)
    size = {"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}
    # Pillow's form: transformers' default one needs torchvision.
    images = CLIPImageProcessorPil(size={"shortest_edge": _IMAGE_SIZE}, crop_size=size)
    model.save_pretrained(folder)
    CLIPProcessor(images, tokenizer).save_pretrained(folder)


def build_sdxl(folder: Path, texts: Sequence[str], seed: int) -> None:
    """Save a tiny Stable Diffusion XL pipeline to `folder`: two text encoders, UNet, VAE, scheduler."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = train_clip_tokenizer(texts, _VOCAB_SIZE, _MAX_TEXT_LENGTH)
    text_config = CLIPTextConfig(**_text_config(tokenizer))
    with seeded(seed):
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(),
            text_encoder=CLIPTextModel(text_config),
            text_encoder_2=CLIPTextModelWithProjection(text_config),
            tokenizer=tokenizer,
            tokenizer_2=tokenizer,
            unet=_unet(
                # SDXL joins the states of both text encoders.
                cross_attention_dim=2 * _TEXT["hidden_size"],
                addition_embed_type="text_time",
                addition_time_embed_dim=_TIME_EMBED_DIM,
                projection_class_embeddings_input_dim=_SDXL_TIME_IDS * _TIME_EMBED_DIM + _PROJECTION_DIM,
            ),
            # As in the published SDXL.
            scheduler=EulerDiscreteScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
            ),
        )
    pipeline.save_pretrained(folder)


def build_sd15(folder: Path, texts: Sequence[str], seed: int) -> None:
    """Save a tiny Stable Diffusion 1.5 pipeline to `folder`: one text encoder, no added conditions."""
    from diffusers import PNDMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = train_clip_tokenizer(texts, _VOCAB_SIZE, _MAX_TEXT_LENGTH)
    with seeded(seed):
        pipeline = StableDiffusionPipeline(
            vae=_vae(scaling_factor=0.18215),
            text_encoder=CLIPTextModel(CLIPTextConfig(**_text_config(tokenizer))),
            tokenizer=tokenizer,
            unet=_unet(cross_attention_dim=_TEXT["hidden_size"]),
            # As in the published SD 1.5.
            scheduler=PNDMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1,
                set_alpha_to_one=False,
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipeline.save_pretrained(folder)


def build_sd3(folder: Path, texts: Sequence[str], seed: int) -> None:
    """Save a tiny Stable Diffusion 3.5 pipeline to `folder`: two CLIPs and a T5, a transformer, flow matching."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    tokenizer, letters = train_clip_tokenizer(texts, _VOCAB_SIZE, _MAX_TEXT_LENGTH), letter_tokenizer()
    clip = CLIPTextConfig(**_text_config(tokenizer))
    joint = 2 * _TEXT["hidden_size"]  # both CLIPs' states beside each other, as wide as T5's
    t5 = T5Config(vocab_size=len(letters), d_model=joint, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    with seeded(seed):
        pipeline = StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=_IMAGE_SIZE // 2, num_layers=2, attention_head_dim=8, num_attention_heads=4,
                caption_projection_dim=32, joint_attention_dim=joint, pooled_projection_dim=2 * _PROJECTION_DIM,
                pos_embed_max_size=24, dual_attention_layers=(0,), qk_norm="rms_norm",
            ),
            # As in the published SD 3.5: 16 channels, shifted.
            vae=_vae(scaling_factor=1.5305, shift_factor=0.0609, latent_channels=16),
            text_encoder=CLIPTextModelWithProjection(clip), text_encoder_2=CLIPTextModelWithProjection(clip),
            text_encoder_3=T5EncoderModel(t5), tokenizer=tokenizer, tokenizer_2=tokenizer, tokenizer_3=letters,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        )  # fmt: skip
    pipeline.save_pretrained(folder)


def build_flux_dev(folder: Path, texts: Sequence[str], seed: int) -> None:
    """Save a tiny FLUX.1-dev pipeline to `folder`: told its guidance, and with a shift that follows the size."""
    _build_flux(folder, texts, seed, guidance=True, shift={"shift": 3.0, "use_dynamic_shifting": True})


def build_flux_schnell(folder: Path, texts: Sequence[str], seed: int) -> None:
    """Save a tiny FLUX.1-schnell pipeline to `folder`: no guidance, no shift."""
    _build_flux(folder, texts, seed, guidance=False, shift={"shift": 1.0})


def _build_flux(folder: Path, texts: Sequence[str], seed: int, guidance: bool, shift: dict[str, Any]) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer, letters = train_clip_tokenizer(texts, _VOCAB_SIZE, _MAX_TEXT_LENGTH), letter_tokenizer()
    width = _TEXT["hidden_size"]
    t5 = T5Config(vocab_size=len(letters), d_model=width, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    with seeded(seed):
        pipeline = FluxPipeline(
            # As in the published FLUX.1 but for widths and depths: 16 channels in patches of 2 x 2.
            transformer=FluxTransformer2DModel(
                in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=width, pooled_projection_dim=width, guidance_embeds=guidance,
                axes_dims_rope=(4, 6, 6),
            ),
            vae=_vae(
                scaling_factor=0.3611, shift_factor=0.1159, latent_channels=16, use_quant_conv=False,
                use_post_quant_conv=False,
            ),
            text_encoder=CLIPTextModel(CLIPTextConfig(**_text_config(tokenizer))), text_encoder_2=T5EncoderModel(t5),
            tokenizer=tokenizer, tokenizer_2=letters, scheduler=FlowMatchEulerDiscreteScheduler(**shift),
        )  # fmt: skip
    pipeline.save_pretrained(folder)


def _text_config(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {
        **_TEXT,
        **ids,
        "vocab_size": len(tokenizer),
        "projection_dim": _PROJECTION_DIM,
        "max_position_embeddings": _MAX_TEXT_LENGTH,
    }


def _vae(**more: Any) -> Any:
    from diffusers import AutoencoderKL

    given = {"latent_channels": 4, "scaling_factor": 0.13025, **more}  # SDXL's factor
    return AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        sample_size=_IMAGE_SIZE,
        # SDXL's VAE has force_upcast because it overflows in fp16, which this one does not.
        force_upcast=False,
        **given,
    )


def _unet(**more: Any) -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=_IMAGE_SIZE // 2,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        **more,
    )
