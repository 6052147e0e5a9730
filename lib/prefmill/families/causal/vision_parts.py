"""The parts of a model that also takes images: which are trained, and what is saved beside text models' files."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import ConfigError
from prefmill.families.causal.chat import state_ends
from prefmill.families.causal.image_limits import FrozenParts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROJECTOR = re.compile(r"project|merger|connector|aligner|adapter|readout|embed_vision|embed_audio")
_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


def auto_class(config: Any) -> Any:
    """The class that opens a model of this configuration: with its vision part where it has one."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    sees = hasattr(config, "vision_config") and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if sees else AutoModelForCausalLM


def freeze(model: Any, parts: FrozenParts, with_images: bool) -> list[str]:
    """Stop the gradients of the parts of `model` that `parts` says; the names of the modules in them, for adapters.

    Raises ConfigError where nothing would be trained.
    """
    if not hasattr(model.config, "vision_config"):
        parts.tell_unread("this model reads text alone", "freeze_vision_tower", "freeze_projector")
        if not parts.freeze_language_model:
            return []
    if with_images:
        require_both_ways(model)
    unseen = not with_images
    frozen = {
        "vision_tower": unseen if parts.freeze_vision_tower is None else parts.freeze_vision_tower,
        "projector": unseen if parts.freeze_projector is None else parts.freeze_projector,
        "language_model": parts.freeze_language_model,
    }
    weights = part_of_weights(model)
    if all(frozen[part] for part in weights.values()):
        raise ConfigError(
            "every part of the model is frozen", where=model.config.model_type,
            got=", ".join(f"freeze_{part}" for part in sorted(set(weights.values()))),
            fix="set freeze_language_model=false, or another of these keys",
        )  # fmt: skip
    for name, weight in model.named_parameters():
        # Only ever turned off: weights in 4 bits are integers, of which torch takes no gradient.
        weight.requires_grad_(weight.requires_grad and not frozen[weights[name]])
    return sorted({name.rpartition(".")[0] for name, part in weights.items() if frozen[part]})


def sees_both_ways(model: Any) -> bool:
    """Whether the tokens of an image are to see each other in `model`, later ones too."""
    text = model.config.get_text_config()
    return model.config.model_type == "gemma3" or getattr(text, "use_bidirectional_attention", None) == "vision"


def require_both_ways(model: Any) -> None:
    """Raise ConfigError for attention that cannot let an image's tokens see each other where the model wants it."""
    attention = str(model.config.get_text_config()._attn_implementation)
    # transformers would run it, and leave the images' part of the mask out.
    if sees_both_ways(model) and "flash" in attention:
        raise ConfigError(
            "this attention shows an image's tokens only those before them", where=model.config.model_type,
            got=attention, fix="set attn_implementation=sdpa for rows with images",
        )  # fmt: skip


def part_of_weights(model: Any) -> dict[str, str]:
    """`vision_tower`, `projector` or `language_model` by the name of every weight.

    The text model and its head are what the model says; what brings images to it goes by the names in use.
    """
    # By identity: a head that is tied to the embeddings has no name of its own.
    text = {id(weight) for part in (decoder_of(model), model.get_output_embeddings()) for weight in part.parameters()}
    return {
        name: "language_model" if id(weight) in text else "projector" if _PROJECTOR.search(name) else "vision_tower"
        for name, weight in model.named_parameters()
    }


def decoder_of(model: Any) -> Any:
    """The text model that returns hidden states; of a model with a vision part, the part that reads its embeddings."""
    from transformers import PreTrainedModel

    found = model.get_decoder()  # a guess by attribute names: ModernBERT's is its output projection, Llama 4's itself
    return found if isinstance(found, PreTrainedModel) and found is not model else model.model


class KeptProcessor:
    """The tokenizer of a checkpoint with a vision part, saved with the checkpoint's own files for images."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, name: str, revision: str | None) -> None:
        self._tokenizer, self._name, self._revision = tokenizer, name, revision

    def save_pretrained(self, folder: Path | str) -> None:
        """Write tokenizer and files."""
        from transformers.utils.hub import cached_file

        self._tokenizer.save_pretrained(folder)
        state_ends(Path(folder), self._tokenizer)
        for leaf in _FILES:
            # Checkpoints have some of these files; without this a missing one raises.
            options: Any = {"revision": self._revision, "_raise_exceptions_for_missing_entries": False}
            if found := cached_file(self._name, leaf, **options):
                shutil.copyfile(found, Path(folder) / leaf)
