"""A CUDA device that computes nothing, on a torch built without CUDA: every mix of devices raises, as a GPU would."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("hooks.cpp")


def torch_folder() -> Path:
    """Where torch lies, found without importing it."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def compile_hooks(folder: Path, compiler: str) -> Path:
    """Build hooks.cpp against this torch, in about 3 seconds."""
    built, torch = folder / "hooks.so", torch_folder()
    command = [compiler, "-shared", "-fPIC", "-std=c++20", "-O0", SOURCE, f"-I{torch / 'include'}",
               f"-L{torch / 'lib'}", "-lc10", "-ltorch_cpu", "-o", built]  # fmt: skip
    subprocess.run(command, check=True)
    return built


def load_hooks(built: Path) -> None:
    """Give this process the device. Before torch is imported: torch asks for its hooks once, while it is."""
    assert "torch" not in sys.modules
    for name in ("libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(torch_folder() / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(built))
    import torch
    from torch.cuda.amp import common

    common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True  # type: ignore[method-assign]


@contextmanager
def fake_cuda() -> Iterator[Any]:
    """The mode under which tensors have shapes, dtypes and devices, but no values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    class OneMode(FakeTensorMode):
        def __deepcopy__(self, _: Any) -> Any:  # a copy of a tensor is one of the same mode
            return self

    with OneMode() as mode, _no_way_back():
        yield mode


def on_cuda(model: Any, dtype: Any = None) -> Any:
    """`model` with parameters and buffers replaced by fake ones on the device, tied ones tied; under `fake_cuda`."""
    import torch

    moved: dict[int, Any] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if value is not None:
                    held[name] = moved.setdefault(id(value), _like(value, dtype))
    assert all(parameter.is_cuda for parameter in model.parameters())
    return model.train() if isinstance(model, torch.nn.Module) else model


def _like(value: Any, dtype: Any) -> Any:
    import torch

    wanted = dtype if dtype is not None and value.is_floating_point() else value.dtype
    fake = torch.empty(value.shape, dtype=wanted, device="cuda")
    return torch.nn.Parameter(fake, value.requires_grad) if isinstance(value, torch.nn.Parameter) else fake


def fake(mode: Any, value: Any) -> Any:
    """`value` without its tensors' values, its devices kept; dataclasses of tensors included."""
    import dataclasses

    import torch

    if isinstance(value, torch.Tensor):
        return mode.from_tensor(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return type(value)(**{name: fake(mode, field) for name, field in fields.items()})
    return value


@contextmanager
def _no_way_back() -> Iterator[None]:
    """A copy from the device to the CPU raises: the GPU would run dry while it waits for the CPU."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class NoWayBack(TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = op(*args, **(kwargs or {}))
            given = [item for item in tree_leaves((args, kwargs)) if isinstance(item, torch.Tensor)]
            made = [item for item in tree_leaves(out) if isinstance(item, torch.Tensor)]
            if any(item.is_cuda for item in given) and any(item.is_cpu for item in made):
                raise RuntimeError(f"a copy from cuda to the CPU, by {op}")
            return out

    with NoWayBack():
        yield
