"""The low-rank adapter of a training: put on, merged, and published in PEFT's own format."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import ConfigError, InputError
from prefmill.core.files import write_json
from prefmill.core.stage import Task
from prefmill.training.adapter_folder import PEFT_WEIGHTS
from prefmill.training.config import TrainingConfig
from prefmill.training.finished import require_finite
from prefmill.training.reference import weights_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "adapter"  # its folder in the artifact


def add_adapter(model: PreTrainedModel, config: TrainingConfig, frozen: Sequence[str] = ()) -> Any:
    """`model` with the adapter that `config.lora` asks for, none on the modules called `frozen`; or unchanged."""
    if config.lora is None:
        return model
    if Path(str(model.config._name_or_path)).is_dir():
        model.config._name_or_path = model.name_or_path = ""  # checkpoints would name a folder of this machine
    if config.lora.start is not None:
        return put_on(model, config.lora.start, trainable=True)
    task = "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None  # which encoders (BERT) have not
    return new_adapter(model, config, task_type=task, exclude_modules=[*frozen, *_more_than_linear(model)] or None)


def _more_than_linear(model: PreTrainedModel) -> list[str]:
    """Layers that are linear ones by their class and do more (Llama 4's routers give two values): no adapter fits."""
    from torch import nn

    return [
        name for name, part in model.named_modules()
        if isinstance(part, nn.Linear) and type(part).__module__.startswith("transformers.models.")
        and type(part).forward is not nn.Linear.forward
    ]  # fmt: skip


def new_adapter(model: Any, config: TrainingConfig, **more: Any) -> Any:
    """`model` with a new adapter as `config.lora` has it; `more` are PEFT's own keys.

    Raises ConfigError for a target that no layer is called by: beside others PEFT passes it over.
    """
    import peft

    from prefmill.core.seeding import seeded

    assert config.lora is not None
    said = config.lora.model_dump(include={"r", "use_dora", "target_modules"})
    # Dropout would part policy and reference before the first step.
    settings = peft.LoraConfig(**said, lora_alpha=config.lora.alpha, lora_dropout=0.0, **more)
    targets = config.lora.target_modules
    try:
        with seeded(config.seed):  # an adapter begins at random weights
            adapted = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise unfitting_targets(str(error).splitlines()[0]) from None
    found = [f".{name}" for name in adapted.base_model.targeted_module_names]
    named = targets if isinstance(targets, list) else []
    if absent := [name for name in named if not any(layer.endswith(f".{name}") for layer in found)]:
        raise unfitting_targets(f"no layer called {', '.join(absent)}")
    return adapted


def unfitting_targets(got: str) -> ConfigError:
    """The refusal of targets that a model has no layers for that could be adapted."""
    return ConfigError(
        "the adapter does not fit this model", where="lora.target_modules", got=got,
        fix="name linear layers of the model, such as to_q, to_k, to_v, to_out.0 of an image model; or leave it out",
    )  # fmt: skip


def put_on(model: PreTrainedModel, folder: Path, trainable: bool = False) -> Any:
    """`model` with the adapter in `folder`, its dropout off; raises InputError where it does not fit, or not wholly."""
    import peft
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    said = peft.PeftConfig.from_pretrained(str(folder))
    said.lora_dropout = 0.0
    try:
        given = load_file(folder / PEFT_WEIGHTS)
        with warnings.catch_warnings(action="ignore"):  # half-precision adapters are cast to fp32, as new ones are
            adapted = peft.PeftModel.from_pretrained(model, str(folder), config=said, is_trainable=trainable)
    except (RuntimeError, ValueError, SafetensorError) as error:
        raise _unfitting(model, folder, " ".join(str(error).split())[:300]) from None
    # PEFT leaves weights that are not in the file as a new adapter has them, and those that have no place unread.
    own = peft.get_peft_model_state_dict(adapted, save_embedding_layers=False)
    found = [f"{name}: not in the file" for name in sorted(own.keys() - given)]
    found += [f"{name}: no place for it" for name in sorted(given.keys() - own) if "lora_" in name]
    found += [
        f"{name}: of another shape" for name in sorted(own) if own[name].shape != given.get(name, own[name]).shape
    ]
    if found:
        raise _unfitting(model, folder, "; ".join(found[:3]) + ("; ..." if found[3:] else ""))
    with torch.no_grad():
        # Where transformers renames a model's weights (LLaDA's), PEFT renames these too, and loses them.
        for name, value in own.items():
            value.copy_(given[name])
    return adapted


def _unfitting(model: PreTrainedModel, folder: Path, got: str) -> InputError:
    return InputError(
        "the adapter does not fit the model", where=folder, got=got,
        expected=f"one for {model.config.model_type} with every weight that its adapter_config.json speaks of",
        fix="give the base that it was trained on, and both files as they were written",
    )  # fmt: skip


def merge_adapter(model: Any) -> Any:
    """The model with its adapter merged where it has one, in the precision of its weights; to be fp32."""
    if not hasattr(model, "merge_and_unload"):
        return model
    _untie(model.get_base_model())
    return model.merge_and_unload()


def _untie(base: Any) -> None:
    """Part a head from embeddings that it shares, where the adapter changes either: merged, it would change both."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper
    from torch import nn

    head, kinds = base.get_output_embeddings(), (BaseTunerLayer, ModulesToSaveWrapper)
    changed = isinstance(head, kinds) or isinstance(base.get_input_embeddings(), kinds)
    if head is None or not changed or not base.config.tie_word_embeddings:
        return
    if isinstance(head, ModulesToSaveWrapper):  # holds weights of its own, or those of the embeddings, trained as one
        if head.weight is base.get_input_embeddings().weight:
            return
    else:
        plain = head.get_base_layer() if isinstance(head, BaseTunerLayer) else head
        plain.weight = nn.Parameter(plain.weight.detach().clone(), requires_grad=False)
    base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False


def save_adapter(model: Any, base: str, revision: str | None, folder: Path) -> None:
    """Write PEFT's two files, which `PeftModel.from_pretrained` reads on the base; `base` is its name or its digest."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    # PEFT's `auto` asks the hub for the base's configuration, to see whether the vocabulary has grown.
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    for name, value in state.items():
        require_finite(name, value)
    folder.mkdir(parents=True, exist_ok=True)
    # The format refuses tensors that share memory, as a head and embeddings may, or are not contiguous.
    tensors = {name: value.detach().cpu().contiguous().clone() for name, value in sorted(state.items())}
    save_file(tensors, folder / PEFT_WEIGHTS, metadata={"format": "pt"})
    said = model.peft_config["default"].to_dict()
    said |= {"base_model_name_or_path": base, "revision": revision, "inference_mode": True}
    lists = {key: sorted(value) for key, value in said.items() if isinstance(value, set)}  # in an order of their own
    write_json(folder / "adapter_config.json", said | lists, sort_keys=True)


def base_name(start: str, revision: str | None, task: Task) -> str:
    """A base as anyone may know it: its name on the hub, or the digest of a folder's content; never a path."""
    for item in (item for items in task.inputs.values() for item in items):
        if str(item.path) == start:
            return f"sha256:{item.manifest.content_digest}"
    return f"sha256:{weights_of(start, revision)}" if Path(start).is_dir() else start
