"""A model as training will hold and run it, before training: to check it, and to score the reference with it.

Where ranks share it, no rank ever has it whole in memory: see docs/decisions/0131.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from prefmill.distributed.devices import rank
from prefmill.distributed.sharding import Sharded, is_sharded, reshard, shards_by_zero, uses_fsdp


def inner_model(model: Any) -> Any:
    """The model that an adapter wraps, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def scoring_context(trainer: Any, config: Sharded) -> AbstractContextManager[Any]:
    """What the reference is scored in, so that it computes as the policy will: DeepSpeed trains without autocast."""
    context: AbstractContextManager[Any] = nullcontext() if config.deepspeed else trainer.compute_loss_context_manager()
    return context


@contextmanager
def scoring_model(model: Any, trainer: Any, config: Sharded, dtype: torch.dtype | None = None) -> Iterator[Any]:
    """Within, `model` on the trainer's device, held and computed as in training, and in eval mode.

    Where ranks share a model in training, they share it here, layer by layer, in `dtype` from then on unless that is
    None: none holds it whole, and all run it equally often.
    """
    if uses_fsdp(config):
        _share_by_fsdp(model, trainer.accelerator, dtype)
        yield model.eval()
        # The optimizer would otherwise be given the storage that the last forward left whole.
        reshard(model)
    elif shards_by_zero(config):
        _share_by_zero(model, trainer.args, dtype)
        handles = [handle for part in _gathered_together(model) for handle in _gather_to_run(part)]
        yield model.eval()
        for handle in handles:
            # Training's engine puts in hooks of its own: with both, a layer would be gathered twice.
            handle.remove()
    else:
        yield model.to(trainer.args.device).eval()


def _share_by_fsdp(model: Any, accelerator: Any, dtype: torch.dtype | None) -> None:
    """As accelerate would, but that a layer is cast when it is in parts: accelerate casts all of the model first."""
    from accelerate.utils.fsdp_utils import fsdp2_prepare_model
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    def cast(value: Any) -> Any:
        return value.to(dtype) if dtype is not None and isinstance(value, nn.Parameter) else value

    plugin = accelerator.state.fsdp_plugin
    policy = plugin.mixed_precision_policy or MixedPrecisionPolicy()
    plugin.set_auto_wrap_policy(model)
    for layer in _layers(model):
        if not isinstance(layer, FSDPModule):
            fully_shard(
                layer, reshard_after_forward=plugin.reshard_after_forward, offload_policy=plugin.cpu_offload,
                mp_policy=policy,
            )  # fmt: skip
            layer._apply(cast)  # type: ignore[no-untyped-call]
    for weight in model.parameters():
        # Embeddings, final norm and head: accelerate shards them below, with the root.
        if not is_sharded(weight):
            weight.data = cast(weight).data
    # The layers are of another class now, by which accelerate would not find them.
    wrapping, plugin.auto_wrap_policy = plugin.auto_wrap_policy, None
    fsdp2_prepare_model(accelerator, model)
    plugin.auto_wrap_policy = wrapping


def _share_by_zero(model: Any, args: Any, dtype: torch.dtype | None) -> None:
    """DeepSpeed sends every weight from rank 0: other ranks read none, and rank 0 reads one part after the other."""
    import deepspeed

    for part in _gathered_together(model):
        for weight in part.parameters():
            if is_sharded(weight):
                continue
            kept = dtype or weight.dtype
            read = rank() == 0
            weight.data = weight.data.to(kept) if read else torch.empty(weight.shape, dtype=kept, device=args.device)
        deepspeed.zero.Init(module=part, config_dict_or_path=args.hf_deepspeed_config.config)


def _layers(model: Any) -> list[nn.Module]:
    """The decoder layers, whose weights come together when they run."""
    inner = inner_model(model)
    return [part for part in model.modules() if type(part).__name__ in (inner._no_split_modules or ())]


def _gathered_together(model: Any) -> list[nn.Module]:
    """The modules whose weights come together when they run: decoder layers, and what has weights outside of them."""
    layers = _layers(model)
    inside = {id(part) for layer in layers for part in layer.modules()}
    return layers + [
        part for part in model.modules() if id(part) not in inside and any(True for _ in part.parameters(recurse=False))
    ]


def _gather_to_run(module: nn.Module) -> list[Any]:
    """Have the weights of `module` whole while it runs, and in parts again after; the handles of the hooks."""
    import deepspeed

    weights = deepspeed.zero.GatheredParameters(list(module.parameters()))
    return [
        module.register_forward_pre_hook(lambda *_: weights.__enter__()),
        module.register_forward_hook(lambda *_: weights.__exit__(None, None, None)),
    ]
