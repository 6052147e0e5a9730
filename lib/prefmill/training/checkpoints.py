"""Resuming a model from a trainer's own checkpoint: every weight comes back, or training does not go on."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefmill.core.errors import PipelineError
from prefmill.core.files import read_appended, read_record, write_record
from prefmill.core.places import CHECKPOINT_PREFIX
from prefmill.distributed.deepspeed_file import zero_stage
from prefmill.distributed.devices import world_size

if TYPE_CHECKING:
    from prefmill.distributed.sharding import Sharded


def resume_strictly(trainer: Any) -> None:
    """Have `trainer` write checkpoints that it can read back, and refuse one that lacks weights.

    transformers writes models that were renamed since they came to the hub, Qwen2.5-VL among them, under the hub's
    names; its Trainer reads a checkpoint under the model's own, warns that all weights are missing, and trains on
    from where it started.
    """
    model = trainer.model
    write, check = model.save_pretrained, trainer._issue_warnings_after_load

    def save_pretrained(folder: Any, *args: Any, **kwargs: Any) -> Any:
        if Path(folder).name.startswith(CHECKPOINT_PREFIX) and not hasattr(model, "peft_config"):
            kwargs["save_original_format"] = False
        return write(folder, *args, **kwargs)

    def refuse(result: Any) -> None:
        # A tied weight is written under one of its names only.
        missing = sorted(set(result.missing_keys) - set(getattr(model, "all_tied_weights_keys", None) or ()))
        if missing:
            raise PipelineError(
                "the checkpoint to resume from lacks weights", got=f"{len(missing)}, such as {missing[0]}",
                fix="delete the task's checkpoint-* folders: training starts again from its beginning",
            )  # fmt: skip
        check(result)

    model.save_pretrained = save_pretrained
    trainer._issue_warnings_after_load = refuse


def require_its_ranks(folder: Path, config: Sharded) -> None:
    """Raise PipelineError where the checkpoint to resume from was sharded for other ranks than there are.

    ZeRO's parts are those of its ranks, and FSDP2 saves other files than one process. Without shards any ranks go on.
    """
    checkpoint, ranks = newest_checkpoint(folder, delete_torn=False), world_size()
    wrote = len(list(Path(checkpoint).glob("rng_state*.pth"))) if checkpoint else ranks
    if wrote == ranks or not (zero_stage(config.deepspeed) or (config.fsdp and 1 in (wrote, ranks))):
        return
    raise PipelineError(
        "the checkpoint to resume from was sharded for other ranks", where=checkpoint, got=f"{wrote} ranks",
        expected=f"{ranks}, as there are now", fix=f"set `processes: {wrote}` for the stage and run again, or delete "
        "the task's checkpoint-* folders: training starts again from its beginning",
    )  # fmt: skip


COMPLETE = "complete.json"  # written last into a trainer's checkpoint: without it the checkpoint is torn


STEPS = "steps.jsonl"  # the loss curve: one row for every logged step


def newest_checkpoint(folder: Path, delete_torn: bool = True) -> str | None:
    """The newest complete checkpoint of an interrupted training in `folder`; torn ones are deleted.

    A checkpoint is complete when the record written after it names files that are all there in their full size.
    """
    complete: dict[int, Path] = {}
    for path in folder.glob(f"{CHECKPOINT_PREFIX}*"):
        if _is_complete(path):
            complete[int(path.name.removeprefix(CHECKPOINT_PREFIX))] = path
        elif delete_torn:
            # A torn one would count in save_total_limit, and push a complete one out.
            shutil.rmtree(path)
    # By number: as text, checkpoint-1000 comes before checkpoint-900.
    return str(complete[max(complete)]) if complete else None


def mark_complete(checkpoint: Path) -> None:
    """Write the record that makes a checkpoint one that can be resumed from."""
    sizes = {
        path.relative_to(checkpoint).as_posix(): path.stat().st_size
        for path in sorted(checkpoint.rglob("*"))
        if path.is_file()
    }
    for name in sizes:  # the record must not reach the disk before what it vouches for
        with (checkpoint / name).open("rb") as stream:
            os.fsync(stream.fileno())
    write_record(checkpoint / COMPLETE, sizes)


def read_curve(path: Path) -> list[dict[str, Any]]:
    """The rows of a loss curve in the order of their steps; of a step taken twice the later row counts."""
    rows: dict[int, dict[str, Any]] = {}
    for row in read_appended(path, step=int):
        # Training and evaluation log one step in rows of their own.
        rows[row["step"]] = {**rows.get(row["step"], {}), **row}
    return [rows[step] for step in sorted(rows)]


def _is_complete(checkpoint: Path) -> bool:
    sizes = read_record(checkpoint / COMPLETE)
    return bool(sizes) and all(
        (checkpoint / name).is_file() and (checkpoint / name).stat().st_size == size for name, size in sizes.items()
    )
