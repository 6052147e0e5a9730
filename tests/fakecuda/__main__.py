"""Runs every case, sound and planted, on the fake device: `python -m tests.fakecuda HOOKS`; errors by case as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.fakecuda.device import load_hooks


def error_of(work: Callable[[], None]) -> str | None:
    """The end of what `work` raises, with the library's own lines; None where it raises nothing."""
    import traceback

    try:
        work()
    except Exception as error:
        frames = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)
                  if "prefmill" in frame.filename]  # fmt: skip
        return f"{type(error).__name__}: {error} at {' '.join(frames)}"
    return None


def main() -> None:
    """Print what came of every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hooks", type=Path, help="the compiled hooks.cpp")
    load_hooks(parser.parse_args().hooks)
    from tests.fakecuda import planted
    from tests.fakecuda.cases import CASES

    found = {name: error_of(work) for name, work in CASES.items()}
    found |= {name: error_of(partial(planted.run, name)) for name in planted.PLANTED}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
