"""Sites' rules, as sacctmgr and scontrol of 22.05 and 24.11 print them, against what a job asks for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_slurm import program  # noqa: F401 - a fixture

from prefmill.slurm.cluster import ClusterFile, Resources
from prefmill.slurm.partitions import Partition
from prefmill.slurm.policy import JobLimits, SitePolicy, objections, parse_tres, read_policy
from prefmill.slurm.script import refusal

# Of two clusters in the books of one slurmdbd; the second query is for the accounts' own.
ASSOCIATIONS = """old|mill|||short||1||00:01:00||
big|mill|||normal,short||9||01:40:00||
big|root|||normal||||||cpu=64
big|mill||closed|short|short|||||"""
ACCOUNTS = """old|mill|root||||||||cpu=1
big|mill|lab|||||||gres/gpu=1|
big|lab|root|||||7|||gres/gpu=16
big|root|||||||||"""
QOS = """normal||||||||
short|6|||00:30:00|cpu=4,gres/gpu=2|gres/gpu=4|mem=100G,node=2|gres/gpu=1
night||||08:00:00||||"""
PARTITIONS = """PartitionName=main AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL Default=YES QoS=N/A MaxTime=UNLIMITED
PartitionName=closed AllowGroups=ALL AllowAccounts=other AllowQos=ALL Default=NO QoS=night MaxTime=01:00:00
PartitionName=dear AllowGroups=ALL DenyAccounts=mill,old AllowQos=short Default=NO QoS=night MaxTime=01:00:00"""


@pytest.fixture
def policy(program: Path) -> SitePolicy:  # noqa: F811
    cases = f"""case "$3 $4" in "association user=") echo "{ACCOUNTS}";; association*) echo "{ASSOCIATIONS}";;
