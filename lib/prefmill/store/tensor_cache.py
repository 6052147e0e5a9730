"""Tensors kept by what they were computed from: shared by runs, trials and resumes, written all or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from prefmill.core.errors import ArtifactError, explained
from prefmill.core.files import open_as_umask_says, unique_suffix


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
        with explained():
            return self.path(key).is_file()

    def load(self, key: str, *names: str) -> dict[str, Tensor]:
        """The tensors of `key`, all or those named; raises ArtifactError for a file that is no longer whole."""
        with self._opened(key) as stored:
            return {name: stored.get_tensor(name) for name in names or stored.keys()}

    def row(self, key: str, name: str, index: int) -> Tensor:
        """Row `index` of a tensor of `key`, without reading the others."""
        with self._opened(key) as stored:
            row: Tensor = stored.get_slice(name)[index]
            return row

    @contextlib.contextmanager
    def _opened(self, key: str) -> Iterator[Any]:
        path = self.path(key)
        try:
            with safe_open(path, framework="pt") as stored:
                yield stored
        except (SafetensorError, FileNotFoundError) as error:
            with explained():  # of a file that is closed to us safetensors says that there is none
                path.open("rb").close()
            raise ArtifactError(
                "a cached tensor cannot be read", where=path, got=str(error), fix="delete that file and run again"
            ) from None

    def save(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep `tensors`; another process may be doing the same."""
        path = self.path(key)
        partial = path.with_name(f".{path.name}{unique_suffix()}.partial")
        with explained(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
                open_as_umask_says(partial)
                partial.replace(path)
            finally:
                with contextlib.suppress(PermissionError):  # the folder is closed: there is none
                    partial.unlink(missing_ok=True)  # on a full disk it would keep the room that the next attempt needs
