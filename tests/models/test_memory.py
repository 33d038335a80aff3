"""The allocator setting does what it is for: freed tensors are not taken from the kernel anew."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

ALLOCATE = """
import resource, sys, torch
from models.memory import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def work(times):
    for _ in range(times):
        torch.zeros(16, 1 << 20) + 1  # two blocks of 64 MiB, more than glibc ever keeps of its own accord
work(20)  # until the heap has grown to what small blocks between the large ones leave room for
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
work(5)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str) -> int:
    command = [sys.executable, "-c", ALLOCATE, mode]
    return int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc has this setting")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    kept, default = faults("kept"), faults("default")
    assert kept < default / 4, (kept, default)
