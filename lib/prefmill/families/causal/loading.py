"""Loading a causal language model and its tokenizer, from a Hugging Face folder or the hub."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import InputError
from prefmill.core.places import looks_local
from prefmill.core.precision import Precision, Quantization, torch_dtype
from prefmill.core.revisions import hub_file, snapshot
from prefmill.families.causal.quantized import four_bit, load_whole, require_trainable, unquantized
from prefmill.families.causal.templates import ChatTemplate
from prefmill.families.causal.vision_parts import auto_class
from prefmill.families.causal.whole import WHOLE, require_one_of_each, require_vocabulary, require_whole, require_writer
from prefmill.training.adapter import merge_adapter, put_on
from prefmill.training.adapter_folder import is_both, lora_of, stated_template, template_of, whole_model

if TYPE_CHECKING:
    from datetime import date

    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Keys that say which files a model's name stands for, and those that say how it is loaded from them.
ORIGIN = {"revision", "trust_remote_code"}
LOADING = {*ORIGIN, "attn_implementation", "quantization"}
_HUB = "check the name, your network or HF_HOME cache, and access to gated models (`prefmill doctor`)"
_SAMPLING = {
    "temperature": (0, 1e9), "repetition_penalty": (0, 1e9), "num_beams": (1, 1e9), "top_k": (-1, 1e9),
    "top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1), "do_sample": (False, True),
}  # fmt: skip


def load_tokenizer(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: ChatTemplate | None = None,
    today: date | None = None,
    adapter: Path | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of `name_or_path`, with a pad token and a chat template, its own or that of `template`.

    Raises InputError when it is missing, has no words, no chat template (prompts are chats throughout) or one that
    reads the clock where `today` is not given, or has no token to pad rows with. Of an adapter, also of one to
    go on with upon `name_or_path`, it is its base's, with the adapter's own template.
    """
    from transformers import AutoTokenizer

    name_or_path, revision, own_adapter = model_parts(name_or_path, revision)
    with loading("the tokenizer", name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    require_vocabulary(tokenizer, name_or_path)
    if tokenizer.chat_template is None:  # LLaVA's folders have it where processors alone look
        said = hub_file(name_or_path, file := "chat_template.json", revision)
        with loading(file, name_or_path):
            tokenizer.chat_template = stated_template(Path(said)) if said else None
    adapter = adapter or own_adapter
    if adapter is not None:
        _require_same_tokens(tokenizer, adapter)
        tokenizer.chat_template = template_of(adapter) or tokenizer.chat_template
    (template or ChatTemplate()).put_on(tokenizer, name_or_path, today)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                "the tokenizer has neither a pad nor an end token", where=name_or_path,
                got="pad_token and eos_token unset", fix="set them in the folder's tokenizer_config.json",
            )  # fmt: skip
        # Masks and labels say what is padding, the token never does: the end token may stand for it.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name_or_path: str,
    *,
    precision: Precision,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
) -> PreTrainedModel:
    """The causal LM of `name_or_path` in `precision`, from safetensors only.

    Raises InputError when it cannot load, or not as a whole.

    A model that also takes images is loaded with its vision part, an adapter merged into its base. With `quantization`
    its linear layers hold 4 bits a weight and compute in `precision`; files of 8 or 4 bits are read as whole weights
    where they can be.
    """
    base, revision, adapter = model_parts(name_or_path, revision)
    origin: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if adapter is not None:
        model = load_model(base, precision="fp32", attn_implementation=attn_implementation, **origin)
        return merged(model, adapter, precision, quantization)
    config = load_config(name_or_path, revision, trust_remote_code)
    require_writer(name_or_path, config)
    # transformers' choice for Gemma 2 leaves the cap of the scores out.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None)
    attention = attn_implementation or ("eager" if capped else None)
    model, info = read_weights(
        auto_class(config), name_or_path, config, precision, quantization, attn_implementation=attention, **origin
    )
    require_whole(model, info, name_or_path)
    for module in model.modules() if quantization else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU bitsandbytes would repack weights in eval mode, and could not train on them again (0.50).
            module.support_avx512bf16_for_cpu = False
    say_untied(model)
    return model


