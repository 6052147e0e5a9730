"""The configuration of masked-diffusion training, under the names that users of this field know."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from prefmill.core.config import ExternalPath, later, runtime
from prefmill.core.precision import Quantization
from prefmill.families.causal.templates import ChatTemplate
from prefmill.training.config import TrainingConfig
from prefmill.training.objective_names import OF_TEXT, Need
from prefmill.training.preference_config import ObjectiveKeys

Sampling = Literal["balanced", "systematic", "iid", "inverse_t"]


class DiffusionModelConfig(ChatTemplate):
    """Which masked-diffusion model, and how its outputs are read.

    `mask_token_id` defaults to that of the model's configuration or tokenizer, `shifted_logits` to true for Dream only.
    """

    mask_token_id: int | None = Field(None, ge=0, description="the model's mask token; none: read from the model")
    shifted_logits: bool | None = Field(
        None, description="whether the output at a position is for the next token; none: read from the model"
    )
    quantization: Quantization | None = Field(None, description="`4bit`: an NF4 base (needs bitsandbytes and `lora`)")
    block_length: int | None = later(
        None, formerly="score_block_tokens", ge=1,
        description="tokens of a block, for block-diffusion models (SDAR: 4); none: the model's (LLaDA2: 32), or whole",
    )  # fmt: skip


class DiffusionTrainingConfig(TrainingConfig, DiffusionModelConfig):
    """Keys of mdlm_sft and mdlm_dpo.

    Three keys are other names of TrainingConfig's: `use_mixed_precision` of `precision` (bf16 or fp32),
    `gradient_checkpointing` of `activation_checkpointing`, and `gradient_accumulation_steps`, which times
    `per_device_train_batch_size` is `effective_batch_size`: what one GPU would take, however many there are.
    Answers are filled with end tokens up to a multiple of `answer_block_tokens`.
    `diffusion_steps` counts the draws of a row, `auto` follows the live variance up to `max_diffusion_steps`.
    """

    own_head: ClassVar[bool] = True
    can_quantize: ClassVar[bool] = True
    OTHER_NAMES: ClassVar[dict[str, str]] = {  # shown by --help; `_other_names` converts their values
        "use_mixed_precision": "precision",
        "gradient_accumulation_steps": "effective_batch_size",
        "preference_data_path": "dataset",
    }

    # In the identity at its default too, as it was before other stages had the key.
    quantization: Quantization | None = Field(None, description="`4bit`: an NF4 base (needs bitsandbytes and `lora`)")
    num_train_epochs: int = Field(3, ge=1)
    diffusion_steps: int | Literal["auto"] = Field(
        20, description="masks drawn per row, or auto: as many as `variance_tolerance` needs"
    )
    max_diffusion_steps: int = Field(32, ge=2, description="most masks per row where `diffusion_steps` is auto")
    variance_tolerance: float = Field(0.05, gt=0, description="share of the loss's variance that the draws may add")
    sampling: Sampling = Field(
        "balanced", description="how masks are drawn: `balanced`, `systematic`, `iid` (VRPO) or `inverse_t` (1/t)"
    )
    answer_block_tokens: int = later(1, ge=1, description="answers are filled with end tokens to a multiple of this")
    forward_batch_size: int = runtime(
        8, formerly="rows_at_once", ge=1, description="masked rows per forward pass; results do not depend on it"
    )

    logging_steps: int = runtime(50, ge=1)
    output_dir: ExternalPath | None = runtime(
        None, description="a folder of yours that gets a copy of the finished model"
    )
    resume_from_checkpoint: bool | ExternalPath = runtime(
        True, description="none: the newest complete one; false: start anew; or a trainer's checkpoint-N folder"
    )

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, values: Any) -> Any:
        """What this field's users write, as TrainingConfig calls it."""
        if not isinstance(values, dict):
            return values
        # A copy: the mapping may be the caller's own, to be read again.
        values = dict(values)
        _rename(values, "gradient_checkpointing", "activation_checkpointing", lambda value: value)
        _rename(values, "use_mixed_precision", "precision", lambda value: "bf16" if value is True else "fp32")
        at_once = values.get("per_device_train_batch_size", 1)

        def batch(steps: Any) -> Any:
            # What is no number is refused by itself.
            return steps * at_once if isinstance(steps, int) and isinstance(at_once, int) else steps

        _rename(values, "gradient_accumulation_steps", "effective_batch_size", batch)
        return values

    @model_validator(mode="after")
    def _halving_draws(self) -> Self:
        if self.diffusion_steps != "auto" and self.diffusion_steps < 1:
            raise ValueError("diffusion_steps is a number from 1 on, or auto")
        if self.diffusion_steps != "auto" and self.changed("max_diffusion_steps"):
            raise ValueError("max_diffusion_steps is of diffusion_steps: auto, leave it out")
        if self.diffusion_steps == "auto" and self.max_diffusion_steps & (self.max_diffusion_steps - 1):
            raise ValueError("max_diffusion_steps must be a power of two: auto halves and doubles the draws")
        if self.torch_compile:  # it would end in a traceback at the first step
            raise ValueError("torch_compile cannot follow how masked tokens alone are projected: leave it out")
        return self

    @property
    def num_draws(self) -> int:
        """Draws that are made of every row; with `auto` the first of them are used."""
        return self.max_diffusion_steps if self.diffusion_steps == "auto" else self.diffusion_steps


class DiffusionSftConfig(DiffusionTrainingConfig):
    """Keys of mdlm_sft."""

    learning_rate: float = Field(1e-5, gt=0)
    # One will do: this loss is linear in the draws, so their noise averages out over rows.
    # That of preferences is not, and noise within a pair biases it (VRPO, arXiv 2505.19223).
    diffusion_steps: int = Field(1, ge=1)
    # Without a fill a model trained row by row learns no end: docs/decisions/0139.
    answer_block_tokens: int = Field(32, ge=1)

    @model_validator(mode="after")
    def _needs_no_more_draws(self) -> Self:
        if self.changed("variance_tolerance"):
            raise ValueError("variance_tolerance is of mdlm_dpo: this loss is linear in the draws, leave it out")
        return self


class DiffusionPreferenceConfig(ObjectiveKeys, DiffusionTrainingConfig):
    """Keys of mdlm_dpo, those of preference training among them."""

    supplies: ClassVar[frozenset[Need]] = OF_TEXT | {"bounds"}

    learning_rate: float = Field(5e-6, gt=0)
    upper_power: float = later(1.5, gt=0, description="of `spg`: the power of its upper bound; larger is looser")
    upper_weight: float = later(0.5, ge=0, le=1, description="of `spg`: share of the upper bound for the rejected side")
    clip: float = later(0.2, gt=0, lt=1, description="of `espo`: how far a ratio per token may go from 1")

    @model_validator(mode="after")
    def _bounds_of_the_same_draws(self) -> Self:
        if "spg" in self.loss_type and self.diffusion_steps == "auto":
            raise ValueError("spg bounds both sides from all draws: set diffusion_steps to a number, such as 20")
        return self


def _rename(values: dict[str, Any], alias: str, name: str, convert: Any) -> None:
    if alias not in values:
        return
    if name in values:
        raise ValueError(f"{alias} is another name of {name}: give one of them")
    values[name] = convert(values.pop(alias))
