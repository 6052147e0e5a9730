"""What a site forbids: its partitions by their size, associations and QOS as sacctmgr and scontrol show them.

Slurm accepts most jobs that break a limit, and leaves them pending for ever. Only what it enforces counts here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby

from prefmill.core.errors import PipelineError
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask
from prefmill.slurm import jobs as slurm
from prefmill.slurm.cluster import ClusterFile, Resources, resources_for
from prefmill.slurm.jobs import gigabytes
from prefmill.slurm.partitions import Partition, minutes, offer_of, partition_names, partitions
from prefmill.slurm.submission import user_name

_ASSOCIATION = (
    "Cluster", "Account", "ParentName", "Partition", "QOS", "DefaultQOS", "MaxSubmit", "GrpSubmit", "MaxWall",
    "MaxTRES", "GrpTRES",
)  # fmt: skip
_QOS = "Name,MaxSubmitPU,MaxSubmitPA,GrpSubmit,MaxWall,MaxTRES,MaxTRESPU,GrpTRES,MinTRES"
_TRES_NAMES = {"gres/gpu": "GPUs", "cpu": "CPUs", "mem": "GB of memory", "node": "nodes"}
Tres = Mapping[str, float]


@dataclass(frozen=True)
class JobLimits:
    """What `name` allows: a job's minutes and TRES, each None or absent where there is no limit."""

    name: str
    submit: int | None = None
    minutes: int | None = None
    most: Sequence[Tres] = ()
    least: Tres = field(default_factory=dict)

    def objections(self, wanted: Tres, wanted_minutes: int) -> Iterator[str]:
        """Why a job that wants this can never start."""
        if self.minutes is not None and wanted_minutes > self.minutes:
            yield f"time_limit_minutes: {wanted_minutes} asked for, {self.name} allows {self.minutes}"
        for tres, limit in ((key, value) for most in self.most for key, value in most.items()):
            if wanted.get(tres, 0) > limit:
                yield f"{wanted[tres]:g} {_TRES_NAMES.get(tres, tres)} asked for, {self.name} allows {limit:g}"
        for tres, limit in self.least.items():
            if wanted.get(tres, 0) < limit:
                yield f"{wanted.get(tres, 0):g} {_TRES_NAMES.get(tres, tres)} asked for, {self.name} wants {limit:g}"


@dataclass(frozen=True)
class Association:
    """An account that this user may charge, in one partition or in all (""), with the QOS that go with it.

    `groups` are the limits on all jobs of that account together, and of each account above it.
    """

    account: str
    partition: str
    qos: tuple[str, ...]
    default_qos: str
    limits: JobLimits
    groups: tuple[JobLimits, ...] = ()


@dataclass(frozen=True)
class SitePolicy:
    """A site's rules for this user; `enforced` are the kinds that Slurm holds against a job."""

    enforced: frozenset[str]
    default_account: str
    associations: tuple[Association, ...]
    qos: Mapping[str, JobLimits]
    partitions: Mapping[str, Mapping[str, str]]

    def objections(self, cluster: ClusterFile, resources: Resources) -> Iterator[str]:
        """Why a task with these resources would be refused, or never start, in each of its partitions."""
        found = [list(self._objections(cluster, resources, name)) for name in partition_names(resources.partition)]
        yield from dict.fromkeys(text for texts in found for text in texts) if all(found) else ()

    def _objections(self, cluster: ClusterFile, resources: Resources, name: str) -> Iterator[str]:
        # Slurm keeps names of accounts and QOS in small letters, and takes them in any.
        account = str(resources.options.get("account") or cluster.account or self.default_account).lower()
        partition = self.partitions.get(name, {})
        association = self._association(account, partition.get("PartitionName", ""))
        if association is None:
            if "associations" in self.enforced and self.associations:
                known = ", ".join(sorted({one.account for one in self.associations}))
                yield f"account '{account}' is none of yours: {known}"
            return
        # slurmdbd makes a QOS "normal" by itself, the default where nobody has set one.
        qos = str(resources.options.get("qos") or cluster.qos or association.default_qos or "normal").lower()
        if "qos" in self.enforced and qos not in association.qos:
            yield f"qos '{qos}' does not go with account {account}: {', '.join(association.qos)}"
        yield from _closed(partition, account, qos)
        for limits in self._limits(association, qos, partition):
            yield from limits.objections(_tres(resources), resources.time_limit_minutes)

    def submit_limit(self, cluster: ClusterFile) -> int | None:
        """How many jobs may be submitted at once; an array counts by its elements."""
        association = self._association((cluster.account or self.default_account).lower(), "")
        if association is None:
            return None
        found = self._limits(association, (cluster.qos or association.default_qos or "normal").lower(), {})
        return min((limits.submit for limits in found if limits.submit is not None), default=None)

    def _association(self, account: str, partition: str) -> Association | None:
        """The one for this partition before the one for all."""
        fitting = [one for one in self.associations if one.account == account and one.partition in ("", partition)]
        return max(fitting, key=lambda one: one.partition, default=None)

    def _limits(self, association: Association, qos: str, partition: Mapping[str, str]) -> Iterator[JobLimits]:
        if "limits" in self.enforced:
            yield from (association.limits, *association.groups)
            yield from (self.qos[name] for name in (qos, partition.get("QoS", "")) if name in self.qos)


