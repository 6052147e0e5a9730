"""Tensors kept by what they were computed from: shared by runs, trials and resumes, written all or nothing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefmill.core.errors import ArtifactError


@dataclass(frozen=True)
class TensorCache:
    """A folder with one file for every key; keys are file names."""

    folder: Path

    def path(self, key: str) -> Path:
        """Where `key` is kept."""
        # Spread over folders: network disks are slow with one that has a file for every picture.
        return self.folder / key[:2] / f"{key}.safetensors"

    def holds(self, key: str) -> bool:
        """Whether `key` is kept."""
        return self.path(key).is_file()

    def load(self, key: str, *names: str) -> dict[str, Tensor]:
        """The tensors of `key`, all or those named; raises ArtifactError for a file that is no longer whole."""
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as stored:
                return {name: stored.get_tensor(name) for name in names or stored.keys()}
        except (SafetensorError, FileNotFoundError) as error:
            raise ArtifactError(
                "a cached tensor cannot be read", where=path, got=str(error), fix="delete that file and run again"
            ) from None

    def row(self, key: str, name: str, index: int) -> Tensor:
        """Row `index` of a tensor of `key`, without reading the others."""
        with safe_open(self.path(key), framework="pt") as stored:
            row: Tensor = stored.get_slice(name)[index]
            return row

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors`; another process may be doing the same."""
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Node and process: on a shared disk two nodes may have a process of the same number.
        partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.partial")
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)  # on a full disk it would keep the room that the next attempt needs
