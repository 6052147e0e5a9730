"""Revisions of models and data on the hub, where they lie in its cache, and what a training's models hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from prefmill.core.files import read_record, sample_digest, write_record
from prefmill.core.places import expand_home, looks_local

# The keys that name what a revision is of; the second is set where the first names a file or folder.
_OF = {
    "revision": ("model_name_or_path",),
    "ref_revision": ("ref_name", "ref_folder"),
    "dataset_revision": ("dataset", "dataset_file"),
}
_MODELS = {"model_name_or_path": "revision", "ref_name": "ref_revision"}
_OF_MODELS = (".safetensors", ".bin", ".json", ".jinja", ".model")


def require_hub_names(config: object) -> None:
    """Raise ValueError where a configuration gives a revision of something that is not on the hub."""
    for key, names in _OF.items():
        if getattr(config, key, None) is not None:
            found = next((name for name in names if getattr(config, name, None) is not None), None)
            require_hub_name(key, names[0], None if found is None else getattr(config, found))


def require_hub_name(key: str, named: str, value: str | Path | None) -> None:
    """Raise ValueError where `value`, of the key `named`, is none or lies here: its revision `key` had no effect."""
    if value is None or expand_home(value).exists():
        got = f"{named} is not given" if value is None else f"{value} is on this machine"
        raise ValueError(f"{key}: only what is on the hub has revisions, and {got}; leave {key} out")


def hub_file(name: str, file: str, revision: str | None = None) -> str | None:
    """Where a file of a model is, in its folder, the cache or fetched from the hub; None where it has none."""
    from transformers.utils.hub import cached_file

    quiet: Any = {f"_raise_exceptions_for_{cause}": False for cause in ("missing_entries", "connection_errors")}
    found: str | None = cached_file(name, file, revision=revision, **quiet)
    return found


def snapshot(name: str, revision: str | None = None) -> Path | None:
    """The cache's folder of a repository on the hub, which may not exist; None for `name` that cannot be one's."""
    if looks_local(name) or Path(name).is_dir():  # gpt2 has no slash
        return None
    from huggingface_hub import constants

    # Out of the cache alone: it is asked where there is no network.
    cached = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    reference = cached / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or "main"
    return cached / "snapshots" / commit


def models_named(config: BaseModel) -> Iterator[tuple[str, str | None]]:
    """The models that a configuration names, each with its revision on the hub."""
    for key, value in config:
        if key in _MODELS and isinstance(value, str):
            yield value, getattr(config, _MODELS[key], None)
        elif isinstance(value, BaseModel):
            yield from models_named(value)


def models_in(config: BaseModel) -> dict[str, str]:
    """What the models hold that a configuration names: a folder's sample, or a file's content in the hub's cache."""
    found: dict[str, str] = {}
    for name, revision in models_named(config):
        if (cached := snapshot(name, revision)) is not None:
            # Each file for itself, as an attempt may begin before all are downloaded. A branch may move in between.
            links = (file for file in cached.rglob("*") if file.suffix in _OF_MODELS and file.is_symlink())
            found |= {f"{name}/{file.relative_to(cached)}": file.readlink().name for file in links}
        elif Path(name).is_dir():
            found[name] = sample_digest(Path(name), _OF_MODELS)
    return found


def models_changed(config: BaseModel, begun: Mapping[str, Any]) -> list[str]:
    """The models that hold something else than when the attempt recorded as `begun` began."""
    # An attempt of an earlier version has noted none; a folder that is gone now may come back.
    noted = begun.get("models", {})
    return [name for name, now in models_in(config).items() if noted.get(name, now) != now]


def note_models(record: Path, config: BaseModel) -> list[str]:
    """Add what models hold by now to an attempt's `record`, which may have begun without; returns `models_changed`."""
    begun = read_record(record)
    write_record(record, {**begun, "models": models_in(config) | begun.get("models", {})})
    return models_changed(config, begun)
