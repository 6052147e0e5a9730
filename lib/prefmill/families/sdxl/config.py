"""The configuration of SDXL preference training."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from prefmill.core.config import ExternalPath, later, renamed, runtime
from prefmill.core.places import expand_home
from prefmill.families.sdxl.folders import is_flow, is_pipeline_adapter, merged_once
from prefmill.training.config import OF_TEXT_MODELS, LoraConfig, TrainingConfig
from prefmill.training.objective_names import Need, require_usable, usable_with
from prefmill.training.transformers_names import Optimizer

ERRORS: dict[bool, Need] = {False: "noise_errors", True: "velocity_errors"}  # a model has one of them: of `is_flow`
ATTENTION = ("sdpa", "xformers", "sliced")
MAPO = {"beta": 0.1, "mapo_snr": 0.5}  # its authors' numbers (train.py of mapo-t2i)
_OF_DSPO = ("dspo_lambda", "dspo_stop_gradient")


class AdapterConfig(LoraConfig):
    """LoRA or DoRA on the UNet's attention; alpha defaults to 4 x rank, the scale then being 4 at every rank."""

    use_dora: bool = True
    target_modules: str | list[str] = ["to_q", "to_k", "to_v", "to_out.0"]

    @model_validator(mode="before")
    @classmethod
    def _alpha_follows_rank(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("start") is not None:
            raise ValueError(f"start: a UNet's adapter starts anew: {merged_once(Path(str(values['start'])))}")
        # Before the fields are set: afterwards a default and an alpha that was given look alike.
        if not isinstance(values, dict) or values.get("alpha") is not None:
            return values
        rank = values.get("r", cls.model_fields["r"].default)
        return {**values, "alpha": 4 * rank} if isinstance(rank, int) else values  # any other is refused by itself


class SdxlPreferenceConfig(TrainingConfig):
    """Keys of sdxl_dpo; `max_steps` takes the place of `num_train_epochs`, `lora: null` trains the whole UNet."""

    supplies: ClassVar[frozenset[Need]] = frozenset(
        {"reference", "errors", *ERRORS.values(), "residuals", "soft_label"}
    )
    unread_with = {"max_steps": ("num_train_epochs",)}
    own_head: ClassVar[bool] = True
    compiles_itself: ClassVar[bool] = True

    variant: str | None = Field(None, description="of the pipeline's weights on the hub, such as fp16")
    resolution: int = Field(1024, ge=8, multiple_of=8, description="pixels of the short side; the middle is cut out")
    bucket_step: int | None = later(
        None,
        ge=8,
        multiple_of=8,
        description="64: pairs keep the winner's aspect ratio, at sizes in steps of 64 pixels",
    )
    random_flip: bool = Field(False, description="mirror both images of a pair in half of the epochs")
    caption_dropout: float = later(0.0, ge=0, lt=1, description="share of pairs and epochs trained without a prompt")
    noise_offset: float = later(0.0, ge=0, le=1, description="moves each channel's noise by so much x N(0, 1)")
    vae_precision: Literal["fp32", "fp16", "bf16"] = Field(
        "fp32", description="of the VAE; fp16 only with one made for it"
    )

    objective: str = Field(
        "dspo",
        description="dpo, dspo, dspo_official_sdxl, dspo_rm, mapo, sft, sigmoid, hinge, ipo; for SD 3, FLUX flow_dpo",
    )
    # 5000 is Diffusion-DPO's for SDXL (Wallace et al. 2023, arXiv 2311.12908).
    beta: float = Field(
        5000.0,
        gt=0,
        description="strength of the tie to the reference, on mean errors; for mapo the weight of its second term",
    )
    dspo_lambda: float = Field(1.0, ge=0, description="how far dspo moves the target off the reference")
    dspo_stop_gradient: bool = Field(True, description="whether dspo's two factors are constants")
    mapo_snr: float | None = later(None, gt=0, description="mapo's signal-to-noise factor")
    sft_weight: float = Field(0.0, ge=0, description="weight of the winner's error, added to any objective")
    reward_temperature: float = Field(1.0, gt=0, description="temperature of dspo_rm")
    reward_weights: dict[str, float] | None = Field(None, description="weight of each head by name, for dspo_rm")
    min_snr_gamma: float | None = Field(
        None, gt=0, description="min-SNR weighting of the errors, commonly 5; none: no weighting"
    )
    guidance_scale: float | None = later(
        None, ge=0, description="what FLUX.1-dev is told, as when it draws; none: its pipeline's default, 3.5"
    )
    prompt_half: Literal["all", "policy"] = renamed(
        "half", "all", description="`policy`: only prompts that the reward model of the other half has never seen"
    )
    shuffle_labels: bool = Field(False, description="control: winner and loser at random")

    learning_rate: float = Field(5e-5, gt=0)
    num_train_epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1, description="optimizer steps, instead of `num_train_epochs`")
    effective_batch_size: int = Field(8, ge=1)
    lora: AdapterConfig | None = Field(default_factory=AdapterConfig)
    use_ema: bool = Field(False, description="publish the moving average of the weights")
    # The default of diffusers' EMAModel.
    ema_decay: float = Field(0.9999, gt=0, lt=1, description="of the moving average")
    optim: Optimizer | None = "adamw_torch_fused"
    torch_compile: bool = False

    logging_steps: int = runtime(50, ge=1)
    sample_steps: int | None = runtime(
        None, ge=1, description="steps between two sample images in the logs; none: no samples"
    )
    num_samples: int = runtime(4, ge=1, description="prompts drawn for each sample")
    sample_inference_steps: int = runtime(25, ge=1, le=1000, description="denoising steps of a sample")
    vae_batch_size: int = runtime(4, ge=1, description="images per pass of the VAE")
    cache_dir: ExternalPath | None = runtime(
        None, description="folder of latents, embeddings and reference errors; none: data/cache"
    )
    save_merged: bool = Field(False, description="also publish the pipeline with the adapter merged")

    @model_validator(mode="before")
    @classmethod
    def _adapter_is_continued(cls, values: Any) -> Any:
        """In place of what language models do: a UNet's adapter is merged first."""
        named = values.get("model_name_or_path") if isinstance(values, dict) else None
        folder = expand_home(str(named))
        if named is not None and is_pipeline_adapter(folder):
            raise ValueError(f"model_name_or_path: {named} is an adapter, not a pipeline: {merged_once(folder)}")
        return values

    @model_validator(mode="before")
    @classmethod
    def _numbers_of_mapo(cls, values: Any) -> Any:
        """Written out, so that they are part of the identity: what an earlier MaPO made is stale."""
        if not isinstance(values, dict) or values.get("objective") != "mapo":
            return values
        return {**MAPO, **{key: value for key, value in values.items() if key not in MAPO or value is not None}}

    @field_validator("objective")
    @classmethod
    def _fits_the_family(cls, name: str) -> str:
        return require_usable([name], cls.supplies)[0]

    @model_validator(mode="after")
    def _fits_the_model(self) -> Self:
        """Before anything is spent, where the model is named here and not by an input, and is on this machine."""
        flow = is_flow(self.model_name_or_path, self.revision) if self.model_name_or_path else None
        usable = usable_with(self.supplies if flow is None else self.supplies - {ERRORS[not flow]})
        if self.objective not in usable:
            kind = "a velocity" if flow else "noise"
            raise ValueError(
                f"objective {self.objective} is not of {self.model_name_or_path}, which predicts {kind}: take one of "
                f"{', '.join(usable)}"
            )
        return self

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        if ignored := self.changed(*OF_TEXT_MODELS):
            raise ValueError(f"{', '.join(ignored)}: a key of text models, leave it out")
        of_dspo = self.changed(*_OF_DSPO)
        if of_dspo and self.objective != "dspo":
            raise ValueError(f"{', '.join(of_dspo)}: only objective dspo reads it, leave it out")
        if self.changed("ema_decay") and not self.use_ema:
            raise ValueError("ema_decay has no effect without use_ema; leave it out, or set use_ema: true")
        if self.objective == "sft" and (of_others := self.changed("beta", "sft_weight")):
            raise ValueError(f"{', '.join(of_others)}: no effect with objective sft, leave it out")
        if (of_samples := self.changed("num_samples", "sample_inference_steps")) and self.sample_steps is None:
            raise ValueError(f"{', '.join(of_samples)}: no effect without sample_steps, leave it out or set that")
        if self.mapo_snr is not None and self.objective != "mapo":
            raise ValueError("mapo_snr: only objective mapo reads it, leave it out")
        return self

    @model_validator(mode="after")
    def _can_be_trained(self) -> Self:
        if self.reward_weights is not None and max(self.reward_weights.values(), default=0) <= 0:
            raise ValueError("of reward_weights none is above 0: nothing is preferred, or what is worse; raise one")
        if self.attn_implementation is not None and self.attn_implementation not in ATTENTION:
            raise ValueError(f"attn_implementation is one of {', '.join(ATTENTION)}")
        if self.bucket_step and self.resolution % self.bucket_step:
            raise ValueError("bucket_step must divide resolution, so that squares stay as they are")
        # Latents of different sizes do not stack to one tensor.
        if self.bucket_step and self.per_device_train_batch_size > 1:
            raise ValueError("with bucket_step pairs differ in size: set per_device_train_batch_size: 1")
        return self

    @model_validator(mode="after")
    def _can_be_sharded_and_saved(self) -> Self:
        if self.fsdp:
            raise ValueError("fsdp does not know a UNet's blocks: shard it with deepspeed")
        if self.deepspeed is not None and self.lora is not None:
            raise ValueError(
                "deepspeed shards a whole UNet: set lora: null, or leave it out, an adapter needs no shards"
            )
        if self.deepspeed is not None and (self.use_ema or self.sample_steps is not None):
            raise ValueError("with deepspeed no rank holds the whole model: leave out use_ema and sample_steps")
        if self.save_merged and self.lora is None:
            raise ValueError("the whole UNet is always saved as a pipeline: leave out save_merged")
        if self.save_dtype != "auto" and self.lora is not None and not self.save_merged:
            raise ValueError("save_dtype is of whole weights, and an adapter is saved in fp32: leave it out")
        return self
