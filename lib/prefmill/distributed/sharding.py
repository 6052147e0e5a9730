"""How weights are spread over ranks: DeepSpeed's ZeRO and torch's FSDP2, and what stays the same under them.

Finished weights are gathered; how a model comes to its ranks is in `scoring`.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from prefmill.core.errors import ConfigError
from prefmill.core.precision import Precision, torch_dtype
from prefmill.distributed.deepspeed_file import deepspeed_settings, following, zero_stage
from prefmill.distributed.devices import device_type, world_size

if TYPE_CHECKING:
    from transformers import TrainingArguments


class Sharded(Protocol):
    """The keys of a training's configuration that say how its weights are spread."""

    @property
    def fsdp(self) -> bool: ...
    @property
    def deepspeed(self) -> Path | None: ...
    @property
    def precision(self) -> Precision: ...


_log = logging.getLogger(__name__)
ArgumentsT = TypeVar("ArgumentsT", bound="TrainingArguments")
_PATCHED = "_prefmill_fsdp_on_cpu"


@contextmanager
def unsharded_loading() -> Iterator[None]:
    """Within, models are loaded whole, though DeepSpeed is to shard what is trained: transformers would shard them all.

    They are sharded later, by `scoring.scoring_model` or when training starts; frozen helpers never are.
    """
    from transformers.integrations import deepspeed

    # TrainingArguments set this when they are made, and every from_pretrained after that looks at it.
    planned = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = planned


