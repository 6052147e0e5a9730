"""Small tensors by key, appended as they are made: nothing that was kept is computed again after a kill."""

from __future__ import annotations

import base64
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


class KeptTensors:
    """A folder of journals, one for every process that ever added to it; values are float64, bit for bit."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Node, process and time: no two writers share a file, though nodes share the disk and numbers come again.
        self._own = folder / f"{os.uname().nodename}.{os.getpid()}.{time.time_ns()}.jsonl"

    def read(self) -> dict[str, Tensor]:
        """Everything kept so far; a line that a kill has torn is left out."""
        kept: dict[str, Tensor] = {}
        for path in sorted(self._folder.glob("*.jsonl")):
            for line in path.read_bytes().splitlines():
                kept |= _parse(line)
        return kept

    def keep(self, values: Mapping[str, Tensor]) -> None:
        """Add `values`; when this returns, they survive the end of this process. Another may be adding the same."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._own.open("a") as stream:
            stream.writelines(_line(key, value) for key, value in values.items())

    def forget(self) -> None:
        """Drop everything kept."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _line(key: str, value: Tensor) -> str:
    # The widest type there is: keeping rounds no value, whatever it was computed in.
    numbers = value.detach().cpu().to(torch.float64).numpy()
    row = {"key": key, "shape": list(numbers.shape), "float64": base64.b64encode(numbers.astype("<f8").tobytes())}
    return json.dumps(row, default=bytes.decode) + "\n"


def _parse(line: bytes) -> dict[str, Tensor]:
    try:
        row = json.loads(line)
        numbers = np.frombuffer(base64.b64decode(row["float64"], validate=True), "<f8").reshape(row["shape"])
    except (ValueError, KeyError, TypeError):
        return {}
    return {row["key"]: torch.from_numpy(numbers.astype(np.float64))}
