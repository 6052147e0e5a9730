"""Preference datasets from outside: a file or a hub name, read row by row, checked, and written as prefmill's own."""

from __future__ import annotations

import codecs
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from prefmill.core.config import ExternalPath, later
from prefmill.core.errors import InputError, nearest
from prefmill.core.places import expand_home
from prefmill.pairs.formats import FORMS, detect, forms_of, parse
from prefmill.pairs.forms import Form
from prefmill.pairs.mixture import MixedFile, mixed
from prefmill.pairs.pairing import FoundRow, UnusableRow, prompt_of
from prefmill.pairs.remarks import Remarks, listed, repeats_prompt
from prefmill.pairs.turns import BadRowError
from prefmill.store.row_files import SUFFIXES, TABLES, SourceRow, file_rows, hub_rows, is_saved_to_disk
from prefmill.training.bad_rows import RowPolicy

_HELD_OUT = re.compile("val|dev|test|eval|heldout|held.out", re.IGNORECASE)
_LOOKED_AT = 64  # rows that settle the form of all
SOURCE_KEYS = ("dataset", "dataset_file", "mixture")  # one of them names the dataset
_OF_A_SOURCE = (
    "split", "dataset_revision", "subset", "max_rows", "encoding", "pair_format", "columns", "tags", "image_folder",
    "val_fraction",
)  # fmt: skip
TAGS = ("role", "content", "user", "assistant", "system", "observation", "function")


class PairSource(RowPolicy):
    """A preference dataset that build_datasets did not make: a hub name, or the path of a file.

    `subset` is the name of the hub dataset's configuration, or a number of rows to draw by `seed`; `max_rows` takes
    the first rows and no more; text files are in `encoding`. `pair_format` settles which form the rows have where
    their keys leave it open; `columns` maps this form's keys to the data's own, `tags` (role, content, user, assistant,
    system, observation, function) the keys and speakers inside messages. `val_fraction` of the prompts are held out,
    with all their pairs.
    `mixture` takes rows of several files in the shares of their weights, none twice.
    """

    forms: ClassVar[Mapping[str, Form]] = FORMS
    unread_with = dict.fromkeys(SOURCE_KEYS, ("modality",))  # of stages that read build_datasets' rows otherwise

    dataset: str | None = Field(None, description="a file, or a name on the hub; none: the input `datasets`")
    dataset_file: ExternalPath | None = Field(None, description="set from `dataset` where that names a file")
    dataset_revision: str | None = Field(None, description="branch, tag or commit of a hub dataset")
    split: str = Field("train", description="split of a hub dataset")
    subset: str | int | None = Field(None, description="a hub dataset's configuration, or rows to draw by `seed`")
    max_rows: int | None = Field(None, ge=1, description="use the first so many rows; none: all")
    encoding: str = later("utf-8", description="of text files")
    pair_format: str | None = Field(None, description="form of the rows; none: recognized by their keys")
    columns: dict[str, str | None] = Field(
        {}, description="{ours: theirs}: other names of the form's keys; null: a key is not read"
    )
    tags: dict[str, str] = Field({}, description="{role: theirs, ...}: other names inside messages")
    image_folder: Path | None = Field(None, description="folder that image paths are relative to; none: the file's")
    val_fraction: float = Field(0.0, ge=0, lt=1, description="share of the prompts held out, with all their rows")
    seed: int = Field(42, description="of rows drawn, of adapters and of the order of rows")
    mixture: list[MixedFile] = later([], description="instead of `dataset`: [{file: a.jsonl, weight: 2}, ...]")

    @model_validator(mode="before")
    @classmethod
    def _file_or_name(cls, values: Any) -> Any:
        """`dataset: x.jsonl` is a file, whose content counts, not its path."""
        named = str(values.get("dataset") or "") if isinstance(values, dict) else ""
        path = expand_home(named)
        if named.lower().endswith(SUFFIXES) or path.is_file() or is_saved_to_disk(path):
            if values.get("dataset_file") is not None:
                raise ValueError("give dataset or dataset_file, not both")
            return {**values, "dataset": None, "dataset_file": values["dataset"]}
        return values

    @field_validator("pair_format")
    @classmethod
    def _known(cls, name: str | None) -> str | None:
        if name is not None and name not in cls.forms:
            raise ValueError(f"no such form{nearest(name, list(cls.forms))}; forms are {', '.join(cls.forms)}")
        return name

    @field_validator("encoding")
    @classmethod
    def _is_one(cls, name: str) -> str:
        try:
            codecs.lookup(name)
        except LookupError:
            raise ValueError(f"no such encoding: {name}; for example utf-8, utf-16, latin-1, cp1252") from None
        return name

    @model_validator(mode="after")
    def _consistent(self) -> PairSource:
        if sum(bool(getattr(self, key)) for key in SOURCE_KEYS) > 1:
            raise ValueError("give one of dataset, dataset_file and mixture")
        if not self.has_source and (unread := self.changed(*_OF_A_SOURCE)):
            raise ValueError(f"{', '.join(unread)}: of `dataset`, which is not given; leave it out, or give that")
        for part in self.mixture:
            self._known(part.pair_format)
        if isinstance(self.subset, str) and self.dataset_file is not None:
            raise ValueError("subset names a configuration of a hub dataset; of a file it is a number of rows")
        if self.dataset_file is not None and not is_saved_to_disk(self.dataset_file):
            for key, at_default in (("split", self.split == "train"), ("dataset_revision", not self.dataset_revision)):
                if not at_default:
                    raise ValueError(f"{key} is of a hub dataset, a file has none; leave it out, or give another file")
        is_text = self.mixture or (self.dataset_file and self.dataset_file.suffix.lower() not in TABLES)
        if self.changed("encoding") and not is_text:
            raise ValueError("encoding is of text files, leave it out")
        unknown = sorted(set(self.tags) - set(TAGS))
        if unknown:
            raise ValueError(f"unknown tags {', '.join(unknown)}; tags are {', '.join(TAGS)}")
        return self

    @property
    def has_source(self) -> bool:
        """Whether a dataset is named here at all."""
        return any(getattr(self, key) for key in SOURCE_KEYS)

    @property
    def source_name(self) -> str:
        """What to call the dataset in messages."""
        return str(self.dataset_file or self.dataset or ", ".join(str(part.file) for part in self.mixture))

    @property
    def image_base(self) -> Path:
        """The folder that paths of images are relative to."""
        return self.image_folder or (self.dataset_file.parent if self.dataset_file else Path())

    @property
    def parts(self) -> list[PairSource]:
        """A mixture's files as sources of their own; the source itself where it is none."""
        keys = {"pair_format", "columns", "tags"}
        return [
            self.model_copy(update={**part.model_dump(include=keys), "dataset_file": part.file, "mixture": []})
            for part in self.mixture
        ] or [self]


