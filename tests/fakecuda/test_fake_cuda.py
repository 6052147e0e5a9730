"""Forward and backward of every family as on a GPU: no tensor of another device, nothing read back in between."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from tests.conftest import REPOSITORY
from tests.fakecuda.cases import CASES
from tests.fakecuda.device import compile_hooks
from tests.fakecuda.planted import PLANTED


@pytest.fixture(scope="session")
def errors(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    """What every case raised, in a process of its own: the device would be there for other tests as well."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler to build the fake CUDA device with: install g++ to run this")
    if torch.backends.cuda.is_built():
        pytest.skip("the fake CUDA device takes the real one's place: `make test` installs torch for CPUs to run this")
    hooks = compile_hooks(tmp_path_factory.mktemp("fakecuda"), compiler)
    command = [sys.executable, "-m", "tests.fakecuda", str(hooks)]
    done = subprocess.run(
        command, cwd=REPOSITORY, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, str | None] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", list(CASES))
def test_everything_stays_on_the_device(errors: dict[str, str | None], name: str) -> None:
    assert errors[name] is None


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PLANTED))
def test_a_planted_fault_is_found(errors: dict[str, str | None], name: str) -> None:
    error = errors[name]
    assert error is not None, "the fault went unseen"
    assert PLANTED[name][2] in error
