"""prefmill from a wheel, in an empty folder: init, run, status, compare, restore, gc, rm, and a stage by hand."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from pipeline_runs import SMALL

from tests.documented_runs import clean_copy

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in place of site-packages, into which the wheel of a clean copy is unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    clean_copy(folder / "checkout")
    build = "from setuptools import build_meta as b; import sys; b.build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=folder / "checkout", check=True, capture_output=True)
    (wheel,) = folder.glob("prefmill-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    shutil.rmtree(folder / "checkout")
    return folder / "site"


def test_a_wheel_has_one_top_level_package(site: Path) -> None:
    names = {path.name for path in site.iterdir() if not path.name.endswith(".dist-info")}
    assert names == {"prefmill"}
    (listed,) = site.glob("*.dist-info/top_level.txt")
    assert listed.read_text().split() == ["prefmill"]


def test_an_installed_checkout_still_has_its_stages_from_any_folder(tmp_path: Path) -> None:
    """Built as `pip install -e .` builds it: its finder maps both names to the checkout's folders."""
    clean_copy(tmp_path / "checkout")
    build = "from setuptools import build_meta as b; import sys; b.build_editable(sys.argv[1])"
    command = [sys.executable, "-c", build, str(tmp_path)]
    subprocess.run(command, cwd=tmp_path / "checkout", check=True, capture_output=True)
    (wheel,) = tmp_path.glob("prefmill-*.whl")
    archive = zipfile.ZipFile(wheel)
    (finder,) = (name for name in archive.namelist() if name.endswith("_finder.py"))
    mapping = archive.read(finder).decode()
    assert f"'stages': '{tmp_path / 'checkout' / 'stages'}'" in mapping
    assert "prefmill.stages" not in mapping


def test_from_an_empty_folder_to_a_comparison(site: Path, tmp_path: Path) -> None:
    def shell(*words: str, folder: Path = tmp_path / "work") -> str:
        environment = {**os.environ, "PYTHONPATH": str(site), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def prefmill(*words: str) -> str:
        return shell(sys.executable, "-P", "-m", "prefmill.cli.main", *words)

    assert "next: cd work" in shell(sys.executable, "-P", "-m", "prefmill.cli.main", "init", "work", folder=tmp_path)
    # Messages name pages: they are laid down too, with the commands of an installed package.
    assert "python -m prefmill.stages.dpo" in (tmp_path / "work" / "docs" / "stages" / "dpo.md").read_text()
    demo = "configs/pipelines/demo.yaml"
    printed = prefmill("run", demo, *SMALL)
    assert str(tmp_path / "work" / "data" / "demo" / "report") in printed
    assert "taken from run demo" in prefmill("run", demo, "run=other", *SMALL, "report.seed=1")
    assert "14 complete" in prefmill("status")
    assert "seed" in prefmill("compare", "demo", "other")
    report = tmp_path / "work" / "data" / "demo" / "report" / "all"
    before = (report / "manifest.json").read_text()
    prefmill("run", demo, *SMALL, "report.seed=2")
    assert f"report:all restored: {report}" in prefmill("restore", "report", "--run", "demo")
    assert (report / "manifest.json").read_text() == before
    assert "nothing was deleted" in prefmill("gc")
    prefmill("gc", "--yes")
    models = list((tmp_path / "work" / "checkpoints" / "demo").rglob("model.safetensors"))
    assert sorted(path.parent.parent.name for path in models) == ["dpo", "sft", "tiny_model"]  # one copy of each
    prefmill("rm", "other", "--yes")
    assert [line.split()[0] for line in prefmill("runs").splitlines()[1:]] == ["demo"]
    assert "14 complete" in prefmill("status")  # the newest is now the one that is left
    help_text = shell(sys.executable, "-P", "-m", "prefmill.stages.dpo", "--help")
    assert "python -m prefmill.stages.dpo configs/dpo/demo.yaml" in help_text
    assert subprocess.run(["bash", "-n", str(tmp_path / "work" / "sbatch" / "_env.sh")], check=False).returncode == 0
    assert sys.executable in (tmp_path / "work" / "sbatch" / "_env.sh").read_text()
