"""Cluster files: what is refused, how resources are layered, secrets."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefmill.core.config import validate
from prefmill.core.errors import ConfigError
from prefmill.slurm.advance import retry_options
from prefmill.slurm.cluster import ClusterFile, Resources, not_taken_along, read_cluster, read_secrets, resources_for
from tests.conftest import REPOSITORY


@pytest.mark.parametrize(
    "path", sorted((REPOSITORY / "configs" / "clusters").glob("*.yaml")), ids=lambda path: path.stem
)
def test_shipped_cluster_files_load(path: Path) -> None:
    assert read_cluster(path).resources["partition"]


def test_the_pipeline_wins_over_the_stage_and_the_stage_over_the_site() -> None:
    values = {"resources": {"time_limit_minutes": 10, "cpus": 2, "gpus": 1}, "stages": {"sft": {"cpus": 4, "gpus": 8}}}
    cluster = validate(ClusterFile, values)
    given = resources_for(cluster, "sft", {"gpus": 4})
    assert (given.time_limit_minutes, given.cpus, given.gpus, given.nodes) == (10, 4, 4, 1)
    assert resources_for(cluster, "dpo").gpus == 1


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"partiton": "x"}, "did you mean 'partition'"),
        ({"gpus": -1}, "greater than or equal to 0"),
        ({"options": {"array": "0-3"}}, "decided by prefmill"),
        ({"options": {"export": "ALL"}}, "decided by prefmill"),
        ({"options": {"chdir": "/x"}}, "decided by prefmill"),
        ({"options": {"x y": 1}}, "no long option"),
        ({"options": {"time": "1-00:00:00"}}, "said by the key time_limit_minutes"),
        ({"gpus": 8, "options": {"gpus-per-node": "h100:8"}}, "said by the key gpus and gpu_type"),
        ({"options": {"gres": "gpu:h100:8"}}, "said by the key gpus and gpu_type"),
        ({"memory_gb": 4, "options": {"mem-per-cpu": "4G"}}, "both say the memory"),
    ],
)
def test_wrong_resources_are_explained(values: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resources_for(validate(ClusterFile, {}), "sft", values)


def test_options_that_no_key_says_are_the_sites() -> None:
    options = {"mem": 0, "gres": "lscratch:100", "exclude": "n[1-2]", "constraint": "ib"}
    cluster = validate(ClusterFile, {"resources": {"memory_gb": 4}, "stages": {"sft": {"memory_gb": None}}})
    assert resources_for(cluster, "sft", {"options": options}).options == options


def test_an_option_that_is_false_is_none() -> None:
    """A stage that took back `exclusive: true` of its site asked Slurm for `--exclusive=False`, which refuses that."""
    site = validate(ClusterFile, {"resources": {"options": {"exclusive": True}}})
    own = {"options": {"exclusive": False, "nice": 0, "constraint": "ib"}}
    assert resources_for(site, "sft", own).options == {"nice": 0, "constraint": "ib"}


def test_a_retry_leaves_out_the_sites_own_nodes_too() -> None:
    site = Resources(options={"exclude": "n[1-2]"})
    assert retry_options(site, 1.5, ["n7"]) == ("--mem=1536M", "--exclude=n[1-2],n7")
    assert retry_options(Resources(), None, ["n7", "n8"]) == ("--exclude=n7,n8",)
    assert retry_options(site, None, []) == ()  # the script's own stands


@pytest.mark.parametrize("name", ["A=b", "a b", "$(id)", "1x", ""])
def test_names_of_variables_carry_no_values(name: str) -> None:
    with pytest.raises(ConfigError, match=r"export\[0\]: no name of an environment variable; write its name"):
        validate(ClusterFile, {"export": [name]})


def test_a_secret_is_not_exported(tmp_path: Path) -> None:
    file = secrets_file(tmp_path, "TOKEN=x\n")
    config = tmp_path / "cluster.yaml"
    config.write_text(f"export: [TOKEN]\nsecrets: {{file: {file}, names: [TOKEN]}}\n")
    with pytest.raises(ConfigError, match="exported and a secret"):
        read_cluster(config)


def test_what_libraries_read_here_and_jobs_do_not_get_is_named(tmp_path: Path) -> None:
    cluster = with_secrets(secrets_file(tmp_path, "HF_TOKEN=x\n"), ["HF_TOKEN"])
    cluster = cluster.model_copy(update={"export": ["HF_HOME"], "setup": ["export NCCL_IB_HCA=mlx5"]})
    here = dict.fromkeys(["HF_HOME", "HF_TOKEN", "NCCL_IB_HCA", "HF_HUB_OFFLINE", "https_proxy", "EDITOR", "PATH"], "v")
    (note,) = not_taken_along(cluster, here)
    assert note.startswith("set here, and not for jobs: HF_HUB_OFFLINE, https_proxy (")
    assert list(not_taken_along(cluster, {"HF_HOME": "v"})) == []


def test_secrets_are_read_by_name(tmp_path: Path) -> None:
    text = "# TOKEN=no\nexport TOKEN='a=b c'\nOTHER=no\n KEY = plain \n"
    cluster = with_secrets(secrets_file(tmp_path, text), ["TOKEN", "KEY"])
    assert cluster.secrets is not None
    assert read_secrets(cluster.secrets) == {"TOKEN": "a=b c", "KEY": "plain"}
    assert "TOKEN" not in cluster.exported


@pytest.mark.parametrize(
    ("mode", "text", "said"),
    [(0o640, "TOKEN=x", "others can read"), (0o604, "TOKEN=x", "others can read"), (0o600, "TOKE=x", "has no TOKEN")],
)
def test_secrets_others_can_read_or_that_are_missing_are_refused(
    tmp_path: Path, mode: int, text: str, said: str
) -> None:
    file = secrets_file(tmp_path, text)
    file.chmod(mode)
    cluster = with_secrets(file, ["TOKEN"])
    assert cluster.secrets is not None
    with pytest.raises(ConfigError, match=said) as caught:
        read_secrets(cluster.secrets)
    assert "=x" not in str(caught.value)


def secrets_file(folder: Path, text: str) -> Path:
    """A file of secrets as it should be."""
    path = folder / "secrets.env"
    path.write_text(text)
    path.chmod(0o600)
    return path


def with_secrets(file: Path, names: list[str]) -> ClusterFile:
    """A cluster file that has nothing but secrets."""
    return validate(ClusterFile, {"secrets": {"file": str(file), "names": names}})
