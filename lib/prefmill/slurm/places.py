"""Which file system a path is on."""

from __future__ import annotations

from pathlib import Path

LOCAL_FILESYSTEMS = {"ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "tmpfs", "zfs", "f2fs"}
_MOUNTS = Path("/proc/self/mounts")


def filesystem(path: Path) -> str:
    """The kind of file system that holds `path` or will, as `ext4` or `nfs4`; "" where that is not known."""
    try:
        lines = [line.split(" ") for line in _MOUNTS.read_text().splitlines()]
    except OSError:
        return ""
    # The kernel writes a space in a path as \040, since spaces part its fields.
    mounts = {Path(fields[1].replace("\\040", " ")): fields[2] for fields in lines}
    absolute = path.absolute()
    return next((mounts[parent] for parent in (absolute, *absolute.parents) if parent in mounts), "")
