"""What a disk says to a file: asked by trying, as a quota is seen in no other way."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

_SMALL = 1 << 20


def refusal(folder: Path, num_bytes: int) -> OSError | None:
    """What the disk says to a file of that size in `folder`; None where it takes it."""
    probe = folder / f".room.{secrets.token_hex(4)}"
    try:
        with probe.open("wb") as stream:
            # A file that is only made longer takes no blocks, and no quota would object.
            os.posix_fallocate(stream.fileno(), 0, num_bytes)
    except OSError as error:
        error.filename = str(folder)
        return error
    finally:
        with contextlib.suppress(OSError):  # a read-only disk refuses that too, of a file that is not there
            probe.unlink()
    return None


def refusal_untold(path: Path, otherwise: int) -> OSError:
    """Why `path` could not be written, for a library that does not say; `otherwise` where another file fits now."""
    said = refusal(path if path.is_dir() else path.parent, _SMALL)
    number = said.errno if said and said.errno else otherwise
    return OSError(number, os.strerror(number), str(path))
