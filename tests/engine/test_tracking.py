"""A full disk under TensorBoard."""

import errno

from samdistill.engine import read_lines
from samdistill.engine.tracking import Tracker

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
