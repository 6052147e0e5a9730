"""The configuration of preference training, under the names TRL's DPOConfig gives its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from prefmill.core.config import ExternalPath, StrictConfig
from prefmill.training.config import TrainingConfig
from prefmill.training.objective_names import OF_TEXT, READ_BY, Need, ObjectiveNames, require_usable


class ObjectiveKeys(StrictConfig):
    """Which objectives of `training.objectives`, and their numbers."""

    supplies: ClassVar[frozenset[Need]] = OF_TEXT

    beta: float = Field(0.1, gt=0, description="strength of the tie to the reference")
    loss_type: ObjectiveNames = Field(["sigmoid"], description="one or several objectives, such as [sigmoid, sft]")
    loss_weights: list[float] = Field([1.0], description="a weight for each of `loss_type`, such as [1.0, 0.05]")
    label_smoothing: float = Field(
        0.0, ge=0, lt=0.5, description="assumed rate of wrong labels, below 0.5 (conservative `sigmoid`, `robust`)"
    )
    simpo_gamma: float = Field(0.5, description="target margin of `simpo`")
    shuffle_labels: bool = Field(False, description="control: swap chosen and rejected at random, by seed and pair")

    @field_validator("loss_type")
    @classmethod
    def _fits_the_family(cls, names: list[str]) -> list[str]:
        return require_usable(names, cls.supplies)

    @model_validator(mode="after")
    def _have_their_numbers(self) -> Self:
        if not self.loss_type or len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_type {self.loss_type} and loss_weights {self.loss_weights}: give one weight for each objective, "
                "such as loss_type: [sigmoid, sft], loss_weights: [1.0, 0.05]"
            )
        if "robust" in self.loss_type and self.label_smoothing == 0:
            raise ValueError("robust needs the rate of wrong labels: set label_smoothing, or take sigmoid")
        return self

    @model_validator(mode="after")
    def _is_read(self) -> Self:
        given = self.changed(*(key for key in READ_BY if key in type(self).model_fields))
        if unread := [key for key in given if READ_BY[key].isdisjoint(self.loss_type)]:
            raise ValueError(f"{', '.join(unread)}: no effect with loss_type {', '.join(self.loss_type)}, leave it out")
        return self


class PreferenceConfig(ObjectiveKeys, TrainingConfig):
    """`effective_batch_size` counts pairs. `shuffle_labels` swaps chosen and rejected by a seeded coin: a control.

    `layout: group` runs a prompt once for all of its responses, `pairwise` once for each side of each pair; both
    compute the same; `auto` is group where the model allows it. `max_tokens_per_microbatch` splits larger groups.
    `ref_name` is another reference than the policy as it starts: a hub name, or a folder, which becomes `ref_folder`
    and whose content counts.
    """

    # Answers are scored through the head itself, which Liger's kernels would replace.
    own_head: ClassVar[bool] = True
    can_quantize: ClassVar[bool] = True

    learning_rate: float = Field(5e-6, gt=0)
    num_train_epochs: int = Field(2, ge=1)
    ld_alpha: float | None = Field(
        None, ge=0, le=1, description="LD-DPO: weight, 0 to 1, of the tokens beyond the other side's length; none: 1"
    )
    layout: Literal["auto", "group", "pairwise"] = Field(
        "auto", description="`group` runs a prompt once, `pairwise` once per side; auto: group where the model allows"
    )
    max_tokens_per_microbatch: int | None = Field(
        None, ge=2, description="split larger groups (`group` only); none: do not"
    )
    ref_name: str | None = Field(
        None, description="hub name or folder of another reference; none: the policy before its first step"
    )
    ref_folder: ExternalPath | None = Field(
        None, description="set from `ref_name` where that is a folder; its content counts"
    )
    ref_revision: str | None = Field(None, description="branch, tag or commit of the reference on the hub")

    @model_validator(mode="before")
    @classmethod
    def _folder_or_name(cls, values: Any) -> Any:
        """A folder's path says nothing of what is in it."""
        if not isinstance(values, dict) or not isinstance(values.get("ref_name"), str):
            return values
        if values.get("ref_folder") is not None:
            raise ValueError("give ref_name or ref_folder, not both")
        name = values["ref_name"]
        # A relative folder without a dot looks like a name on the hub.
        is_path = name.startswith((".", "/", "~")) or Path(name).is_dir()
        return {**values, "ref_name": None, "ref_folder": name} if is_path else values

    @model_validator(mode="after")
    def _group_brings_its_own_attention(self) -> PreferenceConfig:
        if self.layout == "group" and self.attn_implementation is not None:
            raise ValueError("layout: group brings its own attention: leave attn_implementation out")
        if self.layout == "pairwise" and self.max_tokens_per_microbatch is not None:
            raise ValueError("layout: pairwise has rows of one side each: leave max_tokens_per_microbatch out")
        return self
