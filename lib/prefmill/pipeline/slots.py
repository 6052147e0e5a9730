"""What tasks side by side on this machine share: its GPUs, or as many places on CPUs as `--jobs` says."""

from __future__ import annotations

from collections.abc import Sequence

from prefmill.core.errors import PipelineError
from prefmill.distributed.devices import visible_gpus
from prefmill.pipeline.plan import PlannedTask


class Slots:
    """Places for tasks: `jobs` at once, by default one per GPU of `gpus`, or one where there is none."""

    def __init__(self, jobs: int | None, gpus: Sequence[str] | None = None) -> None:
        self._gpus = list(visible_gpus() if gpus is None else gpus)
        self._num_gpus = len(self._gpus)
        self._free = jobs or max(self._num_gpus, 1)

    def ranks(self, task: PlannedTask) -> int:
        """The processes of `task`: a training has one per GPU unless told otherwise, other stages one.

        Raises PipelineError for more ranks than GPUs.
        """
        ranks = task.processes or (max(self._num_gpus, 1) if task.stage.trains else 1)
        # Without GPUs any number will do: the ranks then talk through gloo.
        if self._num_gpus and ranks > self._num_gpus:
            raise PipelineError(
                "a rank needs a GPU of its own", where=task.key, got=f"processes: {ranks}",
                expected=f"at most {self._num_gpus}", fix="lower `processes`, or leave it out for one per GPU",
            )  # fmt: skip
        return ranks

    def take(self, task: PlannedTask) -> dict[str, str] | None:
        """The environment of `task` in its place; None while there is no place for it."""
        ranks = self.ranks(task)
        if not self._free or (self._num_gpus and len(self._gpus) < ranks):
            return None
        self._free -= 1
        if not self._num_gpus:
            return {}
        mine, self._gpus = self._gpus[:ranks], self._gpus[ranks:]
        # CUDA numbers its devices once, when it starts, so this has to be set before the task computes.
        return {"CUDA_VISIBLE_DEVICES": ",".join(mine)}

    def give_back(self, environment: dict[str, str]) -> None:
        """Free the place that `take` gave."""
        self._free += 1
        self._gpus += [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
