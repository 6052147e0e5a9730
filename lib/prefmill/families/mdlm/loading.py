"""Loading masked-diffusion language models, and checking by the model itself that it is one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import ConfigError, InputError
from prefmill.core.precision import Precision, Quantization
from prefmill.families.causal.loading import load_config, load_tokenizer, loading, merged, model_parts, read_weights
from prefmill.families.causal.whole import require_whole
from prefmill.families.mdlm.as_published import READING, TOLD

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_remote_code(trust: bool, name: str, revision: str | None) -> None:
    """Code from the hub runs only when the configuration says so, and only a pinned revision of it.

    Raises ConfigError for a hub name without a revision; a local folder is pinned by being there.
    """
    if trust and revision is None and not Path(name).is_dir():
        raise ConfigError(
            "trust_remote_code needs a pinned revision", where=name, got="revision=null",
            expected="the commit of the model repository that you have read",
            fix="set revision to that commit's 40 hexadecimal digits",
        )  # fmt: skip


def load_diffusion_tokenizer(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False, **options: Any
) -> PreTrainedTokenizerBase:
    """As `load_tokenizer`; raises InputError for a tokenizer without an end token too."""
    check_remote_code(trust_remote_code, name, revision)
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code, **options)
    if tokenizer.eos_token_id is None:
        raise InputError(
            "the tokenizer has no end token, with which answers are filled up", where=name, fix="set its eos_token"
        )
    return tokenizer


def load_diffusion_model(
    name: str,
    *,
    precision: Precision,
    revision: str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    quantization: Quantization | None = None,
    run: bool = True,
) -> PreTrainedModel:
    """The model of `name`, its dropout off; raises InputError for one that attends to what comes before only.

    Unless `run`: then its weights stay in their mapped files, unread, until ranks have shared them.

    The models of `native` need no code of their own; others run theirs where `trust_remote_code` says so, and are then
    checked for weights and buffers that nothing has set.
    """
    from prefmill.families.causal.load_check import turn_off_dropout

    base, revision, adapter = model_parts(name, revision)
    check_remote_code(trust_remote_code, base, revision)
    read: tuple[Precision, Any] = ("fp32", None) if adapter else (precision, quantization)
    model = _load(base, read[0], revision, trust_remote_code, attn_implementation, read[1], run)
    model = merged(model, adapter, precision, quantization) if adapter else model
    record_reading(model.config, reading_of(adapter))
    turn_off_dropout(model)
    if run:
        require_both_ways(model, name)
    return model


def require_both_ways(model: Any, name: str) -> None:
    """Raise InputError where a later token changes no earlier output: tried on eight tokens, so no list is needed."""
    import torch

    device = next(model.parameters()).device
    ids = torch.arange(8, device=device)[None] % model.get_input_embeddings().num_embeddings
    other = ids.clone()
    other[0, -1] = ids[0, 0]
    with torch.no_grad():
        one, two = (model(input_ids=rows, use_cache=False).logits[0, :-1].float() for rows in (ids, other))
    if torch.equal(one, two):  # to the bit: a causal mask gives later tokens a weight of exactly 0
        raise InputError(
            "this model attends to earlier tokens only", where=name, got=f"model_type {model.config.model_type}",
            expected="a masked-diffusion model: a later token changes what is predicted at an earlier place",
            fix="give a model trained with masks; a causal architecture as one has is_causal=false in config.json",
        )  # fmt: skip


def mask_token_of(model: Any, tokenizer: Any, given: int | None = None) -> int:
    """The id of the mask token: given, of the model's configuration, or of the tokenizer; raises InputError without."""
    stated = getattr(model.config, "mask_token_id", None)
    mask = next((value for value in (given, stated, tokenizer.mask_token_id) if value is not None), None)
    if mask is None:
        raise InputError(
            "the model has no mask token", where=getattr(model.config, "name_or_path", None) or model.config.model_type,
            fix="set mask_token_id (LLaDA-8B: 126336)",
        )  # fmt: skip
    size = model.get_input_embeddings().num_embeddings
    if not 0 <= mask < size:
        raise InputError(
            "the mask token is not in the model's vocabulary", got=f"mask_token_id {mask}", expected=f"0 to {size - 1}",
            fix="set mask_token_id to the id that the model was trained with (LLaDA-8B: 126336)",
        )  # fmt: skip
    # Another token's id would train without a fault to see: the model has not learnt to fill it in.
    if stated not in (None, mask) or is_text(tokenizer, mask):
        raise InputError(
            "this is not the token that the model was trained with as its mask", got=f"mask_token_id {mask}",
            expected=f"{stated}, as config.json says" if stated is not None else "a special token",
            fix="leave mask_token_id out" if stated is not None else "set mask_token_id to the tokenizer's mask token",
        )  # fmt: skip
    return int(mask)


