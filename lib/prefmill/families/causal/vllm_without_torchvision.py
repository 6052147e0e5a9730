"""vLLM's Qwen vision-language models where torchvision is not installed, as beside a CPU build of torch.

vLLM needs it in two places only: it imports `smart_resize` from a module that imports torchvision (and looks at
models in a new process, out of our reach), and it loads a processor with a video half.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

from transformers import AutoConfig
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

from prefmill.families.causal.processing import ImageTextProcessor

_WRITING = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}  # whose module in vLLM has the form that this replaces


def options_without_torchvision(name_or_path: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What to tell vLLM of the model `name_or_path`, and its class registered with a processor for images alone.

    Nothing of a model that is none of `_WRITING`. The PIL form of the image processor's module stands in for
    the torchvision form: `smart_resize` is the same.
    """
    from vllm import ModelRegistry

    config = AutoConfig.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    if config.model_type not in _WRITING:
        return {}
    # Before vLLM's module, which imports `smart_resize` from there at its top.
    sys.modules.setdefault("transformers.models.qwen2_vl.image_processing_qwen2_vl", image_processing_pil_qwen2_vl)
    module = importlib.import_module(f"vllm.model_executor.models.{config.model_type}")
    architecture: str = config.architectures[0]
    info = getattr(module, f"{architecture.removesuffix('ForConditionalGeneration')}ProcessingInfo")
    info.get_hf_processor = _processor
    info.get_supported_mm_processor_kwargs = _supported_arguments
    info.get_max_video_tokens = lambda self, seq_len, mm_counts: 0
    ModelRegistry.register_model(architecture, getattr(module, architecture))  # a class is looked at in this process
    return {"limit_mm_per_prompt": {"video": 0}}


def _processor(info: Any, **options: Any) -> ImageTextProcessor:
    config = info.ctx.model_config
    processor: ImageTextProcessor = ImageTextProcessor.from_pretrained(config.model, revision=config.revision)
    return processor


def _supported_arguments(info: Any) -> dict[str, set[str]]:
    images = set(info.get_hf_processor().image_processor.valid_kwargs.__annotations__)
    return {"text_kwargs": set(), "images_kwargs": images, "videos_kwargs": set()}
