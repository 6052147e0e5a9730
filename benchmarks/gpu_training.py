"""Figures of preference training on one GPU: speed beside TRL, memory beside `estimate`, attention, the first step."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.dpo_step import Runner, own_runner, trl_runner
from benchmarks.dpo_work import Setting, groups_of
from prefmill.families.causal.group_attention import LayerAttention, group_attention, loop_attention
from prefmill.families.causal.group_layout import encode_groups
from prefmill.families.causal.scorer import encode_pairwise, patch_forward, score_batch
from prefmill.families.causal.varlen_attention import Segment, varlen_index
from prefmill.slurm.memory import GIGABYTE
from prefmill.training.batches import GroupPart
from prefmill.training.data import Group, Pair

PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "L40S": 362.0}  # dense bf16, by the makers' data sheets
RESPONSES = 4
PAIRS = [(0, 1), (0, 2), (0, 3)]


def seconds(work: Callable[[], object]) -> float:
    """The shortest of three runs after a first one; on a CPU, where it is to run at all, of one."""
    work()
    return min(_timed(work) for _ in range(3 if torch.cuda.is_available() else 1))


def _timed(work: Callable[[], object]) -> float:
    _wait()
    started = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def short(tiny: bool) -> str:
    """Prompts of 100 tokens, responses of 150."""
    return beside_trl(100, 150, 4, tiny)


def middle(tiny: bool) -> str:
    """Prompts of 4,000 tokens, responses of 150."""
    return beside_trl(4000, 150, 1, tiny)


def long(tiny: bool) -> str:
    """Prompts of 24,000 tokens, responses of 600."""
    return beside_trl(24_000, 600, 1, tiny)


def beside_trl(prompt: int, response: int, num_groups: int, tiny: bool) -> str:
    """Pairs and tokens per second and the share of the GPU's peak, ours and TRL's, references computed before."""
    if tiny:
        prompt, response, num_groups = max(1, prompt // 200), response // 10, 1
    setting = Setting([[response] * RESPONSES] * num_groups, [PAIRS] * num_groups, prompt, gpu=not tiny)
    rates = {}
    for name, open_one in (("ours", own_runner), ("TRL", _trl)):
        runner = open_one(setting, groups_of(setting))
        runner.cache()
        rates[name] = (setting.num_pairs / seconds(runner.step), runner.tokens)
        del runner
        torch.cuda.empty_cache()
    flops = {"ours": group_flops(prompt, response), "TRL": 2 * len(PAIRS) * sequence_flops(prompt, response)}
    shown = [
        f"{name} {rate:.2f} pairs/s, {rate / setting.num_pairs * tokens:,.0f} tokens/s, "
        f"{_share(flops[name] * num_groups * rate / setting.num_pairs)}"
        for name, (rate, tokens) in rates.items()
    ]
    liger = "with" if _has("liger_kernel") and not tiny else "without"
    peer = "installed, to be run by its own script" if _has("flash_pref") else "not installed"
    ratio = rates["ours"][0] / rates["TRL"][0]
    return f"{'; '.join(shown)} ({liger} Liger); {ratio:.2f} x TRL; flash-pref {peer}"


def _trl(setting: Setting, groups: list[Group]) -> Runner:
    keys: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_checkpointing": setting.prompt_tokens > 1000}
    if setting.gpu and _has("liger_kernel"):
        keys["use_liger_kernel"] = True
    return trl_runner(setting, groups, keys)


def _has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _share(flops_a_second: float) -> str:
    """The share of the GPU's peak in bf16 (MFU; Chowdhery et al. 2022, appendix B)."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peaks = [value for key, value in PEAK_TFLOPS.items() if key in name]
    return f"{flops_a_second / 1e12 / peaks[0]:.1%} MFU" if peaks else "MFU unknown: no peak of this device"


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes, as Qwen2 names them; `key_width` is that of all key heads together."""

    layers: int
    width: int
    key_width: int
    inner: int
    vocabulary: int

    def flops(self, tokens: int, scored: int, seen: int) -> float:
        """Operations of forward and backward; what is recomputed does not count.

        6 a weight and token, the head's on scored tokens alone; 12 a width and pair of a query and a key that it sees.
        """
        weights = self.layers * (self.width * (2 * self.width + 2 * self.key_width) + 3 * self.width * self.inner)
        return 6.0 * (weights * tokens + self.vocabulary * self.width * scored) + 12.0 * self.layers * self.width * seen


QWEN_3B = Shape(layers=36, width=2048, key_width=256, inner=11_008, vocabulary=151_936)


def group_flops(prompt: int, response: int) -> float:
    """Operations of a group whose prompt runs once."""
    scored = RESPONSES * response
    return QWEN_3B.flops(prompt + scored, scored, seen_pairs(prompt, [response] * RESPONSES))


def sequence_flops(prompt: int, response: int) -> float:
    """Operations of one prompt with one response."""
    return QWEN_3B.flops(prompt + response, response, seen_pairs(prompt, [response]))


def seen_pairs(prompt: int, responses: Sequence[int]) -> int:
    """Pairs of a query and a key that it sees, where responses share their prompt."""
    return _triangle(prompt) + sum(prompt * length + _triangle(length) for length in responses)


def _triangle(length: int) -> int:
    return length * (length + 1) // 2


def peak(tiny: bool) -> str:
    """GB of a step at 28,000 tokens in both layouts, and what `estimate` says of whole sequences."""
    from tests.gpu.test_sharding import estimated_gb
    from tests.training_steps import qwen2

    device = torch.device("cpu" if tiny else "cuda")
    length, size = (700, "tiny") if tiny else (28_000, "true")
    found = {layout: peak_gb(device, lambda: qwen2(size), length, layout) for layout in ("group", "pairwise")}  # type: ignore[arg-type]
    expected = estimated_gb(size, length)  # type: ignore[arg-type]
    return (
        f"group {found['group']:.2f} GB, pairwise {found['pairwise']:.2f} GB, estimated {expected:.2f} GB (0.5B, bf16)"
    )


def peak_gb(device: torch.device, make: Callable[[], Any], length: int, layout: str) -> float:
    """A training step's peak in bf16 with checkpointing, one pair of `length` tokens per side; 0 on a CPU."""
    from prefmill.families.causal.group_attention import use_group_attention

    with device:
        model = make()
    if layout == "group":
        use_group_attention(model)
    patch_forward(model).train().gradient_checkpointing_enable({"use_reentrant": False})
    group = Group([1] * (length - 600), [[2] * 600, [3] * 600], [Pair("a", 0, 1)])
    parts = [GroupPart(0, (0,))]
    batch = (encode_groups([group], parts) if layout == "group" else encode_pairwise([group], parts, 0)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(2):  # in the second step the optimizer's state is there from the start
        with torch.autocast(device.type, dtype=torch.bfloat16):
            scores = score_batch(model, batch)
            loss = -torch.nn.functional.logsigmoid(scores[batch.chosen] - scores[batch.rejected]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.isfinite()
    return torch.cuda.max_memory_allocated() / GIGABYTE if device.type == "cuda" else 0.0


def attention(tiny: bool) -> str:
    """Milliseconds forward and backward of a loop, of two variable-length calls and of flex attention."""
    device = torch.device("cpu" if tiny else "cuda")
    prompt, length = (40, 8) if tiny else (4000, 600)
    shown = []
    for count in (4, 16, 64):
        times = {name: _milliseconds(work) for name, work in _attentions(device, prompt, length, count).items()}
        shown.append(f"{count} responses: " + ", ".join(f"{name} {value}" for name, value in times.items()))
    return "; ".join(shown)


def _milliseconds(work: Callable[[], object]) -> str:
    try:
        return f"{1e3 * seconds(work):.2f} ms"
    except (RuntimeError, NotImplementedError, ValueError) as error:
        return f"failed ({str(error).splitlines()[0][:60]})"


def _attentions(device: torch.device, prompt: int, length: int, count: int) -> dict[str, Callable[[], object]]:
    ends = [prompt + place * length for place in range(count + 1)]
    segment = Segment((0, prompt), tuple(pairwise(ends)))
    drawn = [torch.randn(1, heads, ends[-1], 128, device=device, dtype=torch.bfloat16) for heads in (16, 2, 2)]
    given = [value.requires_grad_(device.type == "cuda") for value in drawn]
    index = varlen_index([segment]).to(device)
    works: dict[str, Callable[[], Tensor]] = {
        "loop": lambda: loop_attention(given[0], given[1], given[2], [segment], LayerAttention(None)),
        "varlen": lambda: group_attention(None, *given, None, segments=[segment], varlen=index)[0],  # type: ignore[misc]
        "flex": _flex(given, prompt, length),
    }
    if device.type == "cpu":
        del works["varlen"]
        return dict(works)
    return {name: (lambda work=work: work().sum().backward()) for name, work in works.items()}


def _flex(given: list[Tensor], prompt: int, length: int) -> Callable[[], Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (query - prompt) // length == (key - prompt) // length
        return (query >= key) & ((key < prompt) | ((query >= prompt) & same))

    total = given[0].shape[2]
    mask = create_block_mask(sees, None, None, total, total, device=str(given[0].device))
    attend = flex_attention if given[0].device.type == "cpu" else torch.compile(flex_attention)
    return lambda: attend(*given, block_mask=mask, enable_gqa=True)


def first_step(tiny: bool) -> str:
    """Seconds from a process's start to the end of its first optimizer step."""
    code = (
        "from benchmarks.dpo_step import own_runner\n"
        "from benchmarks.dpo_work import Setting, groups_of\n"
        f"setting = Setting([[50, 50]], [[(0, 1)]], 100, gpu={not tiny})\n"
        "runner = own_runner(setting, groups_of(setting))\n"
        "runner.cache(); runner.step()"
    )
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True)
    return f"{time.perf_counter() - started:.1f} s"
