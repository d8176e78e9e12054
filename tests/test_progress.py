"""Progress reports."""

import contextlib

from mpq_plugins.common.progress import reporting_to, showing_progress, track


class Recorder:
    """A reporter that remembers everything it was told."""

    def __init__(self):
        self.started = []
        self.done = []
        self.n_closed = 0

    @contextlib.contextmanager
    def __call__(self, description, total):
        self.started.append((description, total))
        try:
            yield self.done.append
        finally:
            self.n_closed += 1


def test_tracking_is_silent_and_transparent_by_default(capsys):
    """Without a reporter `track` only passes items on."""
    assert list(track(iter("abc"), "letters")) == ["a", "b", "c"]
    assert capsys.readouterr() == ("", "")


def test_a_reporter_hears_the_total_and_every_item():
    """The total comes from the length when there is one, and items count when the consumer asks for the next."""
    recorder = Recorder()
    with reporting_to(recorder):
        assert list(track([5, 6, 7], "numbers")) == [5, 6, 7]
        assert list(track(iter([5]), "more", total=9)) == [5]
    assert recorder.started == [("numbers", 3), ("more", 9)]
    assert recorder.done == [1, 2, 3, 1]


def test_reports_end_with_the_loop_and_with_the_context():
    """A loop that is left early closes its report, and after the context nobody listens."""
    recorder = Recorder()
    with reporting_to(recorder):
        loop = track([1, 2], "numbers")
        next(loop)
        loop.close()
    assert recorder.n_closed == 1
    list(track([1], "later"))
    assert len(recorder.started) == 1


def test_bars_stay_out_of_captured_output(capsys):
    """Standard output carries results only, and a pipe gets no bars."""
    with showing_progress():
        assert list(track(range(3), "outer")) == [0, 1, 2]
    assert capsys.readouterr().out == ""
