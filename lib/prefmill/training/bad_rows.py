"""Rows that cannot be used, at fault or over-long: refused by name, or left out and listed, wherever that shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from prefmill.core.config import StrictConfig
from prefmill.core.errors import ConfigError, InputError
from prefmill.core.files import write_json
from prefmill.core.stage import Task

if TYPE_CHECKING:
    from prefmill.training.config import TrainingConfig

BAD_ROWS = "bad_rows.json"  # in a task's logs


class RowPolicy(StrictConfig):
    """`on_bad_row: drop` leaves out rows that are at fault themselves, and lists them."""

    on_bad_row: Literal["fail", "drop"] = Field(
        "fail", description="`fail` at a row with a fault (form, template, images, equal sides), or `drop` and list it"
    )


@dataclass
class BadRows:
    """The rows of a file or dataset that were left out; `report` is the list in the task's logs, shared by files."""

    report: Path = Path(BAD_ROWS)
    drop: bool = False
    found: dict[str, str] = field(default_factory=dict)
    first: InputError | None = None

    @classmethod
    def of(cls, config: object, task: Task) -> BadRows:
        """As the configuration of `task` says, where it says so."""
        return cls(task.logs / BAD_ROWS, isinstance(config, RowPolicy) and config.on_bad_row == "drop")

    @contextmanager
    def row(self, where: str) -> Iterator[None]:
        """Take the errors of InputError raised within as the fault of the row at `where`."""
        try:
            yield
        except InputError as error:
            details = {**error.details, "where": f"{where}: {said}" if (said := error.details["where"]) else where}
            fix = f"{details.pop('fix')}; or leave such rows out with on_bad_row=drop"
            named = InputError(error.what, **details, fix=fix)
            if not self.drop:
                raise named from None
            self.first = self.first or named
            self.found[where] = " ".join(str(error).split())

    def tell(self, kept: int) -> None:
        """List what was left out; raises the first row's error where nothing is left."""
        list_bad_rows(self.found, self.report)
        if not kept and self.first is not None:
            raise self.first


def list_bad_rows(found: Mapping[str, str], report: Path) -> None:
    """Add rows, by where they stand, to the list in `report`, and say how many."""
    if not found:
        return
    # Files of one task are read one after the other, and share the list.
    before: Iterable[Mapping[str, str]] = json.loads(report.read_text()) if report.is_file() else []
    known = {row["where"]: row["what"] for row in before} | dict(found)
    write_json(report, [{"where": where, "what": what} for where, what in known.items()])
    print(f"{len(found):,} rows left out, listed in {report}", flush=True)


def report_dropped(task: Task, dropped: Sequence[Mapping[str, Any]], kept: int, config: TrainingConfig) -> None:
    """List over-long rows in the logs; raises ConfigError when `on_overlong` is `fail`, or when nothing is left."""
    path = task.logs / "overlong_rows.json"
    if dropped:
        files = {row.get("file") for row in dropped}
        # Training and validation files share the list; a rerun replaces the rows of its own file.
        others = [row for row in json.loads(path.read_text()) if row.get("file") not in files] if path.is_file() else []
        write_json(path, [*others, *dropped])
    if not dropped or (kept and config.on_overlong == "drop"):
        return
    longest = max(row["num_tokens"] for row in dropped)
    # With `drop` this is a file of which nothing is left: to drop more is no way out.
    drop = "" if config.on_overlong == "drop" else ", or set on_overlong=drop to leave them out"
    raise ConfigError(
        f"{len(dropped)} of {len(dropped) + kept} rows are longer than max_length",
        where=path, got=f"up to {longest} tokens", expected=f"at most {config.max_length}",
        fix=f"raise max_length to {longest}{drop}; nothing is ever truncated",
    )  # fmt: skip
