"""The datasets' names and `dataset_info.json`, which lets LLaMA-Factory load them by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from prefmill.core.errors import InputError
from prefmill.core.files import write_atomic
from prefmill.core.records import Modality

REGISTRY, SUMMARY, ROWS = "dataset_info.json", "summary.json", "data.jsonl"
Kind = Literal["sft", "dpo"]
DatasetSplit = Literal["train", "val"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SPLITS: tuple[DatasetSplit, ...] = get_args(DatasetSplit)

# LLaMA-Factory takes an entry that names some columns or tags as naming all: the rest become None. So name all.
_SHAREGPT_TAGS = {
    "role_tag": "from",
    "content_tag": "value",
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}
_OPENAI_TAGS = _SHAREGPT_TAGS | {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "function_tag": "function",
}


class DatasetKey(NamedTuple):
    """Which of the twelve datasets."""

    kind: Kind
    modality: Modality
    split: DatasetSplit

    @property
    def folder(self) -> str:
        """Its folder in the artifact, and its name in the registry: `dpo_clean_train`."""
        return f"{self.kind}_{self.modality}_{self.split}"

    def file_name(self) -> str:
        """Its rows, relative to the artifact."""
        return f"{self.folder}/{ROWS}"


def dataset_keys(modalities: Iterable[Modality], splits: Iterable[DatasetSplit]) -> list[DatasetKey]:
    """The datasets of these modalities and splits, SFT first."""
    return [
        DatasetKey(kind, modality, split)
        for kind in KINDS
        for modality in dict.fromkeys(modalities)  # each once and in order, unlike a set
        for split in dict.fromkeys(splits)
    ]


def entry(key: DatasetKey) -> dict[str, Any]:
    """The registry entry of a dataset, with every column and tag its loader needs."""
    images = {} if key.modality == "clean" else {"images": "images"}
    if key.kind == "sft":
        # To LLaMA-Factory OpenAI's form is a special case of sharegpt, told by its tags.
        columns = {"messages": "messages", **images}
        return {"file_name": key.file_name(), "formatting": "sharegpt", "columns": columns, "tags": _OPENAI_TAGS}
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected", **images}
    return {
        "file_name": key.file_name(),
        "formatting": "sharegpt",
        "ranking": True,  # without it LLaMA-Factory does not look at chosen and rejected
        "columns": columns,
        "tags": _SHAREGPT_TAGS,
    }


def write_registry(folder: Path, keys: Iterable[DatasetKey]) -> None:
    """Write `dataset_info.json` into `folder`, the folder to give LLaMA-Factory as `dataset_dir`."""
    # Without the run's name: the same datasets of another run have the same content.
    entries = {key.folder: entry(key) for key in keys}
    write_atomic(folder / REGISTRY, json.dumps(entries, indent=2) + "\n")


def read_registry(folder: Path) -> dict[str, dict[str, Any]]:
    """The entries of `dataset_info.json` by name; raises InputError when it is missing or no JSON object."""
    path = folder / REGISTRY
    try:
        entries = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise InputError("no dataset registry", where=path, got=error, fix="rerun build_datasets") from None
    if not isinstance(entries, dict):
        got = type(entries).__name__
        raise InputError("a dataset registry maps names to entries", where=path, got=got, fix="rerun build_datasets")
    return entries
