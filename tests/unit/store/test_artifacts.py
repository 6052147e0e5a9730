"""An artifact is done when its manifest says so, and is refused when it does not hold what that says."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prefmill.core.artifact import Artifact, Provenance
from prefmill.core.errors import ArtifactError
from prefmill.core.places import MANIFEST
from prefmill.core.stage import load_stage, stage_names
from prefmill.store.artifacts import publish, read
from prefmill.store.jsonl import read_jsonl, write_jsonl
from prefmill.store.stamps import verify
from prefmill.store.tensor_cache import TensorCache

ORIGIN = Provenance("x", "all", "f", {}, {}, "0", {})


def make(folder: Path, rows: int = 2) -> Artifact:
    write_jsonl(folder / "rows.jsonl", [{"n": n} for n in range(rows)])
    return publish(folder, "report", ORIGIN, {"rows": rows})


def test_same_content_has_the_same_digest_wherever_it_is(tmp_path: Path) -> None:
    one, other = make(tmp_path / "a"), make(tmp_path / "b")
    (tmp_path / "b" / "run.json").write_text("{}")
    (tmp_path / "b" / "work").mkdir()
    (tmp_path / "b" / "work" / "half").write_text("x")
    again = publish(tmp_path / "b", "report", ORIGIN, {"seconds": 3})
    assert one.manifest.content_digest == other.manifest.content_digest == again.manifest.content_digest
    assert make(tmp_path / "c", 3).manifest.content_digest != one.manifest.content_digest


def test_rows_bytes_and_digest_are_recorded(tmp_path: Path) -> None:
    (entry,) = make(tmp_path).manifest.files
    assert (entry.path, entry.rows, entry.bytes) == ("rows.jsonl", 2, (tmp_path / "rows.jsonl").stat().st_size)


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_weights_are_open_to_those_whom_the_umask_lets_in(tmp_path: Path, umask: int) -> None:
    """safetensors 0.8 makes its files for their owner alone: no colleague could read a published model."""
    before = os.umask(umask)
    try:
        save_file({"w": torch.ones(1)}, tmp_path / "model.safetensors")
        (tmp_path / "run.sh").touch(0o777)
        publish(tmp_path, "checkpoint", ORIGIN, {})
        cache = TensorCache(tmp_path / "cache")
        cache.save("ab12", {"w": torch.ones(1)})
    finally:
        os.umask(before)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "model.safetensors", cache.path("ab12"))]
    assert modes == [0o666 & ~umask] * 2
    assert (tmp_path / "run.sh").stat().st_mode & 0o777 == 0o777 & ~umask


def test_no_manifest_means_not_done(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{}])
    with pytest.raises(ArtifactError, match="no finished artifact"):
        read(tmp_path)


def test_nothing_written_is_not_done(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="wrote nothing"):
        publish(tmp_path, "report", ORIGIN, {})
    assert not (tmp_path / MANIFEST).exists()


def test_a_pickle_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"x")
    with pytest.raises(ArtifactError, match="pickle"):
        publish(tmp_path, "checkpoint", ORIGIN, {})


def test_wrong_kind_schema_size_and_content_are_refused(tmp_path: Path) -> None:
    artifact = make(tmp_path)
    with pytest.raises(ArtifactError, match="wrong kind"):
        read(tmp_path, "checkpoint")
    rows = tmp_path / "rows.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("1", "7"))
    read(tmp_path)  # same size: only hashing can tell
    with pytest.raises(ArtifactError, match="changed since"):
        verify(artifact)
    rows.write_text(text + "\n")
    with pytest.raises(ArtifactError, match="damaged"):
        read(tmp_path)
    rows.unlink()
    with pytest.raises(ArtifactError, match="damaged"):
        read(tmp_path)
    rows.write_text(text)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(ArtifactError, match="another version"):
        read(tmp_path)
    (tmp_path / MANIFEST).write_text('{"kind": "rep')
    with pytest.raises(ArtifactError, match="unreadable manifest"):
        read(tmp_path)


def test_a_failed_writer_leaves_nothing(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": float("nan")}]
    with pytest.raises(ValueError, match="JSON compliant"):
        write_jsonl(tmp_path / "x.jsonl", rows)
    assert os.listdir(tmp_path) == []


def test_a_broken_row_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(Exception, match=r"x\.jsonl:2"):
        list(read_jsonl(tmp_path / "x.jsonl"))


@pytest.mark.parametrize("file", ["config.json", "adapter_config.json", "model_index.json"])
def test_a_plain_model_folder_is_sent_to_the_key_that_takes_it(file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("{}")
    with pytest.raises(ArtifactError, match=f"give it as model_name_or_path={tmp_path}, and leave the input out"):
        read(tmp_path, "checkpoint")
    with pytest.raises(ArtifactError, match="no finished artifact here"):
        read(tmp_path, "report")
    # Every stage that reads a checkpoint has that key, so the advice is accepted.
    readers = [load_stage(name) for name in stage_names()]
    readers = [stage for stage in readers if any(item.kind == "checkpoint" for item in stage.reads.values())]
    assert {"dpo", "sft", "evaluate", "mdlm_sft", "mdlm_dpo", "mdlm_evaluate"} <= {stage.name for stage in readers}
    # report tells of trainings, and sweep has the key under `trial`.
    others = [stage.name for stage in readers if "model_name_or_path" not in stage.config.model_fields]
    assert others == ["report", "sweep"]
