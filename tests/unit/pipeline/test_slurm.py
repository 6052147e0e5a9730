"""Slurm's own outputs, as several versions write them, are read right."""

from __future__ import annotations

import stat
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from prefmill.core.config import validate
from prefmill.core.errors import PipelineError
from prefmill.pipeline.plan import PipelineFile, make_plan
from prefmill.slurm import jobs as slurm
from prefmill.slurm.cluster import ClusterFile, Resources
from prefmill.slurm.estimate import estimate
from prefmill.slurm.jobs import JobState, clean_state, expand, waits_for
from prefmill.slurm.partitions import Partition, fits_when_back, gpu_kind, gpu_memory_gb, offer_of, partitions


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH, for programs that pretend to be Slurm's."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


def pretend(folder: Path, name: str, text: str, error: str = "", code: int = 0) -> None:
    script = folder / name
    script.write_text(f"#!/bin/sh\n/bin/cat <<'END'\n{text}\nEND\necho '{error}' >&2\nexit {code}\n")
    script.chmod(script.stat().st_mode | stat.S_IXUSR)


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("41", [-1]), ("41_3", [3]), ("41_[0-2]", [0, 1, 2]), ("41_[0-1,7%2]", [0, 1, 7]), ("41_[0-6:3]", [0, 3, 6]),
        ("41_[1,3,...]", [1, 3]), ("41_[5]", [5]),
    ],
)  # fmt: skip
def test_ids_of_arrays_are_expanded(text: str, indices: list[int]) -> None:
    assert expand(text) == [("41", index) for index in indices]


def test_what_is_no_id_is_nothing() -> None:
    assert expand("") == expand("41.batch") == []


def test_states_lose_what_follows_them() -> None:
    shown = [clean_state(text) for text in ("CANCELLED by 0", "RUNNING+", "TIMEOUT", "")]
    assert shown == ["CANCELLED", "RUNNING", "TIMEOUT", "UNKNOWN"]


def test_squeue_is_read(program: Path) -> None:
    lines = [
        "41|0|42|RUNNING|None|n1|1700000000|ann|gpu|(null)",
        "41|1|41|PENDING|DependencyNeverSatisfied||N/A|ann|gpu|afterok:40_1(failed)",
        "50|N/A|50|PENDING|Dependency||N/A|ann|gpu|afterany:41_*(unfulfilled)",
    ]
    pretend(program, "squeue", "\n".join(lines))
    found = slurm.queue(["41", "50"])
    assert found is not None
    assert found["41", 0] == JobState(
        "RUNNING", "None", node="n1", raw_id="42", started=1.7e9, user="ann", partition="gpu"
    )
    assert waits_for(found["41", 1]) == ({("40", 1)}, True)
    assert waits_for(found["50", -1]) == ({("41", -1)}, False)


def test_sacct_is_read_by_state_as_the_exit_code_of_a_time_limit_is_zero(program: Path) -> None:
    lines = ["41_0|TIMEOUT|0:0|n1|1700000000|512M|", "41_[2-3]|CANCELLED by 0|0:0|None assigned|Unknown|0|"]
    lines += ["41_0.batch|CANCELLED|0:15|n1|1700000000||262144K", "41_0.0|CANCELLED|0:15|n1|1700000000||524288K"]
    lines.append("41_1|FAILED|2:0|n2|1700000000||")
    pretend(program, "sacct", "\n".join(lines))
    found = slurm.accounting(["41"])
    assert found is not None
    assert [found["41", index].memory_gb for index in (0, 1, 2)] == [0.5, None, None]
    assert [found["41", index].peak_gb for index in (0, 1, 2)] == [0.5, None, None]  # the largest step's
    assert {element[1]: (job.state, job.exit_code, job.node) for element, job in found.items()} == {
        0: ("TIMEOUT", 0, "n1"), 1: ("FAILED", 2, "n2"), 2: ("CANCELLED", 0, ""), 3: ("CANCELLED", 0, ""),
    }  # fmt: skip


def test_sacct_is_asked_in_seconds_as_an_hour_comes_twice_when_clocks_are_set_back(program: Path) -> None:
    asked = program / "asked"
    pretend(program, "squeue", "")
    (program / "sacct").write_text(f'#!/bin/sh\necho "$@" > {asked}\necho "x|41"\n')
    (program / "sacct").chmod(0o755)
    since = datetime.fromisoformat("2026-10-25T01:30:00+00:00").timestamp()  # the second 02:30 of that night in Berlin
    assert slurm.named(["x"], since) == {"x": ["41"]}
    start = asked.read_text().split("-S ")[1].split()[0]
    assert int(start.removeprefix("uts")) == since - 600  # Slurm's own word for seconds since the epoch


def test_no_answer_is_not_an_empty_answer(program: Path) -> None:
    assert slurm.queue(["41"]) is None  # no such program
    pretend(program, "squeue", "", "slurm_load_jobs error: Unable to contact slurm controller", 1)
    assert slurm.queue(["41"]) is None
    pretend(program, "squeue", "", "slurm_load_jobs error: Invalid job id specified", 1)
    assert slurm.ask(["squeue", "-j", "1"]) is not None  # purged: nothing to tell, but told
    pretend(program, "sacct", "", "Slurm accounting storage is disabled", 1)
    assert slurm.accounting(["41"]) is None


