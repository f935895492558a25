"""How much memory this process uses, and how much more it may take."""

from __future__ import annotations

import contextlib
import ctypes
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

CGROUPS = Path("/sys/fs/cgroup")
M_MMAP_THRESHOLD = -3  # malloc.h
LARGE_ARRAY_BYTES = 4 * 2**20


def resident_bytes() -> int:
    """The resident set of this process now."""
    return _status("VmRSS") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory_bytes() -> int:
    """The largest resident set of this process so far, or since `reset_peak_memory`."""
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reset_peak_memory() -> None:
    """Start a new measurement of the peak, so that stages of one process can be told apart."""
    with contextlib.suppress(OSError):  # a sandbox may forbid it; the peak is then the process's
        Path("/proc/self/clear_refs").write_text("5")
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_device_bytes(device: torch.device) -> int | None:
    """The most that tensors took on a GPU since `reset_peak_memory`; None for the CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def return_large_arrays() -> None:
    """From now on, give arrays of a few megabytes back to the system as soon as they are freed.

    glibc does so by default until the first of them is freed; then it moves its threshold up to
    32 MB, and the heap keeps their holes: 935 MB instead of 670 MB at the peak of a run that needs
    630. Pages that come new from the system cost time (5 s in 14 with a threshold of 2 MB and
    batches of 16 MB), so batches of small models stay below it (`pipeline.BATCH_BYTES`), and then
    none was measured. Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_ARRAY_BYTES)


@contextlib.contextmanager
def without_triton() -> Iterator[None]:
    """Where torch is built for the CPU: imports inside find no Triton, later ones do.

    transformers imports torch._dynamo, and that Triton wherever it is installed: 70 MB (Triton 3.9)
    for kernels that such a build never starts.
    """
    hidden = torch.version.cuda is None and torch.version.hip is None
    hidden = hidden and "triton" not in sys.modules
    if hidden:
        sys.modules["triton"] = None  # type: ignore[assignment]  # Python's word for "not there"
    try:
        yield
    finally:
        if hidden:
            del sys.modules["triton"]


def release_free_memory() -> None:
    """Give freed pages of the heap back to the system, where the C library (glibc) can."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def available_bytes() -> int:
    """What this process can still take: of the machine, its cgroup, and its own limits."""
    room = [_meminfo("MemAvailable")]
    for limit, used in ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData")):
        soft, _ = resource.getrlimit(limit)
        if soft != resource.RLIM_INFINITY:
            room.append(soft - (_status(used) or 0))
    # A cgroup's usage counts cached files, which give way: only what is resident counts here.
    room += [limit - resident_bytes() for limit in _cgroup_limits()]
    return max(0, min(room))


def _cgroup_limits() -> list[int]:
    """Memory limits, in bytes, of the cgroups (v1 or v2) that this process is in."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                base, name = CGROUPS, "memory.max"
            elif "memory" in controllers.split(","):
                base, name = CGROUPS / "memory", "memory.limit_in_bytes"
            else:
                continue
            inside = Path(path.lstrip("/"))
            for folder in (base / inside, *(base / parent for parent in inside.parents)):
                with contextlib.suppress(OSError, ValueError):  # "max" is no number: no limit
                    found.append(int((folder / name).read_text(encoding="utf-8")))
    return found


def _meminfo(key: str) -> int:
    return _kilobytes(Path("/proc/meminfo"), key) or 2**62  # no such file: no limit known


def _status(key: str) -> int | None:
    return _kilobytes(Path("/proc/self/status"), key)


def _kilobytes(path: Path, key: str) -> int | None:
    with contextlib.suppress(OSError):
        text = path.read_text(encoding="utf-8")
        if found := re.search(rf"^{key}:\s*(\d+) kB", text, re.MULTILINE):
            return int(found[1]) * 1024
    return None
