"""Fixtures shared by every test."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from xdist.remote import Producer
from xdist.scheduler import LoadScopeScheduling

pytest_plugins = ["tests.documented_runs"]

# Before torch is imported: tests on a shared machine are steadier with one thread, and forked ranks need it.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# An example that is drawn while other work holds the cores is late and not wrong.
settings.register_profile("shared machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared machine")

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data beside the checkout; a test that needs it is skipped elsewhere."""
    folder = Path(os.environ.get("PREFMILL_TEST_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("the real data is not beside this checkout: set PREFMILL_TEST_DATA to its folder to run this test")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--repeat`, which `make test-timing` uses."""
    parser.addoption("--repeat", type=int, default=1, help="run every test so often")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make each repetition a test of its own, with fixtures and temporary folders of its own."""
    times = metafunc.config.getoption("repeat")
    if times > 1:
        metafunc.fixturenames.append("repetition")
        metafunc.parametrize("repetition", range(times))


# The dear first; vLLM last, as a process that has run it can no longer fork ranks that train.
FOLDERS_IN_ORDER = ("slurm", "e2e", "docs", "models", "fakecuda", "unit", "gpu", "vllm")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Where several processes share the tests, short files near the end keep all busy to the last."""
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: FOLDERS_IN_ORDER.index(_folder(item)))


def pytest_collection_finish() -> None:
    """Spare these processes looks at all that was imported, and waits for the disk.

    Both took 13 % of a profiled run of the quick tests in one process. The Trainer collects garbage at the end of every
    training: of what is young alone here. Files that no test reads after a power cut need not be on the disk.
    """
    gc.collect()
    gc.freeze()
    collect = gc.collect
    gc.collect = lambda generation=1: collect(generation)
    os.fsync = lambda _: None


class _ByFile(LoadScopeScheduling):
    """A file's tests run in one process, with its fixtures, and all of those of the one cluster."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return "slurm" if file.startswith("tests/slurm/") else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """How files go to processes, where there are several."""
    return _ByFile(config, log)


def _folder(item: pytest.Item) -> str:
    return item.path.relative_to(REPOSITORY).parts[1]


@pytest.fixture(autouse=True)
def _own_cluster_only(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the cluster's own tests see the cluster, which stays up until the last test has run."""
    if _folder(request.node) != "slurm":
        monkeypatch.delenv("SLURM_CONF", raising=False)


@pytest.fixture(autouse=True)
def _environment_is_put_back() -> Iterator[None]:
    """A training run in this process points trackers at its own logs: later commands would write there as well."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def left_out(component: str, missing: str) -> None:
    """Skip a test whose program is missing where PREFMILL_TEST_WITHOUT names its component; fail it elsewhere."""
    reason = f"not installed: {missing}; as root on Debian: bash tests/system_packages.sh"
    if component in os.environ.get("PREFMILL_TEST_WITHOUT", "").split(","):
        pytest.skip(reason)
    pytest.fail(f"{reason}. PREFMILL_TEST_WITHOUT={component} leaves its tests out")


@pytest.fixture(scope="session")
def chromium() -> str:
    """The browser's program."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        left_out("chromium", "chromium")
    return str(found)


@pytest.fixture(scope="session")
def reviews_file(shared_data: Path) -> Path:
    """The real ICLR reviews."""
    path = shared_data / "reviews" / "iclr_reviews.jsonl.gz"
    if not path.is_file():
        pytest.skip("iclr_reviews.jsonl.gz is not in the data folder: put it there to run this test")
    return path


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what every folder of tests has cost, setup included, the dearest first."""
    seconds: dict[str, float] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                folder = report.nodeid.split("::")[0].rpartition("/")[0]
                seconds[folder] = seconds.get(folder, 0.0) + report.duration
    terminalreporter.section("time by folder")
    for folder, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        terminalreporter.write_line(f"{spent:8.1f} s  {folder}")
    terminalreporter.write_line(f"{sum(seconds.values()):8.1f} s  in all")
