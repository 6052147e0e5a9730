"""Failures are told apart by evidence, in its order, and the policy follows the class."""

from __future__ import annotations

from typing import Any

import pytest

from prefmill.pipeline.attempts import MAX_IDLE_ATTEMPTS
from prefmill.slurm.failures import POLICIES, Evidence, Failure, RetryOptions, classify, decide, signature
from prefmill.slurm.jobs import JobState

TRACEBACK = 'Traceback (most recent call last):\n  File "x.py", line 3, in run\nValueError: bad value 17\n'


def failed(kind: str, error: str, **more: Any) -> dict[str, Any]:
    return {"state": "failed", "kind": kind, "error": error, "host": "n7", **more}


@pytest.mark.parametrize(
    ("evidence", "kind", "source"),
    [
        (Evidence({"state": "requeued", "signal": "SIGUSR1"}), "preempted", "status file"),
        (Evidence({"state": "requeued"}, account=JobState("CANCELLED")), "cancelled", "sacct"),
        (Evidence(failed("NoProgress", "stopped 5 times")), "no_progress", "status file"),
        (Evidence(failed("ConfigError", "no such key")), "refused", "status file"),
        (Evidence(failed("ArtifactError", "no finished artifact here\n  where: x")), "early", "status file"),
        (Evidence(failed("PrefmillError", "cannot write: No space left on device")), "disk", "status file"),
        (Evidence(failed("PrefmillError", "no access: Permission denied")), "disk", "status file"),
        (Evidence(failed("ValueError", TRACEBACK)), "bug", "status file"),
        (Evidence(failed("ProcessEnded", "ended by SIGKILL", signal="SIGKILL")), "killed", "status file"),
        (Evidence({"state": "running"}, account=JobState("FAILED", exit_code=9)), "killed", "status file"),
        (Evidence({"state": "complete"}), "stale", "manifest"),
        # The log is asked before Slurm is: the state of a killed trainer's job is FAILED whatever killed it.
        (Evidence(failed("X", "x"), "slurmstepd: error: Detected 1 oom-kill event(s)"), "host_memory", "log"),
        (Evidence(failed("OutOfMemoryError", "torch.OutOfMemoryError: CUDA out of memory. Tried"), ""),
         "gpu_memory", "log"),
        (Evidence(failed("DistBackendError", "ncclSystemError: System call failed")), "nccl", "log"),
        (Evidence({"state": "running"}, "kernel: NVRM: Xid (PCI:0000:1b:00): 79"), "gpu", "log"),
        (Evidence({}, "error: the disk fails: Stale file handle"), "disk", "log"),
        (Evidence(failed("PrefmillError", "the disk fails: Input/output error")), "disk", "status file"),
        (Evidence({"state": "running"}, "NVRM: Xid 94\nncclRemoteError: a peer has gone"), "gpu", "log"),
        # A status that says running says only that nobody could say more: then Slurm knows.
        (Evidence({"state": "running"}, account=JobState("OUT_OF_MEMORY", node="n1")), "host_memory", "sacct"),
        # Without cgroups Slurm writes FAILED for a job that it has killed for its memory: what it held says so.
        (Evidence({"state": "running"}, account=JobState("FAILED", signal=9, memory_gb=0.25, peak_gb=0.5)),
         "host_memory", "sacct"),
        (Evidence({"state": "running"}, account=JobState("FAILED", signal=9, memory_gb=0.25, peak_gb=0.2)),
         "killed", "status file"),
        (Evidence({"state": "running"}, account=JobState("TIMEOUT")), "time_limit", "sacct"),
        (Evidence({"state": "terminated"}, account=JobState("TIMEOUT")), "time_limit", "sacct"),
        (Evidence({"state": "terminated"}, account=JobState("CANCELLED")), "cancelled", "sacct"),
        (Evidence({"state": "running"}, account=JobState("NODE_FAIL", node="n2")), "node", "sacct"),
        (Evidence({"state": "running"}, queued=JobState("NODE_FAIL", node="n2")), "node", "squeue"),
        (Evidence({}, account=JobState("FAILED", exit_code=127)), "launch", "Slurm"),
        (Evidence({}), "unknown", "nothing"),
        (Evidence({}, account=JobState("COMPLETED")), "unknown", "nothing"),  # and no manifest: no success
        (Evidence({"state": "terminated"}), "unknown", "nothing"),
    ],
)  # fmt: skip
def test_the_class_follows_the_evidence(evidence: Evidence, kind: str, source: str) -> None:
    failure = classify(evidence)
    assert (failure.kind, failure.source) == (kind, source), failure.why


@pytest.mark.parametrize(
    ("code", "log", "said"),
    [
        ((0, 53), "", "0:53 before the task began: Slurm could not open its log on that node"),
        ((127, 0), "script: line 9: /usr/py: No such file or directory\n", "127:0 before the task began: a program is "
         "missing on that node, such as the interpreter in the cluster file's `python`: script: line 9: /usr/py: No"),
        ((2, 0), "--- a:all in job 1_0 on n1\nerror: a:all is already running\n  fix: wait\n\na:all: see /l/a.log\n",
         "2:0 before the task began: error: a:all is already running"),
    ],
)  # fmt: skip
def test_a_launch_that_failed_is_told_in_words(code: tuple[int, int], log: str, said: str) -> None:
    job = JobState("FAILED", exit_code=code[0], signal=code[1], node="n1")
    failure = classify(Evidence(log=log, account=job))
    assert failure.kind == "launch"
    assert failure.why.startswith(f"its job ended on n1 with {said}")


def test_the_node_is_the_one_slurm_names() -> None:
    assert (
        classify(Evidence({"state": "running", "host": "login"}, account=JobState("NODE_FAIL", node="n2"))).node == "n2"
    )


