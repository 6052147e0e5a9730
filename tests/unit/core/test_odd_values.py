"""Whatever stands behind a key of a configuration is accepted or refused in words, never a traceback."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from prefmill.core.config import validate
from prefmill.core.errors import PrefmillError, explained
from prefmill.core.stage import load_stage
from prefmill.pipeline.plan import PipelineFile
from prefmill.slurm.cluster import ClusterFile

REPOSITORY = Path(__file__).parents[3]
ODD = [None, "", [], {}, -1, True, [None], {"a": None}, {"": ""}, "../../x", "~nobody/x", "\0", "x" * 5000, 10**400]
CONFIGS = sorted((REPOSITORY / "configs").glob("*/*.yaml"))
FOLDERS = {"pipelines": PipelineFile, "clusters": ClusterFile}


def places(values: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The way to every value inside `values`."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    for key, value in inner:
        yield (*before, key)
        yield from places(value, (*before, key))


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_an_odd_value_is_accepted_or_refused_in_words(path: Path) -> None:
    folder = path.parent.name
    schema = FOLDERS.get(folder) or load_stage(folder).config
    base = yaml.safe_load(path.read_text())
    unset = [(key,) for key in schema.model_fields if key not in base]
    faults = []
    for *way, last in [*places(base), *unset]:
        for odd in ODD:
            values = copy.deepcopy(base)
            inner = values
            for key in way:
                inner = inner[key]
            inner[last] = odd
            try:
                with explained():
                    validate(schema, values)
            except PrefmillError:
                continue
            except Exception as error:
                faults.append((*way, last, odd, repr(error)[:200]))
    assert faults == []
