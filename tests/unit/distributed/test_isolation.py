"""Work in a process of its own: what it leaves, how its failures come back, and that it ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefmill.core.errors import AttemptError, InputError, PrefmillError
from prefmill.distributed import isolation
from prefmill.distributed.isolation import in_own_process


def note_process(path: Path) -> None:
    path.write_text(str(os.getpid()))


def refuse(path: Path) -> None:
    raise InputError("no good", where=path, got=3, expected="4", fix="fix it")


def fill_the_disk(path: Path) -> None:
    raise OSError(28, "No space left on device", str(path))


def run_out_of_memory() -> None:
    raise MemoryError("CUDA out of memory")


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_it_runs_in_another_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Forked where there is no GPU, started anew where there is one."""
    monkeypatch.setattr(isolation, "_start_method", lambda: method)
    in_own_process(tmp_path, note_process, tmp_path / "pid")
    assert int((tmp_path / "pid").read_text()) != os.getpid()
    with pytest.raises(InputError, match="no good"):
        in_own_process(tmp_path, refuse, tmp_path)


def test_an_error_a_user_can_mend_comes_back_whole(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        in_own_process(tmp_path, refuse, tmp_path)
    assert str(caught.value) == str(InputError("no good", where=tmp_path, got=3, expected="4", fix="fix it"))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PrefmillError, match="cannot write: No space left on device"):
        in_own_process(tmp_path, fill_the_disk, tmp_path / "big")


def test_what_decides_on_a_retry_is_passed_on(tmp_path: Path) -> None:
    with pytest.raises(AttemptError, match="CUDA out of memory") as caught:
        in_own_process(tmp_path, run_out_of_memory)
    assert caught.value.record == {"kind": "MemoryError"}
    with pytest.raises(AttemptError, match="ended by SIGKILL") as caught:
        in_own_process(tmp_path, be_killed)
    assert caught.value.record == {"exit_code": -9, "signal": "SIGKILL", "kind": "ProcessEnded"}


@pytest.mark.timing
def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom prefmill.distributed.isolation import in_own_process\n"
        "def work(path):\n    import os\n    path.write_text(str(os.getpid())); time.sleep(600)\n"
        "folder = Path(sys.argv[1])\nin_own_process(folder, work, folder / 'pid')\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    deadline = time.monotonic() + 120
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert parent.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    child = Path(f"/proc/{(tmp_path / 'pid').read_text()}/stat")
    while child.exists() and child.read_text().split(") ")[1][0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_sockets_have_short_paths_where_tmpdir_is_long(tmp_path: Path) -> None:
    folder = tmp_path / ("a-cluster's-folder-for-this-job/" * 4)
    folder.mkdir(parents=True)
    code = (
        "import tempfile; from multiprocessing.connection import Listener; from pathlib import Path\n"
        "from prefmill.distributed.isolation import keep_socket_paths_short\n"
        "keep_socket_paths_short()\n"
        "with Listener(None, 'AF_UNIX') as one: print(Path(one.address).parent, tempfile.gettempdir(), sep='\\n')"
    )
    environment = {**os.environ, "TMPDIR": str(folder)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    sockets, others = map(Path, done.stdout.splitlines())
    assert others == folder
    assert sockets.parent == Path("/tmp")
    assert not sockets.exists()