def read_rows(source: PairSource) -> Iterator[SourceRow]:
    """The rows of a file or hub dataset, in order; raises InputError where it cannot be read."""
    if source.dataset_file is not None:
        yield from file_rows(source.dataset_file, source.encoding, source.split)
    elif source.dataset is not None:
        configuration = source.subset if isinstance(source.subset, str) else None
        yield from hub_rows(source.dataset, configuration, source.split, source.dataset_revision)


def parsed_rows(source: PairSource, problems: list[UnusableRow]) -> Iterator[FoundRow]:
    """The rows that `source` asks for, read as their form; bad ones are raised, or added to `problems`."""
    if not source.mixture:
        yield from _parsed(source, problems)
        return
    files = [list(_parsed(part, problems)) for part in source.parts]
    yield from mixed(source.mixture, files, lambda row: prompt_of(row[1]), source.seed)


def _parsed(source: PairSource, problems: list[UnusableRow]) -> Iterator[FoundRow]:
    remarks = Remarks({theirs for theirs in source.columns.values() if theirs is not None})
    rows = _renamed(_drawn(read_rows(source), source), source, remarks)
    first = list(islice(rows, _LOOKED_AT))
    # One for all: a second form in one file is a fault to be told, not a choice to be made.
    form = source.pair_format or (_form_of(first, source) if first else "")
    for row in chain(first, rows):
        for key in source.forms[form].items:
            for item in listed(row.values.get(key)):
                _rename(item, source, remarks)
        remarks.add_unused(row.values, source.forms[form], source.tags)
        # Who takes a whole file does not mean to train on what its authors hold out.
        if source.split == "train" and _HELD_OUT.match(str(row.values.get("split"))):
            problems.append(UnusableRow(row.where, f"its column `split` says {row.values['split']}"))
            continue
        try:
            found = parse(row.values, form, source.tags, source.forms)
        except BadRowError as error:
            if source.on_bad_row == "fail":
                raise InputError(
                    "this row cannot be used", where=row.where, got=error,
                    fix="correct or remove it, or leave such rows out with on_bad_row=drop",
                ) from None  # fmt: skip
            problems.append(UnusableRow(row.where, str(error)))
        else:
            remarks.num_repeated += repeats_prompt(found)
            remarks.add_scores(row.values)
            yield row, found
    remarks.tell(source.source_name)


def _form_of(first: Sequence[SourceRow], source: PairSource) -> str:
    """The form that most of the `first` rows have: any of them may lack a value, and look like another form for it."""
    fits = (forms_of(row.values, source.forms) for row in first)
    alone = Counter(found[0] for found in fits if len(found) == 1)
    return alone.most_common(1)[0][0] if alone else detect(first[0].values, first[0].where, source.forms)


def _renamed(rows: Iterable[SourceRow], source: PairSource, remarks: Remarks) -> Iterator[SourceRow]:
    for row in rows:
        _rename(row.values, source, remarks)
        yield row


def _rename(values: dict[str, Any], source: PairSource, remarks: Remarks) -> None:
    remarks.missing -= values.keys()
    # All columns are taken out before one is put back: two may swap names.
    taken = {ours: values.pop(theirs) for ours, theirs in source.columns.items()
             if theirs in values and ours != theirs}  # fmt: skip
    for unread in (ours for ours, theirs in source.columns.items() if theirs is None):
        values.pop(unread, None)
    values.update(taken)


def _drawn(rows: Iterator[SourceRow], source: PairSource) -> Iterator[SourceRow]:
    """All rows, or as many as `subset` says, drawn by the seed and in their order."""
    rows = islice(rows, source.max_rows)
    if not isinstance(source.subset, int):
        yield from rows
        return
    everything = list(rows)
    if not 0 < source.subset <= len(everything):
        raise InputError(
            "subset asks for rows that are not there", got=source.subset, expected=f"1 to {len(everything)}",
            where=source.source_name, fix="correct subset",
        )  # fmt: skip
    places = random.Random(source.seed).sample(range(len(everything)), source.subset)
    yield from (everything[place] for place in sorted(places))