def read_policy() -> SitePolicy | None:
    """The rules for this user; None where there is no accounting, and so none but the partitions'."""
    me = user_name()
    # -P, as columns would cut long names off.
    books = ["sacctmgr", "-nP", "show"]
    queries = [
        [*books, "association", f"user={me}", f"format={','.join(_ASSOCIATION)}"],
        [*books, "association", "user=", f"format={','.join(_ASSOCIATION)}"],  # the accounts' own
        [*books, "user", me, "format=DefaultAccount"],
        [*books, "qos", f"format={_QOS}"],
        ["scontrol", "show", "config"],
        ["scontrol", "-o", "show", "partition"],
    ]
    with ThreadPoolExecutor(len(queries)) as pool:  # each waits for Slurm alone, and a submission for all of them
        associations, *others = pool.map(slurm.ask, queries)
    if associations is None:
        return None
    accounts, default, qos, config, partitions = (answer or "" for answer in others)
    # A limit of a kind that is not named here is kept in the books alone: jobs above it run.
    enforced = re.search(r"^AccountingStorageEnforce\s*=\s*(\S+)", config, re.M)
    # One slurmdbd may keep the books of several clusters: the others' rules are not this one's.
    here = re.search(r"^ClusterName\s*=\s*(\S+)", config, re.M)
    own, above = (_rows(text, here[1] if here else "") for text in (associations, accounts))
    by_name = {row["Account"]: row for row in above}
    return SitePolicy(
        frozenset(enforced[1].split(",") if enforced else ()), default.strip(),
        tuple(_association(row, by_name) for row in own),
        {limits.name.removeprefix("QOS "): limits for limits in map(_qos_limits, qos.splitlines())},
        _partitions(partitions),
    )  # fmt: skip


def _rows(text: str, cluster: str) -> list[dict[str, str]]:
    """The associations of `cluster`; of every one where its name is not known."""
    lines = [line.split("|") for line in text.splitlines() if line.count("|") == len(_ASSOCIATION) - 1]
    rows = [dict(zip(_ASSOCIATION, values, strict=True)) for values in lines]
    return [row for row in rows if row["Cluster"] == (cluster or row["Cluster"])]


def _association(row: Mapping[str, str], accounts: Mapping[str, Mapping[str, str]]) -> Association:
    name = row["Account"]
    # A group's limit is for all of its jobs together: one job above it can never start either.
    most = (parse_tres(row["MaxTRES"]), parse_tres(row["GrpTRES"]))
    limits = JobLimits(f"account {name}", _least(row["MaxSubmit"], row["GrpSubmit"]), minutes(row["MaxWall"]), most)
    groups = tuple(
        JobLimits(f"account {one['Account']}", _least(one["GrpSubmit"]), most=(parse_tres(one["GrpTRES"]),))
        for one in _line_up(name, accounts)
    )
    return Association(name, row["Partition"], tuple(row["QOS"].split(",")), row["DefaultQOS"], limits, groups)


def _line_up(name: str, accounts: Mapping[str, Mapping[str, str]]) -> Iterator[Mapping[str, str]]:
    """An account and those above it."""
    while name in accounts:
        yield accounts[name]
        name = accounts[name]["ParentName"]


def _qos_limits(line: str) -> JobLimits:
    name, of_user, of_account, of_all, wall, *most, least = line.split("|")
    submit = _least(of_user, of_account, of_all)
    return JobLimits(f"QOS {name}", submit, minutes(wall), tuple(map(parse_tres, most)), parse_tres(least))


def _partitions(text: str) -> dict[str, dict[str, str]]:
    """Every partition's settings by name; the default one also as ""."""
    found = {}
    for line in text.splitlines():
        values = dict(re.findall(r"(\w+)=(\S*)", line))
        found[values.get("PartitionName", "")] = values
        if values.get("Default") == "YES":
            found[""] = values
    return found


