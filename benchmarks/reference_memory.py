"""Peak memory of each of two ranks that score a reference in shards: `python -m benchmarks.reference_memory [FAMILY]`.

A random Llama of about 400 MB in fp32 is written once, in bf16; `dpo` and `mdlm_dpo` score it under ZeRO-3 and FSDP2
and stop before the first step. Printed, by rank: the largest anonymous memory above that before loading, as a share of
the model (mapped files are not counted: the kernel takes their pages back).
"""

from __future__ import annotations

import argparse
import ctypes
import json
import tempfile
import threading
from pathlib import Path
from typing import Any

from tests.forked_ranks import import_before_the_forks, run_ranks

SIZE = {
    "hidden_size": 640, "intermediate_size": 1728, "num_hidden_layers": 20, "num_attention_heads": 10,
    "num_key_value_heads": 10,
}  # fmt: skip


def anonymous_bytes() -> int:
    """This process's own memory now, without pages of mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


def return_freed_memory() -> None:
    """Have glibc map every large buffer by itself: kept in its heap, freed ones would count as held for ever."""
    m_mmap_threshold, pr_set_thp_disable = -3, 41
    libc = ctypes.CDLL(None)
    libc.prctl(pr_set_thp_disable, 1, 0, 0, 0)  # a byte in an empty huge page would count as 2 MB
    libc.mallopt(m_mmap_threshold, 256 * 1024)
    libc.malloc_trim(0)  # what the process forked from has freed would take part of the model unseen


class Peak:
    """The largest anonymous memory above that at the start, looked at every few milliseconds."""

    def __init__(self) -> None:
        self.first, self.largest, self._done = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.002):
            self.largest = max(self.largest, anonymous_bytes() - self.first)

    def stop(self) -> int:
        """The peak, in bytes."""
        self._done.set()
        self._thread.join()
        return self.largest


def write_model(folder: Path, size: dict[str, int]) -> int:
    """A random Llama that attends both ways, with the tests' tokenizer; its bytes in fp32, as trained."""
    run_ranks(1, _write, folder, size)  # what it frees would be room that ranks are forked with
    return int((folder / "bytes").read_text())


def _write(folder: Path, size: dict[str, int]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from prefmill.store.jsonl import write_jsonl
    from tests.tiny import make_tokenizer, pair_rows

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    special = {"pad_token_id": tokenizer.pad_token_id, "mask_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=False, **size, **special))
    model.bfloat16().save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    write_jsonl(folder / "pairs.jsonl", pair_rows(2, 2))
    (folder / "bytes").write_text(str(sum(weight.numel() for weight in model.parameters()) * 4))


def score(folder: Path, family: str, strategy: dict[str, Any], total: int) -> None:
    """Score the reference on this rank, and write down what it took."""
    import os

    from prefmill.core.config import validate
    from prefmill.core.stage import Task
    from prefmill.families.causal.dpo import train_dpo
    from prefmill.families.mdlm.config import DiffusionPreferenceConfig
    from prefmill.families.mdlm.dpo import train_diffusion_dpo
    from prefmill.training.preference_config import PreferenceConfig
    from prefmill.training.trainer import PreferenceTrainer

    class ScoredError(Exception):
        """The reference is there."""

    def stop(self: Any, *_: Any) -> None:
        raise ScoredError

    PreferenceTrainer.set_reference = stop  # type: ignore[method-assign]
    keys = {
        "learning_rate": 1e-3, "num_train_epochs": 1, "precision": "fp32", "effective_batch_size": 4, "report_to": [],
        "max_length": 400, **strategy,
    }  # fmt: skip
    (folder / "out").mkdir(parents=True, exist_ok=True)
    task = Task("r", "train", "clean", {}, {}, {}, folder / "out", folder / "logs")
    given = (task, str(folder.parent / "model"), folder.parent / "pairs.jsonl", None)
    return_freed_memory()
    peak = Peak()
    try:
        if family == "causal":
            train_dpo(validate(PreferenceConfig, keys), *given)
        else:
            train_diffusion_dpo(validate(DiffusionPreferenceConfig, {**keys, "diffusion_steps": 2}), *given)
    except ScoredError:
        (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(peak.stop() / total))


def measure(folder: Path, family: str, strategy: dict[str, Any], total: int) -> list[float]:
    """Each rank's peak, as a share of the model."""
    config = folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "is_causal": family == "causal"}))
    run = folder / f"{family}-{'-'.join(strategy)}"
    run_ranks(2, score, run, family, strategy, total)
    return [json.loads((run / f"{rank}.json").read_text()) for rank in range(2)]


def main() -> None:
    """Print a line a family and strategy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "family", nargs="*", choices=["causal", "mdlm", []], metavar="FAMILY", help="causal or mdlm; none: both"
    )
    families = parser.parse_args().family or ["causal", "mdlm"]
    import_before_the_forks("prefmill.families.causal.dpo", "prefmill.families.mdlm.dpo", "torch.distributed.fsdp")
    strategies = {
        "ZeRO-3": {"deepspeed": str(Path(__file__).parent.parent / "configs" / "deepspeed" / "zero3.json")},
        "FSDP2": {"fsdp": True},
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = write_model(folder, SIZE)
        for family in families:
            for strategy, keys in strategies.items():
                shares = measure(folder, family, keys, total)
                shown = ", ".join(f"{share:.2f}" for share in shares)
                print(f"{family} {strategy}: a model of {total / 1e6:.0f} MB, peak by rank as a share of it: {shown}")


if __name__ == "__main__":
    main()
