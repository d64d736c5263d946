"""A full disk under what a run writes while it runs, and reading it again."""

import errno
import json
import resource
import threading

import pytest

from samdistill.engine import read_lines
from samdistill.engine.tracking import Tracker
from samdistill.types import UserError

RECORD = {
    "epoch": 1, "terms": {"mse": 1.0}, "weights": {"mse": 1.0}, "total": 1.0, "lr": 0.1, "grad_norm": 1.0,
    "images_per_second": 1.0, "seconds": 1.0,
}  # fmt: skip


def test_tensorboard_on_a_full_disk_does_not_end_the_run(tmp_path):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Tracker(tmp_path, rank=0, total=3, start=0, every=1) as tracker:
        tracker.step(RECORD | {"step": 1})
        tracker._board.add_scalar = full
        tracker.step(RECORD | {"step": 2})
        tracker.step(RECORD | {"step": 3})
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    log = (tmp_path / "log_rank0.txt").read_text()
    assert log.count("TensorBoard stopped: No space left on device") == 1


def test_the_thread_of_tensorboard_dies_without_a_traceback_and_others_do_not(tmp_path, monkeypatch):
    class _AsyncWriterThread(threading.Thread):
        pass

    told, full = [], OSError(errno.ENOSPC, "No space left on device")
    hook = told.append
    monkeypatch.setattr(threading, "excepthook", hook)
    with Tracker(tmp_path, rank=0, total=3, start=0, every=1):
        for error, thread in ((full, _AsyncWriterThread()), (full, threading.Thread()), (KeyError(), None)):
            threading.excepthook(threading.ExceptHookArgs((type(error), error, None, thread)))
    assert threading.excepthook is hook and [failure.exc_type for failure in told] == [OSError, KeyError]


def test_a_full_disk_under_the_metrics_is_one_line_and_leaves_whole_lines(tmp_path, capsys):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Tracker(tmp_path, rank=0, total=9, start=0, every=1) as tracker:
        tracker.step(RECORD | {"step": 1})
        tracker._board = None
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (250, before[1]))
            with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written: .*run the same command again"):
                tracker.step(RECORD | {"step": 2})
            tracker.info("a line for the log, which has no room either, and which no traceback may follow" * 9)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [1]
    assert (tmp_path / "metrics.jsonl").read_text().endswith("\n") and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "Invalid JSON"), ("[1]", "line 2: "), ("{}", "step"), ('{"step": -1, "epoch": 1}', "step"),
        (json.dumps(RECORD | {"step": 2, "terms": {"mse": "low"}}), "terms.mse"), ("[" * 100_000, "line 2"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named_and_a_torn_last_one_left_out(tmp_path, line, words):
    path, good = tmp_path / "metrics.jsonl", json.dumps(RECORD | {"step": 1})
    path.write_text(f"{good}\n{line}\n{good}\n")
    with pytest.raises(UserError) as error:
        read_lines(path)
    assert str(error.value).startswith(f"{path}, line 2: ") and words in str(error.value)
    assert "not a line of metrics, remove it" in str(error.value) and "\n" not in str(error.value)
    path.write_text(f"{good}\n{good[:20]}")
    assert [found["step"] for found in read_lines(path)] == [1]
    assert read_lines(tmp_path / "none") == []
