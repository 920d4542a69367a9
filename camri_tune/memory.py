"""A process's memory: how much there is to be had, and how to keep it."""

import ctypes
import sys
from pathlib import Path

# What a container may have, has, and would give back, in which line: control groups of version 2, and of version 1.
_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.stat", "inactive_file"),
    (
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/memory/memory.usage_in_bytes",
        "/sys/fs/cgroup/memory/memory.stat",
        "total_inactive_file",
    ),
)


def free_memory() -> int | None:
    """Bytes that this machine, or this container, can still give; None where nobody says."""
    found = []
    info = _read("/proc/meminfo")
    if info is not None:
        found += [int(line.split()[1]) * 1024 for line in info.splitlines() if line.startswith("MemAvailable:")]
    for most, used, details, line in _GROUPS:
        limit, usage = _read(most), _read(used)
        if limit is not None and usage is not None and limit.strip().isdecimal():  # else "max"
            # Files that were read stay in memory as long as nobody needs it, and count as used.
            kept = next((n for name, n in map(str.split, (_read(details) or "").splitlines()) if name == line), 0)
            found.append(min(int(limit), max(0, int(limit) - int(usage) + int(kept))))
    return min(found, default=None)


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:
        return None


def keep_freed_memory() -> None:
    """Have this process keep memory that it frees: else glibc returns every large tensor to the system.

    A step on a CPU then spends a tenth of its time on pages that are handed out anew. Nothing where there is no glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