def test_partitions_are_read(program: Path) -> None:
    lines = ["gpu|30|2-12:00:00|1-4|96+|1031000+|gpu:h100:8(S:0-1)|up", "cpu*|4|infinite|1-infinite|64|64000|(null)|up"]
    pretend(program, "sinfo", "\n".join([*lines, "cpu*|2|infinite|1-infinite|128|128000|gpu:a:2,gpu:b:1|up"]))
    found = partitions()
    assert found is not None
    gpu, cpu = found["gpu"], found[""]
    assert (gpu.nodes, gpu.max_minutes, gpu.max_nodes, gpu.cpus, gpu.gpus) == (30, 60 * 60, 4, 96, 8)
    assert (cpu.name, cpu.nodes, cpu.max_minutes, cpu.max_nodes, cpu.cpus, cpu.gpus) == ("cpu", 6, None, None, 128, 3)


def test_a_list_of_partitions_offers_the_best_of_each(program: Path) -> None:
    lines = ["gpu|30|2-12:00:00|1-4|96|1024|gpu:h100:8|up", "old*|50|infinite|1-2|64|2048|(null)|drain"]
    pretend(program, "sinfo", "\n".join(lines))
    offered = partitions()
    assert offered is not None
    both = offer_of("old,gpu", offered)
    assert both == Partition("old,gpu", 50, None, 4, 96, 2.0, 8, True, "h100")
    mixed = {**offered, "a": Partition("a", 1, 60, None, 8, 1.0, 4, gpu_type="a100")}
    offer = offer_of("gpu,a", mixed)
    assert offer is not None
    assert (offer.gpus, offer.gpu_type) == (8, "")  # 40 GB or 80: nobody can say
    assert offer_of("gpu", offered) == offered["gpu"]
    assert offer_of(None, offered) == offer_of("", offered) == offered["old"]
    assert offer_of("night", offered) is None


@pytest.mark.parametrize(
    ("name", "kind", "memory_gb"),
    [
        ("h100", "h100", 80), ("nvidia_a100-sxm4-40gb", "a100", 40), ("a100_3g.20gb", "a100", 20), ("1g.10gb", "", 10),
        ("tesla_v100", "v100", 32), ("rtx_4090", "", None), ("", "", None),
    ],
)  # fmt: skip
def test_a_sites_name_of_a_gpu_says_its_memory(name: str, kind: str, memory_gb: float | None) -> None:
    assert (gpu_kind(name), gpu_memory_gb(name)) == (kind, memory_gb)


def test_what_a_shell_sets_for_a_person_does_not_reach_slurms_commands(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (program / "squeue").write_text("#!/bin/sh\n/usr/bin/env\n")
    (program / "squeue").chmod(0o755)
    for name in ("SQUEUE_PARTITION", "SCANCEL_INTERACTIVE", "SBATCH_PARTITION", "SLURM_CONF"):
        monkeypatch.setenv(name, "low")
    seen = slurm.ask(["squeue"])
    assert seen is not None
    assert [line for line in seen.splitlines() if line.endswith("=low")] == ["SLURM_CONF=low"]


_UP = "main*|1|1:00:00|1-infinite|4|64000|gpu:2|up"


@pytest.mark.parametrize(
    ("away", "asked", "now"),
    [
        ("", {"cpus": 8}, False),
        ("main*|1|1:00:00|1-infinite|8|64000|gpu:2|up", {"cpus": 8, "partition": "main"}, True),
        ("main*|1|1:00:00|1-infinite|8|64000|gpu:2|up", {"cpus": 8}, True),
        ("main*|1|1:00:00|1-infinite|8|64000|gpu:2|up", {"cpus": 8, "gpus": 3}, False),
        ("main*|1|1:00:00|1-infinite|8|4000|gpu:2|up", {"cpus": 8, "memory_gb": 5}, False),
        ("other|1|1:00:00|1-infinite|8|64000|gpu:2|up", {"cpus": 8, "partition": "main"}, False),
    ],
)  # fmt: skip
def test_what_waits_for_nodes_that_are_away_may_start_and_is_no_error(
    away: str, asked: dict[str, Any], now: bool, program: Path, tmp_path: Path
) -> None:
    """Slurm says of drained nodes what it says of a request that no node could ever take; `estimate` refused both."""
    said = "allocation failure: Requested node configuration is not available"
    pretend(program, "sbatch", "", error=said, code=1)
    both = "\n".join(filter(None, (_UP, away)))
    (program / "sinfo").write_text(f"#!/bin/sh\ncase \"$*\" in *-N*) printf '{away}';; *) printf '{both}';; esac\n")
    (program / "sinfo").chmod(0o755)
    pipeline = PipelineFile.model_validate(
        {"name": "t", "workspace": str(tmp_path), "stages": {"make": {"resources": asked}}}
    )
    plan, lines = make_plan(pipeline, tmp_path / "t.yaml"), list[str]()
    assert fits_when_back(Resources.model_validate(asked)) == now
    if now:
        estimate(pipeline, plan, validate(ClusterFile, {}), None, lines.append)
        assert f"make: not now. Slurm says: {said}" in "\n".join(lines)
        return
    with pytest.raises(PipelineError, match="would never start"):
        estimate(pipeline, plan, validate(ClusterFile, {}), None, lines.append)