user*) echo mill;; qos*) echo "{QOS}";; esac"""
    enforced = "AccountingStorageEnforce = associations,limits,qos\nClusterName             = big"
    for name, text in (("sacctmgr", cases.replace("$3", "$3")), (
        "scontrol", f'case "$*" in *config*) echo "{enforced}";; *) echo "{PARTITIONS}";; esac'
    )):  # fmt: skip
        (program / name).write_text(f"#!/bin/sh\n{text}\n")
        (program / name).chmod(0o755)
    found = read_policy()
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("site", "asked", "said"),
    [
        ({}, {"time_limit_minutes": 100}, []),
        ({}, {"time_limit_minutes": 101}, ["time_limit_minutes: 101 asked for, account mill allows 100"]),
        ({"account": "nope"}, {}, ["account 'nope' is none of yours: mill, root"]),
        ({"account": "root", "qos": "short"}, {}, ["qos 'short' does not go with account root: normal",
                                                  "0 GPUs asked for, QOS short wants 1",
                                                  "time_limit_minutes: 60 asked for, QOS short allows 30"]),
        ({"account": "root"}, {"cpus": 65}, ["65 CPUs asked for, account root allows 64"]),
        ({}, {"gpus": 8, "nodes": 2, "time_limit_minutes": 10}, []),
        ({}, {"gpus": 8, "nodes": 3, "time_limit_minutes": 10}, ["24 GPUs asked for, account lab allows 16"]),
        ({"qos": "short"}, {"time_limit_minutes": 30, "gpus": 2, "cpus": 2, "memory_gb": 50}, []),
        ({"qos": "short"}, {"time_limit_minutes": 30, "gpus": 1, "nodes": 3, "memory_gb": 40, "cpus": 1},
         ["3 GPUs asked for, QOS short allows 2", "120 GB of memory asked for, QOS short allows 100",
          "3 nodes asked for, QOS short allows 2"]),
        ({}, {"partition": "dear", "time_limit_minutes": 60},
         ["partition dear is closed to QOS normal: short", "partition dear is closed to account mill"]),
        ({}, {"partition": "closed", "time_limit_minutes": 10, "gpus": 1},
         ["partition closed is closed to account mill: other"]),
        # Of several partitions one is enough, and Slurm takes names in any case.
        ({"account": "Mill", "qos": "NORMAL"}, {"partition": "dear,main", "time_limit_minutes": 60}, []),
        ({}, {"partition": "dear,closed", "time_limit_minutes": 10, "gpus": 1},
         ["partition dear is closed to QOS normal: short", "partition dear is closed to account mill",
          "partition closed is closed to account mill: other"]),
        ({}, {"options": {"qos": "short", "account": "mill"}, "gpus": 5, "time_limit_minutes": 1},
         ["5 GPUs asked for, QOS short allows 2", "5 GPUs asked for, QOS short allows 4"]),
    ],
)  # fmt: skip
def test_what_the_rules_forbid_is_named(
    policy: SitePolicy, site: dict[str, Any], asked: dict[str, Any], said: list[str]
) -> None:
    found = policy.objections(ClusterFile.model_validate(site), Resources.model_validate(asked))
    assert sorted(found) == sorted(said)


def test_the_number_of_jobs_at_once(policy: SitePolicy) -> None:
    assert policy.submit_limit(ClusterFile()) == 7  # of the account above, where the user may have 9
    assert policy.submit_limit(ClusterFile(qos="short")) == 6
    assert policy.submit_limit(ClusterFile(account="root")) is None


def test_a_run_that_would_wait_for_its_own_follow_up_job_is_refused(policy: SitePolicy) -> None:
    """Where one job may be submitted, as in many a QOS to debug in, that job was it: nothing ever came after it."""
    alone = replace(policy, qos={**policy.qos, "normal": JobLimits("QOS normal", submit=1)})
    offered = {name: Partition(name, 4, None, None, 8, 64.0, 8) for name in ("", "main")}
    found = [list(objections(ClusterFile(advance=advance), Resources(), offered, alone)) for advance in (True, False)]
    assert [len(said) for said in found] == [1, 0]
    assert "set `advance: false`" in found[0][0]
    assert list(objections(ClusterFile(), Resources(), offered, policy)) == []


@pytest.mark.parametrize(("told", "refused"), [
    ("sbatch: error: QOSMaxSubmitJobPerUserLimit\nallocation failure: Job violates accounting/QOS policy", False),
    ("sbatch: error: AssocGrpSubmitJobsLimit\nallocation failure: Job violates accounting/QOS policy", False),
    ("sbatch: error: QOSMaxWallDurationPerJobLimit\nallocation failure: Job violates accounting/QOS policy", True),
])  # fmt: skip
def test_a_limit_on_submitted_jobs_that_is_full_for_now_forbids_nothing(
    program: Path,  # noqa: F811
    told: str,
    refused: bool,
) -> None:
    """`estimate` said of a site where as many jobs were queued as may be that the run would never start."""
    for name, text in (("sbatch", f"printf '%s\\n' '{told}' >&2; exit 1"), ("sinfo", "exit 0")):
        (program / name).write_text(f"#!/bin/sh\n{text}\n")
        (program / name).chmod(0o755)
    assert bool(refusal(ClusterFile(), Resources())) == refused


def test_what_is_not_enforced_is_not_held_against_a_job(policy: SitePolicy) -> None:
    lenient = SitePolicy(frozenset(), policy.default_account, policy.associations, policy.qos, policy.partitions)
    for site in ({"account": "nope"}, {"qos": "short"}):
        assert list(lenient.objections(ClusterFile.model_validate(site), Resources(time_limit_minutes=999))) == []


def test_a_site_without_accounting_has_no_policy(program: Path) -> None:  # noqa: F811
    (program / "sacctmgr").write_text("#!/bin/sh\nexit 1\n")
    (program / "sacctmgr").chmod(0o755)
    assert read_policy() is None
    assert parse_tres("cpu=4,mem=1.5T,gres/gpu=2") == {"cpu": 4, "mem": 1536, "gres/gpu": 2}
    assert parse_tres("bb/flash=2T,mem=1P") == {"bb/flash": 2048, "mem": 1 << 20}
