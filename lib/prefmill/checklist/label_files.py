"""CSV files in which people have labelled reviews: what is the same for every kind of label."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefmill.core.errors import InputError


@dataclass(frozen=True)
class LabelFile:
    """A file with a header line that has at least `columns`; `problem` is what an error of its lines says first.

    A caller gives `problem` in full, so that a message seen on a terminal is found in the code as it stands.
    """

    path: Path
    problem: str
    columns: tuple[str, ...]
    expected: str

    def rows(self) -> Iterator[tuple[int, dict[str, str | None]]]:
        """Every row with its line; raises InputError for no such file, no UTF-8, no CSV, or a missing column."""
        try:
            # Spreadsheets write a byte-order mark, which would be read as part of the first column's name.
            with self.path.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.DictReader(stream, strict=True)
                header = tuple(reader.fieldnames or ())
                if absent := [name for name in self.columns if name not in header]:
                    raise self.unusable(1, f"columns {', '.join(header)}", f"name the column {absent[0]} in line 1")
                if len(set(header)) < len(header):
                    raise self.unusable(1, f"columns {', '.join(header)}", "name every column once")
                for row in reader:
                    if None in row:  # of a comma without quotes: the label may stand in the wrong column
                        raise self.unusable(reader.line_num, "more cells than columns", "quote cells with commas")
                    yield reader.line_num, row
        except (UnicodeDecodeError, csv.Error) as error:
            raise InputError("unreadable CSV", where=self.path, got=str(error), fix="save it as UTF-8 CSV") from None
        except FileNotFoundError:
            raise InputError("no such file", where=self.path, fix="correct `labels`") from None

    def unusable(self, line: int, got: str, fix: str) -> InputError:
        """The error for a line that cannot be used."""
        return InputError(self.problem, where=f"{self.path}:{line}", got=got, expected=self.expected, fix=fix)
