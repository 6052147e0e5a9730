"""Revisions of models and data on the hub, and where they lie in its cache: what lies elsewhere here has none."""

from __future__ import annotations

from pathlib import Path

from prefmill.core.places import expand_home

# The keys that name what a revision is of; the second is set where the first names a file or folder.
_OF = {
    "revision": ("model_name_or_path",),
    "ref_revision": ("ref_name", "ref_folder"),
    "dataset_revision": ("dataset", "dataset_file"),
}


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


def snapshot(name: str, revision: str | None = None) -> Path | None:
    """The cache's folder of a repository on the hub, which may not exist; None for `name` that cannot be one's."""
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).is_dir():
        return None
    from huggingface_hub import constants

    # Out of the cache alone: it is asked where there is no network.
    cached = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"
    reference = cached / "refs" / (revision or "main")
    commit = reference.read_text().strip() if reference.is_file() else revision or "main"
    return cached / "snapshots" / commit
