"""Main memory: kept between steps, given back between chunks of one, and how much of it a run has used."""

from __future__ import annotations

import ctypes
import sys

import torch

# The options of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_PAD = 256 * 2**20  # bytes by which the heap grows at least; untouched pages cost nothing


def keep_freed_memory() -> bool:
    """Let glibc keep large blocks for the next tensor of that size; whether it could be told so.

    By default a freed tensor above 32 MB goes back to the kernel, and the next one is new pages, zeroed one by one: a
    third of the time of a decoder's forward and backward (docs/performance.md). The process then keeps its peak.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is None:
        return False
    options = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_TOP_PAD, _PAD))
    return all([mallopt(option, value) == 1 for option, value in options])


def give_back_freed_memory() -> bool:
    """Let glibc return the pages that it holds free; whether it could be told so.

    What a chunk of prompts leaves for the backward pass is small but lies between large freed tensors, and the next
    chunk's fit into none of the gaps: kept, they add up over the chunks.
    """
    if not sys.platform.startswith("linux"):
        return False
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and trim(0) == 1


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the GPU's memory by tensors, on a CPU by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def readable(count: float) -> str:
    """Bytes as people say them: 1.4 GiB."""
    units = ("B", "KiB", "MiB", "GiB", "TiB")
    power = 0
    while count >= 1024 and power < len(units) - 1:
        count, power = count / 1024, power + 1
    return f"{count:.1f} {units[power]}" if power else f"{count:.0f} B"