def compute_as_without_shards(deepspeed: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed settings with which ZeRO-3 does not put in its own linear: that rounds before it adds the bias.

    In bf16 the policy would then differ at step 0 from the reference, which was computed before the shards were made.
    """
    zero = {**deepspeed.get("zero_optimization", {}), "memory_efficient_linear": False}
    return {**deepspeed, "zero_optimization": zero}


def sharding_arguments(config: Sharded) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments for the strategy asked for; raises ConfigError for an unreadable file."""
    if uses_fsdp(config):
        allow_fsdp_on_cpu()
        return {"fsdp": True, "fsdp_config": {"version": 2, "reshard_after_forward": True}}
    if config.fsdp:
        _log.warning("fsdp: no effect, one process has nobody to share with")
    if config.deepspeed is None:
        return {}
    settings = following(deepspeed_settings(config.deepspeed))
    _require_deepspeed_takes(settings, config.deepspeed)
    if device_type() == "cpu":
        _leave_reductions_to_gloo()
    if world_size() == 1:
        _rendezvous_alone()
    return {"deepspeed": compute_as_without_shards(settings)}


def _require_deepspeed_takes(settings: dict[str, Any], path: Path) -> None:
    """Raise ConfigError for values that DeepSpeed refuses: it would do so when training starts, after all scoring."""
    from deepspeed.runtime.config import DeepSpeedConfig, DeepSpeedConfigError

    said = {key: value for key, value in settings.items() if value != "auto"}
    try:
        DeepSpeedConfig({**said, "train_micro_batch_size_per_gpu": 1})
    except (AssertionError, DeepSpeedConfigError, TypeError, ValueError) as error:
        raise ConfigError(
            "DeepSpeed refuses the file", where=path, got=" ".join(str(error).split())[:300],
            fix="correct it there, or give a shipped file, such as configs/deepspeed/zero3.json",
        ) from None  # fmt: skip


def leave_sizes_to_deepspeed(trainer: Any) -> None:
    """Take out sizes of buffers that are "auto" where a model has no hidden size, as a UNet: the Trainer would end."""
    config, planned = getattr(trainer.model, "config", None), getattr(trainer.args, "hf_deepspeed_config", None)
    known = (hasattr(part, name) for part in (config, getattr(config, "text_config", None))
             for name in ("hidden_size", "hidden_sizes"))  # fmt: skip
    if planned is not None and not any(known):
        zero = planned.config["zero_optimization"]
        planned.config["zero_optimization"] = {key: value for key, value in zero.items() if value != "auto"}


def _leave_reductions_to_gloo() -> None:
    # DeepSpeed would compile an operator for them at its first start: half a minute and 4 GB, and where that is killed,
    # a lock file for which every later rank waits without end.
    from deepspeed import ops

    ops.__compatible_ops__["deepspeed_shm_comm"] = False


def uses_fsdp(config: Sharded) -> bool:
    """Whether FSDP2 shards this training: a process that trains alone has nobody to share with."""
    return config.fsdp and world_size() > 1


def fsdp_mixed_precision(arguments: ArgumentsT, config: Sharded) -> ArgumentsT:
    """Keep FSDP2 from rounding what the model returns, and sums of gradients: accelerate would have both in bf16.

    A response's log-likelihood, several hundred nats, would be off by one or two.
    """
    if uses_fsdp(config) and config.precision != "fp32":
        from torch.distributed.fsdp import MixedPrecisionPolicy

        policy = MixedPrecisionPolicy(param_dtype=torch_dtype(config.precision), reduce_dtype=torch.float32)
        arguments.fsdp_plugin_args["mixed_precision_policy"] = policy
    return arguments


def shards_by_zero(config: Sharded) -> bool:
    """Whether DeepSpeed has ranks hold parts of the weights: stage 3."""
    return zero_stage(config.deepspeed) == 3


def shares_weights(config: Sharded) -> bool:
    """Whether ranks hold parts of the weights in training."""
    return uses_fsdp(config) or shards_by_zero(config)


def reshard(model: nn.Module) -> None:
    """Have FSDP2 hold parts alone: the last forward left some whole, in storage that is not theirs."""
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_sharded(weight: Any) -> bool:
    """Whether ranks hold parts of this weight: ZeRO-3's or FSDP2's."""
    return hasattr(weight, "ds_id") or hasattr(weight, "full_tensor")


def whole_weights(model: nn.Module, keep: bool, trained: bool = False) -> dict[str, Tensor]:
    """A model's weights on the CPU, or those it `trained`, one gathered after the other where ranks hold parts.

    Every rank must ask; those that do not `keep` them get an empty dictionary.
    """
    reshard(model)
    weights = {}
    for name, value in model.named_parameters():
        if trained and not value.requires_grad:
            continue
        # All ranks enter, whoever keeps the weight: gathering needs every part.
        with _gathered(value) as whole:
            if keep:
                # Cloned, as .cpu() copies nothing on a CPU, and DeepSpeed frees what it gathered.
                weights[name] = whole.detach().cpu().clone()
    return weights


def pad_chunks(chunks: Sequence[Tensor], layer: Any) -> list[Tensor]:
    """`chunks` [n, ...] with empty ones after them, as many as the rank with the most needs where `layer` is sharded.

    A sharded layer is gathered whenever it runs: ranks that run it unequally often would wait for each other forever.
    """
    return [*chunks, *[chunks[0][:0]] * missing_runs(len(chunks), layer)]


def missing_runs(count: int, module: Any) -> int:
    """How often `module` has to run on nothing after `count` runs, for every rank to run it equally often.

    0 where no ranks share its weights; where they do, all of them must ask.
    """
    if not runs_in_step(module):
        return 0
    # On the GPU where there is one: NCCL sends nothing else.
    most = torch.tensor(count, device=device_type())
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    return int(most) - count


def runs_in_step(module: Any) -> bool:
    """Whether ranks hold parts of a module's weights, so that all of them have to run it equally often."""
    from torch.distributed.fsdp import FSDPModule

    if not isinstance(module, nn.Module):
        return is_sharded(module.weight)
    # While it runs FSDP2 shows plain weights: its class tells.
    return any(isinstance(part, FSDPModule) for part in module.modules()) or any(map(is_sharded, module.parameters()))


@contextmanager
def _gathered(value: Any) -> Iterator[Tensor]:
    if hasattr(value, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([value]):
            yield value
    else:
        yield value.full_tensor() if hasattr(value, "full_tensor") else value


def allow_fsdp_on_cpu() -> None:
    """Have accelerate shard on a CPU what it shards on GPUs: it would take DDP, and say nothing."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    if hasattr(AcceleratorState, _PATCHED):
        return
    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            # Trainer's arguments ask PartialState, accelerate its own state: both must say the same.
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init
    setattr(AcceleratorState, _PATCHED, True)


def _rendezvous_alone() -> None:
    """What a launcher would say to the one process there is: without it DeepSpeed looks for MPI."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in alone.items():
        # What a launcher has set stays.
        os.environ.setdefault(name, str(value))
