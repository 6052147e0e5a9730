"""Loading a causal language model and its tokenizer, from a Hugging Face folder or the hub."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import InputError
from prefmill.core.precision import Precision, Quantization, torch_dtype
from prefmill.families.causal.quantized import four_bit, load_whole
from prefmill.families.causal.templates import ChatTemplate
from prefmill.families.causal.vision_parts import auto_class
from prefmill.training.adapter_folder import is_adapter, is_both

if TYPE_CHECKING:
    from datetime import date

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Keys that say which files a model's name stands for, and those that say how it is loaded from them.
ORIGIN = {"revision", "trust_remote_code"}
LOADING = {*ORIGIN, "attn_implementation", "quantization"}
_HUB = "check the name, your network or HF_HOME cache, and access to gated models (`prefmill doctor`)"
# What quantized weights are multiplied by: without it the numbers in the file are not the weights.
_SCALES = re.compile(r"(?i).*(scale|zero|absmax|quant).*")


def load_tokenizer(
    name_or_path: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    template: ChatTemplate | None = None,
    today: date | None = None,
) -> PreTrainedTokenizerBase:
    """The tokenizer of `name_or_path`, with a pad token and a chat template, its own or that of `template`.

    Raises InputError when it is missing, has no chat template (prompts are chats throughout) or one that reads the
    clock where `today` is not given, or has no token to pad rows with.
    """
    from transformers import AutoTokenizer

    require_folder(name_or_path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, revision=revision, trust_remote_code=trust_remote_code)
    except load_errors() as error:
        raise _unloadable("tokenizer", name_or_path, error) from error
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

    A model that also takes images is loaded with its vision part. With `quantization` its linear layers hold 4 bits a
    weight and compute in `precision`; files of 8 or 4 bits are read as whole weights where they can be.
    """
    origin = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = load_config(name_or_path, revision, trust_remote_code)
    attention = attn_implementation or _own_attention(config)
    try:
        model, info = read_weights(
            auto_class(config), name_or_path, config, precision, quantization, attn_implementation=attention, **origin
        )
    except load_errors() as error:
        raise _unloadable("model", name_or_path, error) from error
    require_whole(model, info, name_or_path)
    for module in model.modules() if quantization else ():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On a CPU bitsandbytes would repack weights in eval mode, and could not train on them again (0.50).
            module.support_avx512bf16_for_cpu = False
    say_untied(model)
    loaded: PreTrainedModel = model
    return loaded


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

    require_folder(name)
    try:
        return AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except load_errors() as error:
        raise _unloadable("model", name, error) from error


def read_weights(
    kind: Any, name: str, config: Any, precision: Precision, quantization: Quantization | None, **options: Any
) -> tuple[Any, dict[str, Any]]:
    """The model of `config`, opened by the Auto class `kind`, and its loading info, for `require_whole` to judge."""
    quantized = {} if quantization is None else {"quantization_config": four_bit(precision)}
    load = partial(
        kind.from_pretrained,
        name,
        dtype=torch_dtype(precision),
        use_safetensors=True,  # a pickled checkpoint can run code when it is opened
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # refused by name, with all else that is missing
        **quantized,
        **options,
    )
    return load_whole(load, name, config, precision)