def model_parts(name: str, revision: str | None) -> tuple[str, str | None, Path | None]:
    """The whole model behind `name`, its revision and the adapter on it; InputError for one that is not merged here."""
    require_folder(name)
    try:
        base, revision, adapter = whole_model(name, revision)
        if adapter is not None:
            lora_of(adapter)
    except ValueError as error:
        raise InputError(
            "this adapter cannot be loaded on its base", where=name, got=error, expected="plain LoRA, its base here",
            fix="write where the base is into its adapter_config.json as base_model_name_or_path, or give the merged "
            "model: of a training of prefmill the folder above `adapter`",
        ) from None  # fmt: skip
    if adapter is None and _is_to_be_fetched(name, revision):
        raise InputError(
            "an adapter on the hub whose files are not here", where=name, got="adapter_config.json and no config.json",
            expected="a whole model, or an adapter in a folder or in the hub's cache",
            fix=f"run `hf download {name}{f' --revision {revision}' if revision else ''}` first",
        )  # fmt: skip
    return base, revision, adapter


def _is_to_be_fetched(name: str, revision: str | None) -> bool:
    """Whether `name` is an adapter of the hub that is not in its cache: a training would have gone on from it."""
    cached = snapshot(name, revision)
    if cached is None or (cached / "config.json").is_file():
        return False
    try:
        return hub_file(name, "adapter_config.json", revision) is not None
    except OSError:  # no such repository, or a closed one: loading says so
        return False


def merged(model: Any, adapter: Path, precision: Precision, quantization: Quantization | None) -> Any:
    """`model`, in fp32, with `adapter` merged, then in `precision`: merged in 16 bits much of it would round away."""
    require_trainable(str(adapter), model.config, None)
    if quantization is not None:
        raise InputError(
            "an adapter is merged into whole weights", where=adapter, got=f"quantization={quantization}",
            fix="leave quantization out",
        )  # fmt: skip
    whole = merge_adapter(put_on(model, adapter))
    return whole if precision == "fp32" else unquantized(whole, precision)


def say_untied(model: Any) -> None:
    """Have the configuration of `model` say that its head is its own where that is so.

    Of files that hold a head too, transformers reads it whatever `tie_word_embeddings` says; others do not.
    """
    head = getattr(model.get_output_embeddings(), "weight", None)
    ties = getattr(model.config, "tie_word_embeddings", False) and model._tied_weights_keys  # mllama's says nothing
    if head is not None and ties and head is not model.get_input_embeddings().weight:
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False


