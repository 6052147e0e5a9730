"""Tables in which people have labelled reviews: what is the same for every kind of label."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefmill.core.errors import InputError
from prefmill.store.row_files import RATERS, file_rows


@dataclass(frozen=True)
class LabelFile:
    """A table, or JSON lines, that has at least `columns`; `problem` is what an error of its lines says first.

    A caller gives `problem` in full, so that a message seen on a terminal is found in the code as it stands.
    """

    path: Path
    problem: str
    columns: tuple[str, ...]

    def rows(self) -> Iterator[tuple[str, dict[str, str]]]:
        """Where each row stands, and its cells as text without blanks around it, with its `rater`.

        Raises InputError where the file cannot be read or lacks a column.
        """
        row = None
        for row in file_rows(self.path):
            if absent := [name for name in self.columns if name not in row.values]:
                raise self.unusable(row.where, f"columns {', '.join(row.values)}", f"name the column {absent[0]}")
            found = {name: row.values[name] for name in self.columns}
            # Who answered, for labels of several people.
            by = (value for name, value in row.values.items() if name.lower() in ("rater", *RATERS))
            found["rater"] = next((value for value in by if value), None)
            yield row.where, {name: "" if value is None else str(value).strip() for name, value in found.items()}
        if row is None:
            raise InputError(
                "the label file is empty", where=self.path, fix="label some answers, or leave out `labels`"
            )

    def unusable(self, where: str, got: str, fix: str) -> InputError:
        """The error for a line that cannot be used."""
        return InputError(self.problem, where=where, got=got, expected=", ".join(self.columns), fix=fix)
