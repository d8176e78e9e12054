"""A disk without room, for the time of a test."""

import contextlib
import resource


@contextlib.contextmanager
def full_disk(n_bytes=0):
    """No file grows beyond `n_bytes`: what a full disk is to a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