def is_text(tokenizer: Any, token: int) -> bool:
    """Whether the tokenizer writes `token` for text, rather than as a special token or not at all."""
    words: dict[str, int] = getattr(tokenizer, "get_vocab", dict)()
    return token in words.values() and token not in {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}


def predicts_next(model: Any, given: bool | None = None) -> bool:
    """Whether the output at a place is for the token after it: given, as a finished folder says, or Dream's."""
    from prefmill.families.mdlm.native import SHIFTED

    if given is not None:
        return given
    return bool(getattr(model.config, "shifted_logits", model.config.model_type in SHIFTED))


def record_reading(config: Any, given: Mapping[str, Any]) -> None:
    """Have a model's configuration say how its outputs are read, where `given` says it otherwise than the model does.

    Whoever loads the finished folder would else read it in another way than it was trained, with nothing to see.
    """
    for key in READING:
        if given.get(key) not in (None, getattr(config, key, None)):
            setattr(config, key, given[key])


def reading_of(adapter: Path | None) -> dict[str, Any]:
    """What the training of an adapter was told of outputs, or its base says: in a file beside its weights."""
    if adapter is None or not (file := adapter / TOLD).is_file():
        return {}
    with loading(file.name, adapter):
        said = json.loads(file.read_text("utf-8"))
        return {key: said[key] for key in READING if said.get(key) is not None}


def block_length_of(config: Any, given: int | None, attention: str | None) -> int | None:
    """Tokens of the blocks that a model writes: given, or its configuration's; None where it sees the whole text.

    Raises ConfigError for attention that takes no mask of blocks, or fails on it (flex_attention).
    """
    found: int | None = given or getattr(config, "block_length", None)
    if found is not None and attention not in (None, "sdpa", "eager"):
        raise ConfigError(
            "this attention cannot see block by block", where="attn_implementation", got=attention,
            expected="sdpa or eager", fix="leave attn_implementation out",
        )  # fmt: skip
    return found


def _load(
    name: str, precision: Precision, revision: str | None, trust: bool, attention: str | None,
    quantization: Quantization | None, read: bool,
) -> Any:  # fmt: skip
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    config = read_config(name, revision, trust)
    # BERT, ModernBERT and EuroBERT fill masks by a head of their own; Dream's kin are under AutoModel only.
    known = getattr(config, "auto_map", None) or {}
    is_causal = type(config) in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in known or not known
    auto = AutoModelForCausalLM if is_causal else AutoModel
    auto = AutoModelForMaskedLM if type(config) in AutoModelForMaskedLM._model_mapping else auto
    origin = {"revision": revision, "trust_remote_code": trust}
    with uninitialised_is_nan():
        model, info = read_weights(auto, name, config, precision, quantization, attn_implementation=attention, **origin)
    _check_complete(model, info, name, read)
    return model


def read_config(name: str, revision: str | None, trust: bool) -> Any:
    """The configuration of a model, as an adapter on it has it; raises InputError where there is none to read."""
    from prefmill.families.mdlm import native  # noqa: F401 - the Auto classes know LLaDA and Dream from here on

    config = load_config(name, revision, trust)
    record_reading(config, reading_of(model_parts(name, revision)[2]))
    return config


@contextmanager
def uninitialised_is_nan() -> Iterator[None]:
    """Within, memory that is reserved and never written holds NaN: torch fills it where algorithms are deterministic.

    transformers builds models without memory first; a buffer that its code does not compute again is left as garbage.
    """
    import torch

    filling: Any = torch.utils.deterministic
    enabled = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    filling.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=only_warns)
        filling.fill_uninitialized_memory = fills


def _check_complete(model: Any, info: Mapping[str, Any], name: str, read: bool) -> None:
    """Raise InputError as `require_whole`, and for a weight or buffer that holds no number."""
    require_whole(model, info, name)
    # To look at a weight in a mapped file would read it, on every rank.
    tensors = [*(model.named_parameters() if read else ()), *model.named_buffers()]
    unset = [key for key, value in tensors if value.is_floating_point() and value.isnan().any()]
    if unset:
        raise InputError(
            "the model is not whole after loading", where=name, got=", ".join(unset[:5]),
            expected="every weight in its files, every buffer computed",
            fix="its code does not run on this transformers: give a model named in docs/stages/mdlm_sft.md",
        )  # fmt: skip
