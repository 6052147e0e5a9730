"""Configurations that are read from, and written back as, the form their model was published in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefmill.core.errors import InputError

# What a training was told of a model's outputs: written beside the published keys, for the next stage to read.
READING = ("shifted_logits", "mask_token_id", "block_length")
# Of an adapter beside its weights: by the name config.json transformers would look for a whole model there.
TOLD = "masked_diffusion.json"


def require_fixed(published: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """Raise InputError where a key asks for what transformers' module does not do: it is not read as something else."""
    for key, expected in fixed.items():
        if published.get(key, expected) != expected:
            raise InputError(
                "this model is built in another way than the published ones", where="config.json",
                got=f"{key}: {published[key]}", expected=f"{key}: {expected}",
                fix="load it by its own code: trust_remote_code=true and a pinned revision",
            )  # fmt: skip


class AsPublished:
    """A configuration read from, and written back as, the form its model was published in."""

    published: dict[str, Any]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The configuration of a published config.json; raises InputError for what the module cannot do."""
        read: Any = super().from_dict(cls.translate(config_dict), **kwargs)  # type: ignore[misc]
        config = read[0] if isinstance(read, tuple) else read
        # Masks are built in transformers by `is_causal` of the configuration, with no change to the model's code.
        config.is_causal, config.published = False, dict(config_dict)
        for key in READING:
            if config_dict.get(key) is not None:
                setattr(config, key, config_dict[key])
        return read

    def to_diff_dict(self) -> dict[str, Any]:
        """What save_pretrained writes: the published keys as they were, the weights' dtype, how outputs are read."""
        mine: dict[str, Any] = super().to_diff_dict()  # type: ignore[misc]
        if not hasattr(self, "published"):
            return mine
        known = ("dtype", "transformers_version", "quantization_config", *READING)
        # A quantization that has been multiplied out is no longer said.
        said = {key: value for key, value in self.published.items() if key != "quantization_config"}
        return {**said, **{key: mine[key] for key in known if key in mine}}

    def to_dict(self) -> dict[str, Any]:
        """The keys of transformers' own class."""
        return {key: value for key, value in super().to_dict().items() if key != "published"}  # type: ignore[misc]

    @classmethod
    def translate(cls, published: Mapping[str, Any]) -> dict[str, Any]:
        """The same configuration in the words of transformers' class."""
        return dict(published)
