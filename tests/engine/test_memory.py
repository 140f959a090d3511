"""Memory that is kept, and memory that is counted."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
import torch

from samlet.engine.memory import peak_memory, readable

FAULTS = """
import resource, sys, torch
from samlet.engine.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(77)
for _ in range(12):
    torch.ones(16 * 2**20).add_(1)  # 64 MiB
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.ones(16 * 2**20).add_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(mode: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=False)
    if done.returncode == 77:
        pytest.skip("this C library has no mallopt")
    return int(done.stdout)


def test_large_blocks_are_paid_for_once() -> None:
    assert page_faults("keep") < 0.05 * page_faults("give back")


def test_the_peak_of_a_process_counts_what_it_held() -> None:
    device = torch.device("cpu")
    before = peak_memory(device)
    held = torch.ones(64 * 2**20)  # 256 MiB
    assert peak_memory(device) >= before
    assert peak_memory(device) >= held.nbytes
    assert peak_memory(device) == resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize(("count", "text"), [(12, "12 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB")])
def test_bytes_are_readable(count: int, text: str) -> None:
    assert readable(count) == text
