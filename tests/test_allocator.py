"""Memory that is kept between passes: fewer pages are mapped anew."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from mpq_plugins._allocator import keeping_memory

_SIZE = 64 * 2**18  # floats: 64 MiB, which glibc would map for each tensor


def page_faults(n_tensors):
    """Pages that the kernel gave while tensors were made and freed one after another."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(n_tensors):
        torch.ones(_SIZE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident_pages():
    """Pages of the process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1])


glibc_only = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told to keep memory")


@glibc_only
def test_a_freed_tensor_is_used_again():
    """Once warm, twenty tensors one after another need the pages of two at most; in the end they are given back."""
    pages_of_one = _SIZE * 4 / resource.getpagesize()
    before = resident_pages()
    with keeping_memory():
        page_faults(20)
        with keeping_memory():
            pass
        assert page_faults(20) < 3 * pages_of_one
    assert resident_pages() < before + 2 * pages_of_one


def test_an_error_passes_through_and_ends_it():
    """It is a plain context: also usable as a decorator, errors go on."""

    @keeping_memory()
    def fail():
        raise ValueError("mine")

    for _ in range(2):
        with pytest.raises(ValueError, match="mine"):
            fail()
