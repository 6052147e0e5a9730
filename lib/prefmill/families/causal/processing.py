"""Loading the processor of a vision-language model, with or without torchvision."""

from __future__ import annotations

from typing import Any

from transformers import AutoProcessor, Qwen2_5_VLProcessor
from transformers.utils import is_torchvision_available

from prefmill.core.errors import InputError


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video half, the only part of it that needs torchvision.

    transformers finds the parts of a processor by the arguments of its constructor.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


def load_processor(name_or_path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The processor of the vision-language model `name_or_path`.

    Without torchvision only Qwen2-VL and Qwen2.5-VL can be loaded, for images; raises InputError for any other.
    """
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        if is_torchvision_available():
            return AutoProcessor.from_pretrained(name_or_path, **options)
        # A class that is named does not look at the model's type: any other would be opened as if it were Qwen's.
        _require_qwen2_vl(name_or_path, options)
        return ImageTextProcessor.from_pretrained(name_or_path, **options)
    except (OSError, ValueError) as error:
        raise InputError(
            "cannot load the processor", where=name_or_path, got=str(error).splitlines()[0],
            fix="check the name, your network or HF_HOME cache, and access to gated models (`prefmill doctor`)",
        ) from error  # fmt: skip


def _require_qwen2_vl(name_or_path: str, options: dict[str, Any]) -> None:
    from transformers import AutoConfig

    model_type = AutoConfig.from_pretrained(name_or_path, **options).model_type
    if model_type not in {"qwen2_vl", "qwen2_5_vl"}:
        raise InputError(
            "this model's processor needs torchvision", where=name_or_path, got=f"model type {model_type}",
            expected="qwen2_vl or qwen2_5_vl", fix="install the torchvision that fits your torch",
        )  # fmt: skip
