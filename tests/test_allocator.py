"""Memory that is kept between passes: fewer pages are mapped anew, and in the end things are as before."""

import platform
import resource
from pathlib import Path

import pytest
import torch

from mpq_plugins.common import allocator
from mpq_plugins.common.allocator import keeping_memory

_SIZE = 40 * 2**18  # floats: 40 MiB, which glibc maps for each tensor wherever its threshold has moved to
_PAGES = _SIZE * 4 / resource.getpagesize()


def resident():
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def page_faults(n_tensors):
    """Pages that the kernel gave this thread while tensors were made and freed one after another."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    for _ in range(n_tensors):
        torch.ones(_SIZE)
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


@pytest.fixture
def keeps(monkeypatch):
    """Skips where the kernel or the C library does not show what is kept, or does not keep it."""
    for name in allocator._SET_BY_USERS:
        monkeypatch.delenv(name, raising=False)
    library = allocator._glibc()
    if platform.libc_ver()[0] != "glibc" or library is None:
        pytest.skip("only glibc is told to keep memory")
    if not library.mallopt(allocator._MMAP, allocator._KEEP):
        pytest.skip("this release keeps no tensors of this size")
    allocator._set(library, allocator._USUAL)
    library.malloc_trim(0)
    if page_faults(20) < 15 * _PAGES:
        pytest.skip("huge pages: single ones are not counted")


@pytest.mark.usefixtures("keeps")
def test_a_freed_tensor_is_used_again():
    """Once warm, twenty tensors need the pages of a few. When it is over the memory is given back."""
    with keeping_memory():
        together = [torch.ones(_SIZE) for _ in range(5)]
        held = resident()
        del together
        with keeping_memory():
            pass
        assert resident() > held - _SIZE * 4
        assert page_faults(20) < 6 * _PAGES
    assert resident() < held - 3 * _SIZE * 4


@pytest.mark.usefixtures("keeps")
def test_an_error_passes_through_and_ends_it():
    """It is a plain context: also usable as a decorator, errors go on."""

    @keeping_memory()
    def fail():
        raise ValueError("mine")

    for _ in range(2):
        with pytest.raises(ValueError, match="mine"):
            fail()
    assert allocator._depth == 0


@pytest.mark.parametrize("name", allocator._SET_BY_USERS)
def test_what_users_set_is_left_alone(monkeypatch, name):
    """Thresholds in the environment are the user's."""
    monkeypatch.setenv(name, "1000000")
    monkeypatch.setattr(allocator, "_set", lambda *_: pytest.fail("thresholds were set"))
    with keeping_memory():
        pass