def _closed(partition: Mapping[str, str], account: str, qos: str) -> Iterator[str]:
    for key, name, what in (("AllowAccounts", account, "account"), ("AllowQos", qos, "QOS")):
        allowed = partition.get(key, "ALL")
        if allowed not in ("ALL", "N/A") and name not in allowed.lower().split(","):
            yield f"partition {partition['PartitionName']} is closed to {what} {name}: {allowed}"
    for key, name, what in (("DenyAccounts", account, "account"), ("DenyQos", qos, "QOS")):
        if name in partition.get(key, "").lower().split(","):
            yield f"partition {partition['PartitionName']} is closed to {what} {name}"


def _tres(resources: Resources) -> dict[str, float]:
    """What one task takes of everything that is counted."""
    each = {"gres/gpu": resources.gpus, "cpu": resources.cpus, "mem": resources.memory_gb or 0, "node": 1}
    if resources.gpu_type:
        each[f"gres/gpu:{resources.gpu_type}"] = resources.gpus
    return {name: resources.nodes * count for name, count in each.items()}


def parse_tres(text: str) -> dict[str, float]:
    """`cpu=4,mem=100G,gres/gpu=2`; memory and others that have a unit, such as `bb/flash=2T`, in GB."""
    pairs = [part.split("=", 1) for part in text.split(",") if "=" in part]
    return {name: float(value) if value.isdigit() else gigabytes(value) or 0.0 for name, value in pairs}


def _least(*counts: str) -> int | None:
    """The smallest of these limits, None where there is none."""
    return min((int(count) for count in counts if count.isdigit()), default=None)


@dataclass(frozen=True)
class Offer:
    """A site's partitions by name, none where Slurm is silent, and the rules for this user."""

    partitions: Mapping[str, Partition]
    policy: SitePolicy | None


def read_offer() -> Offer:
    """Ask Slurm for both."""
    with ThreadPoolExecutor(1) as pool:
        policy = pool.submit(read_policy)
        found = partitions() or {}
    return Offer(found, policy.result() if found else None)


def check_requests(pipeline: PipelineFile, plan: Plan, cluster: ClusterFile, offer: Offer) -> None:
    """Raise PipelineError for stages that Slurm would accept and never start; nothing is checked where it is silent."""
    problems = [
        f"{stage}: {text}"
        for stage in (by_stage(plan) if offer.partitions else {})
        for text in objections(
            cluster, resources_for(cluster, stage, pipeline.stages[stage].resources), offer.partitions, offer.policy
        )
    ]
    if problems:
        raise PipelineError(
            "this would never start", got="\n".join(["", *(f"    {line}" for line in problems)]),
            fix="correct these in the cluster file or the pipeline's `resources`",
        )  # fmt: skip


def by_stage(plan: Plan) -> dict[str, list[PlannedTask]]:
    """The plan's tasks, stage by stage."""
    return {stage: list(tasks) for stage, tasks in groupby(plan.tasks, key=lambda task: task.stage.name)}


def objections(
    cluster: ClusterFile, resources: Resources, offered: Mapping[str, Partition], policy: SitePolicy | None
) -> Iterator[str]:
    """Why a task with these resources would be refused, or never start."""
    yield from never_starts(resources, offered)
    yield from policy.objections(cluster, resources) if policy else ()
    if policy and cluster.advance and policy.submit_limit(cluster) == 1:  # it would wait for the room that it takes
        yield "the one job that may be submitted looks after the run: set `advance: false`, and run `prefmill advance`"


def never_starts(resources: Resources, offered: Mapping[str, Partition]) -> Iterator[str]:
    """Why a task with these resources would wait for ever; Slurm itself accepts such jobs."""
    unknown = [name for name in partition_names(resources.partition) if name not in offered]
    partition = offer_of(resources.partition, offered)
    if unknown or partition is None:
        known = ", ".join(sorted(name for name in offered if name))
        yield f"there is no partition '{unknown[0] or '(default)'}': {known}"
        return
    # Each is the largest that any node has: that no node has them all is for `sbatch --test-only` to say.
    limits = [
        ("nodes", resources.nodes, min(partition.nodes, partition.max_nodes or partition.nodes), ""),
        ("time_limit_minutes", resources.time_limit_minutes, partition.max_minutes, ""),
        ("gpus", resources.gpus, partition.gpus, " a node"),
        ("cpus", resources.cpus, partition.cpus, " a node"),
        ("memory_gb", resources.memory_gb, partition.memory_gb, " a node"),
    ]
    if not partition.up:
        yield f"partition {partition.name} is down"
    for name, wanted, limit, of_what in limits:
        if wanted is not None and limit is not None and wanted > limit:
            yield f"{name}: {wanted:g} asked for, {partition.name} has {limit:g}{of_what}"