@pytest.mark.parametrize(
    ("nodes", "status", "log", "node"),
    [
        ("n2", {"failed_on": "n9"}, "", "n2"),
        ("n[1-2]", {"failed_on": "n2.cluster.example"}, "", "n2"),
        ("a.b,c.d", {"failed_on": "c.d"}, "", "c.d"),
        ("n[1-2]", {}, "srun: error: n2: task 1: Killed\nsrun: error: n1: task 0: Terminated", "n2"),
        ("n[1-2]", {}, "slurmctld: Node failure on n1", "n1"),
        ("n[1-2]", {}, "", "n[1-2]"),  # nobody says which: none is excluded
    ],
)
def test_of_several_nodes_the_one_where_it_began_is_found(
    nodes: str, status: dict[str, str], log: str, node: str
) -> None:
    text = f"NVRM: Xid (PCI:0000:1b:00): 79\n{log}"
    failure = classify(Evidence(failed("RuntimeError", "x") | status, text, JobState("FAILED", node=nodes)))
    assert (failure.kind, failure.node) == ("gpu", node)


def past(kind: str, times: int, **more: Any) -> list[dict[str, Any]]:
    return [{"kind": kind, "action": "retry", **more}] * times


@pytest.mark.parametrize(
    ("kind", "retries"), [(kind, p.retries) for kind, p in POLICIES.items() if p.retries is not None]
)
def test_each_class_is_retried_so_often_and_then_says_what_to_do(kind: Any, retries: int) -> None:
    means = RetryOptions(memory_gb=10, memory_limit_gb=1000)
    for times in range(retries):
        assert decide("a:b", Failure(kind, "", ""), Evidence(), past(kind, times), means).action == "retry"
    last = decide("a:b", Failure(kind, "", ""), Evidence(), past(kind, retries), means)
    assert last.action == "stop"
    assert last.todo
    other = past("node" if kind != "node" else "killed", 9)
    assert decide("a:b", Failure(kind, "", ""), Evidence(), other, means).action == ("retry" if retries else "stop")


@pytest.mark.parametrize("kind", ["preempted", "time_limit"])
def test_time_limits_go_on_for_ever_with_progress_and_five_times_without(kind: Any) -> None:
    many = past(kind, 100)
    assert decide("a:b", Failure(kind, "", ""), Evidence(progressed=True), many, RetryOptions()).action == "retry"
    for idle in range(1, MAX_IDLE_ATTEMPTS):
        assert decide("a:b", Failure(kind, "", ""), Evidence(idle=idle), many, RetryOptions()).action == "retry"
    stopped = decide("a:b", Failure(kind, "", ""), Evidence(idle=MAX_IDLE_ATTEMPTS), [], RetryOptions())
    assert stopped.action == "stop"
    assert "prefmill rerun a:b" in stopped.todo


def test_the_same_traceback_twice_stops_and_another_does_not() -> None:
    first = classify(Evidence(failed("ValueError", TRACEBACK)))
    same = classify(Evidence(failed("ValueError", TRACEBACK.replace("17", "18"))))
    other = classify(Evidence(failed("ValueError", TRACEBACK.replace("bad", "no"))))
    before = past("bug", 1, signature=first.signature)
    assert first.signature == same.signature == signature(TRACEBACK)
    assert decide("a:b", same, Evidence(), before, RetryOptions()).action == "stop"
    assert decide("a:b", other, Evidence(), before, RetryOptions()).action == "retry"


def test_memory_grows_up_to_the_partitions_and_no_further() -> None:
    failure = Failure("host_memory", "", "")

    def given(memory: float | None, limit: float | None) -> tuple[str, float | None]:
        decision = decide("a:b", failure, Evidence(), [], RetryOptions(memory, limit))
        return decision.action, decision.memory_gb

    assert given(64, 1000) == ("retry", 96)
    assert given(64, None) == ("retry", 96)
    assert given(64, 80) == ("retry", 80)
    assert given(80, 80) == ("stop", None)
    assert given(None, 80) == ("stop", None)


def test_a_full_disk_is_waited_for_and_not_charged() -> None:
    failure = Failure("disk", "", "")
    assert decide("a:b", failure, Evidence(), past("disk", 9), RetryOptions(has_room=False)).action == "wait"
    assert decide("a:b", failure, Evidence(), [], RetryOptions(has_room=True)).action == "retry"


def test_a_gpu_that_is_too_small_is_tried_with_less_until_nothing_is_left() -> None:
    failure = Failure("gpu_memory", "CUDA out of memory", "log")
    again = decide(
        "a:b", failure, Evidence(), past("gpu_memory", 9), RetryOptions(smaller={"per_device_train_batch_size": 2})
    )
    assert (again.action, again.why, again.smaller) == (
        "retry", "with per_device_train_batch_size=2", {"per_device_train_batch_size": 2},
    )  # fmt: skip
    last = decide("a:b", failure, Evidence(progressed=True), [], RetryOptions())
    assert last.action == "stop"
    assert "max_length" in last.todo


def test_smaller_microbatches_divide_the_effective_batch_and_end() -> None:
    from prefmill.training.config import TrainingConfig, needs_less

    config, seen = TrainingConfig(learning_rate=1, num_train_epochs=1, per_device_train_batch_size=12), []
    while keys := needs_less(config):
        seen.append(keys)
        config = config.model_copy(update=keys)
    sizes = [keys["per_device_train_batch_size"] for keys in seen[:-1]]
    assert sizes == [6, 3, 1]
    assert seen[-1] == {"activation_checkpointing": True}
    assert needs_less(object()) == {}  # a stage that does not train
