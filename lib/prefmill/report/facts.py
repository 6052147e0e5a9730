"""The line that a page opens with: the base and its size, what was trained on, when it was made and by which code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from prefmill.core.artifact import Artifact
from prefmill.core.files import read_record
from prefmill.core.places import RUN_RECORD

MODELS = ("checkpoint", "image_checkpoint")


def facts(artifacts: Sequence[Artifact], datasets: Mapping[str, Any] | None, show_run: bool) -> list[str]:
    """What a reader asks first, as far as it is known; `show_run` adds the date and the code's version.

    `artifacts` are all that the page leads back to, `datasets` the summary.json of build_datasets.
    """
    return [*sorted(_bases(artifacts)), *_trained_on(artifacts, datasets), *(_made(artifacts) if show_run else ())]


def _bases(artifacts: Sequence[Artifact]) -> Iterator[str]:
    """Models that no other model here was trained from."""
    models = [item for item in artifacts if item.manifest.kind in MODELS]
    digests = {item.manifest.content_digest for item in models}
    judging = {digest for item in artifacts if item.manifest.kind == "reward_model" for digest in _inputs(item)}
    for item in models:
        if not _inputs(item) & digests:
            size = num_parameters(item)
            kind = "reward model's base" if item.manifest.content_digest in judging else "base"
            yield f"{kind}: {_name(item)}" + (f", {_short(size)} parameters" if size else "")


def _inputs(artifact: Artifact) -> set[str]:
    return {digest for of_input in artifact.manifest.inputs.values() for digest in of_input}


def _name(artifact: Artifact) -> str:
    """The hub name or the folder's own; never a path, which differs between machines."""
    given = artifact.manifest.identity.get("config", {}).get("model_name_or_path")
    if not given:
        return artifact.manifest.key
    return PurePath(given).name if PurePath(given).is_absolute() else str(given)


def num_parameters(artifact: Artifact) -> int:
    """The numbers in an artifact's safetensors files, by their headers; an adapter's own are not the model's."""
    from safetensors import safe_open

    total = 0
    for entry in artifact.manifest.files:
        # Of a tuned image model the files beside its folders are adapters too.
        is_adapter = "adapter" in entry.path or (artifact.manifest.kind == "image_checkpoint" and "/" not in entry.path)
        if entry.path.endswith(".safetensors") and not is_adapter:
            # safetensors has the shapes in its header: no weight is read, and torch need not be imported.
            with safe_open(artifact.path / entry.path, framework="np") as stored:
                shapes = [stored.get_slice(name).get_shape() for name in list(stored.keys())]
            total += sum(map(math.prod, shapes))
    return total


def _trained_on(artifacts: Sequence[Artifact], datasets: Mapping[str, Any] | None) -> Iterator[str]:
    if datasets is not None:
        counts = [(datasets["dpo"]["pairs"]["train"], "preference")]
    else:
        tuned = [item.manifest.metrics for item in artifacts if item.manifest.kind == "image_checkpoint"]
        counts = [(metrics["pairs"], "image") for metrics in tuned if metrics.get("pairs")]
    for count, kind in dict.fromkeys(counts):
        # A narrow no-break space between thousands: a number is not cut at the end of a line.
        yield f"trained on {count:,} {kind} pairs".replace(",", "\u202f")


def _made(artifacts: Sequence[Artifact]) -> Iterator[str]:
    records = [item.path / RUN_RECORD for item in artifacts]
    ends = [read_record(path).get("ended") for path in records]
    if known := [end for end in ends if end]:
        # In UTC: the page must not depend on where it is made.
        yield f"made on {datetime.fromtimestamp(max(known), UTC):%Y-%m-%d}"
    versions = sorted({item.manifest.code_version for item in artifacts})
    yield f"prefmill {', '.join(versions)}"


def _short(count: int) -> str:
    """571392 as 571 K."""
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return str(count)
