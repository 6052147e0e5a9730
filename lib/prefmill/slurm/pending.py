"""Why a job is still pending, in words: whether it ever starts by itself, and what to do where it does not."""

from __future__ import annotations

import re
from collections.abc import Sequence

from prefmill.slurm.jobs import JobState

_HELD: Sequence[tuple[str, str]] = [
    ("requeued held", "its node could not launch it; to do: `prefmill advance`, or `scontrol release {name}`"),
    ("JobHeldUser", "somebody holds it; to do: `scontrol release {name}`"),
    ("JobHeldAdmin", "an operator holds it; to do: ask the cluster's operators to release {name}"),
    (r"Invalid(Account|QOS)", "to do: correct account and qos in the cluster file, `prefmill cancel`, submit again"),
]
# A limit on one job is for its own request: no other job's end makes room for it.
_TOO_MUCH = (
    r"Max\w*Per(Job|Node)|QOSMin|Partition(Time|Node)Limit|BadConstraints|AccountNotAllowed|QOSNotAllowed",
    "it asks for more than is allowed; to do: lower its resources (`prefmill estimate` names the limit), "
    "`prefmill cancel`, submit again",
)
_QUEUED: Sequence[tuple[str, str]] = [
    ("MaxSubmit|MaxJobs|Grp|PerUser|PerAccount|JobArrayTaskLimit", "it starts when other jobs have ended"),
    (
        "ReqNodeNotAvail|DOWN|Partition(Down|Inactive)|NodeDown|Reservation",
        "waits for nodes that are down, drained or reserved: see `sinfo -R`",
    ),
]


def held(job: JobState, name: str) -> str:
    """Why Slurm never starts pending `job` by itself, and what to do; "" where it will."""
    # Of several partitions Slurm shows the reason of one: the job starts in another.
    rules = _HELD if "," in job.partition else [*_HELD, _TOO_MUCH]
    return _explained(rules, job.reason, name)


def why_queued(job: JobState) -> str:
    """What a pending job that starts by itself waits for; Slurm's own word for the common reasons."""
    if job.reason in ("None", "Dependency"):
        return "waits for others" * (job.reason != "None")
    return _explained(_QUEUED, job.reason) or job.reason


def _explained(rules: Sequence[tuple[str, str]], reason: str, name: str = "") -> str:
    said = next((text for pattern, text in rules if re.search(pattern, reason)), "")
    return said and f"{reason}: {said.format(name=name)}"
