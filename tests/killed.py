"""Processes that are killed (SIGKILL) when they touch a file for the n-th time; a script too, for commands."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_EVENTS = frozenset(("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod"))


def in_child(work: Callable[[], object], kill_at: int = 0, only: str = "") -> int:
    """Exit code of `work` in a forked process, -9 where it was killed at its `kill_at`-th touch of a file.

    Those count whose path has `only` in it.
    """
    pid = os.fork()
    if pid:
        return _ended(pid)
    touched = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal touched
        if event in _EVENTS or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
            touched += only in str(arguments[0])
            if touched == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    code = 1
    try:
        if kill_at:
            sys.addaudithook(count)
        result = work()
        code = result if isinstance(result, int) else 0
    finally:
        os._exit(code)


def _ended(pid: int) -> int:
    """The exit code of a process; one that hangs, on a lock that a thread held at the fork, is an error after a minute."""
    for _ in range(6000):
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError("the forked process did not end in a minute")


def killed_everywhere(work: Callable[[], object]) -> Iterator[int]:
    """Run `work` again and again, killed one touch later each time, until it comes to its end."""
    kill_at = 1
    while (code := in_child(work, kill_at)) == -signal.SIGKILL:
        yield kill_at
        kill_at += 1
    assert code == 0
    assert kill_at > 3  # it did touch files


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def net() -> Any:
    """A tiny network, for commands."""
    from torch import manual_seed, nn

    manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def batches() -> list[Any]:
    """Two labelled batches for it."""
    from torch import Generator, arange, randn

    generator = Generator().manual_seed(0)
    return [(randn(4, 1, 8, 8, generator=generator), arange(4) % 3) for _ in range(2)]


def _commands(root: Path) -> None:
    """Kill each stage in the middle, give the same command again, and compare with a run never killed."""
    from torch import set_num_threads

    from mpq_plugins.cli.parser import main

    set_num_threads(1)  # threads do not survive a fork
    model = f"{__file__}:net"
    data = ["--model", model, "--data", f"{__file__}:batches", "--quiet"]
    stages = {  # with the touch that kills
        "allocate": (["allocate", *data, "--budget", "size=w4", "--proxy", "loss-increase", "--cache", "cache"], 15),
        "apply": (["apply", str(root / "allocate/whole/bits.json"), *data, "--adapter", "brevitas"], 2),
        "export": (["export", str(root / "apply/whole/module.pt"), "--model", model, "--input", "1x1x8x8", "--quiet"], 3),
    }
    stages["export"][0].extend(["--adapter", "brevitas", "--out", "file.onnx", "--report", "report.json"])
    for name, (words, kill_at) in stages.items():

        def command(folder: Path, words: list[str] = words) -> int:
            os.chdir(folder)
            return main(words)

        whole, again = root / name / "whole", root / name / "again"
        whole.mkdir(parents=True)
        again.mkdir()
        assert command(whole) == 0  # here, so that the forked ones have everything imported
        assert in_child(lambda folder=again: command(folder), kill_at, ".mpq-partial-") == -signal.SIGKILL
        assert any(again.rglob(".mpq-partial-*")), name
        assert in_child(lambda folder=again: command(folder)) == 0
        assert contents(again).keys() == contents(whole).keys(), name
        assert not list(again.rglob(".mpq-partial-*")), name
        for file in ("bits.json", "module.pt", "file.onnx"):
            assert contents(again).get(file) == contents(whole).get(file), (name, file)


if __name__ == "__main__":
    _commands(Path(sys.argv[1]))
