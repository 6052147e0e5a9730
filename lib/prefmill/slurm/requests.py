"""What a pipeline asks for against what the site's partitions have and its rules allow; no model is looked at."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

from prefmill.core.errors import PipelineError
from prefmill.pipeline.plan import PipelineFile, Plan, PlannedTask
from prefmill.slurm.cluster import ClusterFile, Resources, resources_for
from prefmill.slurm.partitions import Partition, offer_of, partition_names, partitions
from prefmill.slurm.policy import SitePolicy, read_policy


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