def load_errors() -> tuple[type[Exception], ...]:
    """Errors of a folder that cannot be loaded; cut weights and a config.json at odds with itself are no OSError."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    return OSError, ValueError, ImportError, SafetensorError, StrictDataclassError


@contextlib.contextmanager
def loading(what: str, where: object) -> Iterator[None]:
    """Turn errors of libraries that cannot load `what` into InputError."""
    known: tuple[type[Exception], ...] = (*load_errors(), TypeError, KeyError, AttributeError, RuntimeError)
    try:
        yield
    except known as error:
        got = (str(error).strip() or type(error).__name__).splitlines()[0]
        again = "download it again: a file is missing, damaged, or of another model"
        fix = again if Path(str(where)).exists() else _HUB
        fix = "install that package with pip" if isinstance(error, ImportError) else fix
        raise InputError(f"cannot load {what}", where=where, got=got, fix=fix) from error


def read_whole(loader: Any, name: str, **options: Any) -> Any:
    """The model that `loader` makes of `name`, from safetensors; raises InputError for a weight that it would draw."""
    model, info = loader.from_pretrained(
        name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True, **options
    )
    require_whole(model, info, name)
    return model


def require_vocabulary(tokenizer: Any, name: str) -> None:
    """Raise InputError where every word is unknown: transformers goes on without the files of a vocabulary."""
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(
            "a tokenizer without words", where=name, got=f"{len(tokenizer)} tokens, all of them special",
            expected="tokenizer.json, or the vocabulary's files", fix="copy them from the model that this one began as",
        )  # fmt: skip


def require_whole(model: Any, info: Mapping[str, Any], name: str) -> None:
    """Raise InputError for a weight that the files lack, have in another shape, or have with a scale that is not read.

    transformers puts random numbers in the place of such a weight, says so in a warning, and goes on.
    """
    modules = {key for key, _ in model.named_modules()}
    found = [f"{key}: not in the files" for key in sorted(info["missing_keys"])]
    found += [
        f"{key}: of shape {list(theirs)}, not {list(ours)}" for key, theirs, ours in sorted(info["mismatched_keys"])
    ]
    for key in sorted(info["unexpected_keys"]):
        owner, _, part = key.rpartition(".")
        if owner in modules and _SCALES.fullmatch(part):
            found.append(f"{key}: not read, and the weight means nothing without it")
    if found:
        raise InputError(
            "the files do not hold this model", where=name, got="; ".join(found[:3]) + ("; ..." if found[3:] else ""),
            expected=f"every weight of {type(model).__name__}",
            fix="give the whole model that config.json speaks of, with weights that are not quantized",
        )  # fmt: skip


def _own_attention(config: Any) -> str | None:
    """The attention that a model was trained with where transformers' choice is another; else None."""
    # Its default for Gemma 2 leaves the cap of the scores out.
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def require_folder(name_or_path: str) -> None:
    """Raise InputError for what looks like a path and is no folder: a hub would be asked for it otherwise."""
    # A name on the hub has one slash at most.
    looks_local = name_or_path.startswith((".", "/", "~")) or name_or_path.count("/") > 1
    if Path(name_or_path).is_file():
        raise InputError(
            "a model is a folder, and this is a file", where=name_or_path, fix=f"give {Path(name_or_path).parent}"
        )
    if looks_local and not Path(name_or_path).is_dir():
        raise InputError("no such model folder", where=name_or_path, fix="check the path, or give a hub name")
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
    if is_adapter(Path(name_or_path)):
        raise InputError(
            "this folder has an adapter alone", where=name_or_path, expected="a whole model",
            fix="give the merged model; sft and dpo go on with an adapter, and dpo takes one as its reference",
        )  # fmt: skip


def _unloadable(what: str, name_or_path: str, error: Exception) -> InputError:
    return InputError(
        f"cannot load the {what}",
        where=name_or_path,
        got=" ".join(str(error).split())[:300],
        fix=_fix(name_or_path, error),
    )


def _fix(name_or_path: str, error: Exception) -> str:
    folder = Path(name_or_path)
    if "quantiz" in str(error):
        return "install what reads such weights, or give the model before it was quantized"
    if "does not recognize this architecture" in str(error):
        return "install a transformers that has this kind of model, or give another model"
    if "trust_remote_code" in str(error):
        return "set trust_remote_code=true if you trust that code, or give a model that transformers has itself"
    if not folder.is_dir():
        return _HUB
    other = sorted(file.name for ending in ("safetensors", "bin", "pth", "gguf") for file in folder.glob(f"*.{ending}"))
    if isinstance(error, OSError) and other and not any(folder.glob("model*.safetensors")):
        pickles = ": pickles can run code when they are opened" if other[0].endswith((".bin", ".pth")) else ""
        return f"give it as transformers saves it, in model.safetensors; {other[0]} is not read{pickles}"
    return "check that the folder is whole: config.json, the tokenizer, every file of weights that an index names"