def load_config(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The configuration of the model `name`; raises InputError where transformers finds none that it knows."""
    from transformers import AutoConfig

    name, revision, _ = model_parts(name, revision)
    with loading("the model", name):
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    config.dtype = None  # what is stated, as of 8 bits, is no matter: weights are read in a precision of their own
    return config


def stated_generation(name: str, revision: str | None) -> GenerationConfig | None:
    """What the generation_config.json of `name` says, None without one; raises InputError for one without sense.

    transformers passes over a file that it cannot read, and the ends of answers that it states with it.
    """
    from transformers import GenerationConfig

    name, revision, _ = model_parts(name, revision)
    file = "generation_config.json"
    if hub_file(name, file, revision) is None:
        return None
    with loading(file, name):
        stated = GenerationConfig.from_pretrained(name, revision=revision)
        ends = stated.eos_token_id
        if not all(isinstance(end, int | None) for end in (ends if isinstance(ends, list) else [ends])):
            raise ValueError(f"the end of an answer, {ends!r}, is no token's number")
        for key, (least, most) in _SAMPLING.items():
            value = getattr(stated, key, None)
            if value is not None and not (isinstance(value, int | float) and least <= value <= most):  # NaN is not
                raise ValueError(f"{key} is {value!r}, expected {least} to {most}")
    return stated


def read_weights(
    kind: Any, name: str, config: Any, precision: Precision, quantization: Quantization | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The model of `config`, opened by the Auto class `kind`, and its loading info, for `require_whole` to judge."""
    stated_generation(name, options.get("revision"))
    quantized = {} if quantization is None else {"quantization_config": four_bit(precision)}
    load = partial(kind.from_pretrained, name, dtype=torch_dtype(precision), **WHOLE, **quantized, **options)
    with loading("the model", name):
        require_one_of_each(Path(name))
        return load_whole(load, name, config, precision)


@contextlib.contextmanager
def loading(what: str, where: object) -> Iterator[None]:
    """Turn errors of libraries that cannot load `what` into InputError; want of memory stays what it is."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError
    from torch import OutOfMemoryError

    known = (OSError, ValueError, ImportError, SafetensorError, StrictDataclassError)
    # Of a file with other things in it than are looked for.
    odd = (TypeError, LookupError, AttributeError, RuntimeError)
    try:
        yield
    except (*known, *odd) as error:
        if isinstance(error, OutOfMemoryError) or "allocate memory" in str(error):
            raise
        said = " ".join(str(error).split())[:300]
        got = said if isinstance(error, known) and said else f"{type(error).__name__}: {said}"
        raise InputError(f"cannot load {what}", where=where, got=got, fix=_fix(Path(str(where)), error)) from error


def _require_same_tokens(tokenizer: Any, adapter: Path) -> None:
    """Raise InputError for an adapter that was trained with tokens that its base's `tokenizer` does not have."""
    from transformers import AutoTokenizer

    if not (adapter / "tokenizer_config.json").is_file():
        return
    with loading("the adapter's tokenizer", adapter):
        theirs = AutoTokenizer.from_pretrained(adapter).get_vocab()
    mine = tokenizer.get_vocab()
    if other := sorted(token for token, number in theirs.items() if mine.get(token) != number):
        raise InputError(
            "the adapter was trained with other tokens than its base's", where=adapter, got=", ".join(other[:5]),
            fix="give the model with the adapter merged and those tokens in it",
        )  # fmt: skip


def _refuse_outer(folder: Path) -> None:
    """Raise InputError for a folder around models, as of a hub's cache or of a stage's tasks."""
    inside = sorted(path.parent for form in ("[!.]*", "snapshots/*") for path in folder.glob(f"{form}/config.json"))
    if inside and not any(folder.glob("*.json")):
        raise InputError(
            "no model is in this folder itself, but in folders inside it", where=folder,
            expected="the folder with its config.json", fix=f"give {' or '.join(map(str, inside[:3]))}",
        )  # fmt: skip


def require_folder(name_or_path: str) -> None:
    """Raise InputError for what looks like a path and is no folder: a hub would be asked for it otherwise."""
    if Path(name_or_path).is_file():
        raise InputError(
            "a model is a folder, and this is a file", where=name_or_path, fix=f"give {Path(name_or_path).parent}"
        )
    if looks_local(name_or_path) and not Path(name_or_path).is_dir():
        raise InputError("no such model folder", where=name_or_path, fix="check the path, or give a hub name")
    _refuse_outer(Path(name_or_path))
    ours = ("model_index.json", "pytorch_lora_weights.safetensors")  # of diffusers
    if pictures := [name for name in ours if Path(name_or_path, name).is_file()]:
        raise InputError(
            "a model that makes pictures, not text", where=name_or_path, got=pictures[0],
            expected="a language model's folder, with its config.json",
            fix="give that; this one is for sdxl_dpo, generate_images and evaluate_images",
        )  # fmt: skip
    if is_both(Path(name_or_path)):
        raise InputError(
            "this folder has a whole model and an adapter", where=name_or_path, got="adapter_config.json too",
            expected="one of them", fix="move the adapter into a folder of its own, and give the one you mean",
        )  # fmt: skip


def _fix(folder: Path, error: Exception) -> str:
    if "quantiz" in str(error):
        return "install what reads such weights, or give the model before it was quantized"
    if "attn_implementation" in str(error) or "FlashAttention" in str(error):
        return "leave attn_implementation out, or set sdpa"
    if isinstance(error, ImportError):
        return "install that package with pip"
    if "does not recognize this architecture" in str(error):
        return "install a transformers that has this kind of model, or give another model"
    if "trust_remote_code" in str(error):
        return "set trust_remote_code=true if you trust that code, or give a model that transformers has itself"
    if not folder.exists():
        return _HUB
    if broken := next((file.name for file in sorted(folder.glob("*.json")) if not _is_object(file)), None):
        return f"download {broken} again, or correct it: it holds no JSON object"
    other = sorted(file.name for ending in ("safetensors", "bin", "pth", "gguf") for file in folder.glob(f"*.{ending}"))
    if isinstance(error, OSError) and other and not any(folder.glob("model*.safetensors")):
        pickles = ": pickles can run code when they are opened" if other[0].endswith((".bin", ".pth")) else ""
        return f"give it as transformers saves it, in model.safetensors; {other[0]} is not read{pickles}"
    return "check that the folder is whole, and download it again: a file is missing, damaged, or of another model"


def _is_object(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text("utf-8")), dict)
    except ValueError:
        return False
