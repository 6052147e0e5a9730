"""The datasets that a LLaMA-Factory file names, by the registry beside them, as keys of prefmill's sources."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefmill.core.errors import ConfigError
from prefmill.pairs.sources import TAGS
from prefmill.store.row_files import file_rows

_INFO = "dataset_info.json"
# prefmill's names of a form's keys, LLaMA-Factory's, by stage and formatting.
_COLUMNS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "dpo": {
        "sharegpt": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
        "alpaca": {"prompt": "instruction", "query": "input", "history": "history", "chosen": "chosen",
                   "rejected": "rejected"},
    },
    "sft": {
        "sharegpt": {"messages": "conversations"},
        "alpaca": {"prompt": "instruction", "query": "input", "history": "history", "response": "output"},
    },
}  # fmt: skip
_FORMS = {"dpo": {}, "sft": {"sharegpt": "conversations", "alpaca": "instruction_output"}}
_PARTS = ("columns", "tags")
_COMMON = {key: key for key in ("system", "tools", "images")}
# The rest changes which rows are read: a script, a part of a repository, rows drawn with replacement.
_KEYS = {"file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "formatting", "ranking", "subset", "split", "revision",
         "columns", "tags"}  # fmt: skip


class Datasets:
    """The registry in `folder`, for a `stage`; images are below `media`, or the registry's folder."""

    def __init__(self, folder: str, media: str | None, stage: str, path: Path) -> None:
        self.folder, self.media, self.stage, self.path = Path(folder), media, stage, path
        self.has_images = False

    def keys(self, given: Any, max_rows: int | None) -> dict[str, Any]:
        """The datasets that a file names as keys of a source: one, or a mixture of as many rows as each has."""
        names = given.split(",") if isinstance(given, str) else list(given) if isinstance(given, list) else [given]
        names = [name.strip() for name in names if isinstance(name, str) and name.strip()]
        if not names:
            raise ConfigError("no dataset is named", where=self.path, got=repr(given), fix="name one under `dataset`")
        entries = [self._entry(name) for name in names]
        self.has_images = any("images" in entry.get("columns", {}) for entry in entries)
        found = self._source(entries[0]) if len(entries) == 1 else {"mixture": list(map(self._part, entries, names))}
        more = {} if max_rows is None else {"max_rows": max_rows}
        # LLaMA-Factory's max_samples bounds each dataset, not their sum.
        if max_rows is not None and len(entries) > 1:
            found["mixture"] = [{**part, "weight": min(part["weight"], max_rows)} for part in found["mixture"]]
        return {**found, "image_folder": self.media or str(self.folder), **more}

    def _part(self, entry: Mapping[str, Any], name: str) -> dict[str, Any]:
        """A file of a mixture, which weighs as much as it has rows: LLaMA-Factory puts them one after another."""
        source = self._source(entry)
        if "file_name" not in entry or any(key in source for key in ("subset", "split")):
            raise ConfigError(
                "several datasets can be mixed where each is a file", where=self.path, got=name,
                fix="download it and give the registry's entry a file_name",
            )  # fmt: skip
        rows = sum(1 for _ in file_rows(Path(source["dataset"])))
        return {"file": source.pop("dataset"), "weight": float(rows), **source}

    def _entry(self, name: str) -> dict[str, Any]:
        """The registry's entry of a dataset; raises ConfigError for one of the other stage."""
        try:
            info = json.loads((self.folder / _INFO).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                "cannot read LLaMA-Factory's dataset registry", where=self.folder / _INFO, got=error,
                fix="run this in the folder llamafactory-cli is run in, or set dataset_dir",
            ) from None  # fmt: skip
        if name not in info:
            raise ConfigError(
                f"no dataset '{name}' in the registry", where=self.folder / _INFO, expected=", ".join(info),
                fix="name one of these under `dataset`, or add it to the registry",
            )  # fmt: skip
        entry: dict[str, Any] = info[name]
        if not all(isinstance(part, dict) for part in (entry, *(entry[key] for key in _PARTS if key in entry))):
            raise ConfigError(
                f"the entry of '{name}' is of another kind", where=self.folder / _INFO, got=entry,
                expected=f"an object, with objects as {' and '.join(_PARTS)}", fix="correct it",
            )  # fmt: skip
        if bool(entry.get("ranking")) != (self.stage == "dpo"):
            wanted = "one of preferences" if self.stage == "dpo" else "one to fine-tune on"
            raise ConfigError(
                f"dataset '{name}' is not {wanted}", where=self.folder / _INFO,
                fix=f'its entry needs "ranking": {str(self.stage == "dpo").lower()}',
            )  # fmt: skip
        return entry

    def _source(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """A registry entry as keys of a source.

        Once `columns` or `tags` is there, LLaMA-Factory takes every name that it leaves out for None: so do we.
        """
        formatting = entry.get("formatting", "alpaca")
        known = _COLUMNS[self.stage].get(formatting)
        named = entry.get("columns", {})
        odd = [key for key in ("videos", "audios", "kto_tag") if named.get(key)]
        odd += [key for key, value in entry.items() if key not in _KEYS and value is not None]
        odd += [f"formatting {formatting}"] if known is None else []
        # Of a file prefmill reads all rows.
        odd += ["split"] if "hf_hub_url" not in entry and entry.get("split", "train") != "train" else []
        if odd or known is None or not {"hf_hub_url", "file_name"} & set(entry):
            raise ConfigError(
                f"this kind of dataset is not known{': ' * bool(odd)}{', '.join(odd)}", where=self.folder / _INFO,
                got=dict(entry), expected="a file or the hub; text and images",
                fix="give the entry a file_name or an hf_hub_url, and remove what is not known",
            )  # fmt: skip
        found: dict[str, Any] = {"pair_format": _FORMS[self.stage].get(formatting, formatting)}
        # As LLaMA-Factory has it: a hub name goes before a file beside it.
        if "hf_hub_url" in entry:
            found |= {"dataset": entry["hf_hub_url"], "dataset_revision": entry.get("revision")}
            found |= {"subset": entry.get("subset"), "split": entry.get("split", "train")}
        else:
            found["dataset"] = str(self.folder / entry["file_name"])
        columns = {ours: named.get(theirs) for theirs, ours in {**known, **_COMMON}.items()}
        # What a row must have keeps its name; of the rest LLaMA-Factory reads `input` alone without being told.
        unread = {"history", *_COMMON, *(["input"] if "columns" in entry else [])}
        columns = {ours: theirs for ours, theirs in columns.items() if theirs or ours in unread}
        tags = {tag: entry["tags"][f"{tag}_tag"] for tag in TAGS if entry.get("tags", {}).get(f"{tag}_tag")}
        found |= {"columns": {ours: theirs for ours, theirs in columns.items() if ours != theirs}, "tags": tags}
        return {key: value for key, value in found.items() if value}
