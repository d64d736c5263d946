"""``train.batch_norm: frozen``: which statistics a student trains on, and that nothing changes them."""

import pytest
import torch
from torch import nn
from toy_task import ToyTask, toy_config, toy_yaml

from samdistill.engine import Checkpoint, check_terms, fit, read_lines
from samdistill.engine.frozen_norm import PASSES, PER_PASS, SMALL, batch_norms, measure, small_batch, unmeasured
from samdistill.engine.schedule import GlobalBatches, Shard

STATISTICS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")


def run(folder, task=None, resume=None, **changes):
    config = toy_config(batch_norm="frozen", **changes)
    fit(task or ToyTask(dropout=0.0), config, folder, resume, 0, toy_yaml(config))
    return Checkpoint.load(folder / f"ckpt_epoch_{config.total_epochs}.pt").model


def test_measured_statistics_are_the_average_of_those_of_the_passes():
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.BatchNorm2d(4))
    known = student[3]
    known.num_batches_tracked += 5
    known.running_mean += 1
    student.train()
    student[0].eval()
    inputs = [torch.randn(2, 3, 5, 5) * scale for scale in (1.0, 2.0, 4.0)]
    measure(student, [lambda x=x: student(x) for x in inputs])
    seen = [student[0](x) for x in inputs]
    assert torch.allclose(student[1].running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0), atol=1e-6)
    assert torch.allclose(student[1].running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0), atol=1e-5)
    assert known.num_batches_tracked == 5 and torch.equal(known.running_mean, torch.ones(4))
    assert [m.training for m in student] == [False, True, True, True] and student[1].momentum == known.momentum == 0.1
    assert unmeasured(student) == [] and batch_norms(student) == 2


def test_a_run_measures_once_on_its_first_images_and_then_leaves_the_statistics(tmp_path):
    found = run(tmp_path / "run")
    task = ToyTask(dropout=0.0)
    torch.manual_seed(0)
    student, data = task.build_student(), task.dataset(0)
    order = [row for rows in GlobalBatches(22, Shard(PER_PASS), 0, 0) for row in rows][: PASSES * PER_PASS]
    with torch.no_grad():
        seen = [student[0](torch.stack([data[i][1] for i in pair]).float() / 255)
                for pair in zip(order[::2], order[1::2], strict=True)]  # fmt: skip
    assert len(seen) == PASSES
    assert torch.allclose(found["1.running_mean"], torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0), atol=1e-5)
    assert torch.allclose(found["1.running_var"], torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0), atol=1e-5)
    one = Checkpoint.load(tmp_path / "run" / "ckpt_epoch_1.pt").model
    assert all(torch.equal(one[name], found[name]) for name in STATISTICS)
    assert not torch.equal(one["1.weight"], found["1.weight"]), "scale and shift train on"
    assert "statistics of 1 batch norm(s) measured" in (tmp_path / "run" / "log_rank0.txt").read_text()


def test_a_student_with_statistics_keeps_them_and_a_resumed_run_measures_nothing(tmp_path):
    class Started(ToyTask):
        def build_student(self):
            student = super().build_student()
            student[1].running_mean.fill_(0.3)
            student[1].num_batches_tracked.fill_(7)
            return student

    found = run(tmp_path / "started", Started())
    assert found["1.num_batches_tracked"] == 7 and torch.equal(found["1.running_mean"], torch.full((8,), 0.3))
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(whole)
    parts.mkdir()
    (parts / "ckpt_epoch_2.pt").write_bytes((whole / "ckpt_epoch_2.pt").read_bytes())
    again = run(parts)
    first = Checkpoint.load(whole / "ckpt_epoch_3.pt").model
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert "measured" not in (parts / "log_rank0.txt").read_text()


def test_batches_change_what_micro_batches_of_a_batch_norm_give_and_frozen_statistics_do_not(tmp_path):
    """What docs/train.md says of accumulation, and the way out."""
    ends = {}
    for name in ("batch", "frozen"):
        for parts in (1, 2):
            config = toy_config(batch_norm=name, accumulate=parts, epochs=1)
            fit(ToyTask(dropout=0.0), config, tmp_path / f"{name}{parts}", None, 0, toy_yaml(config))
            ends[name, parts] = [line["terms"] for line in read_lines(tmp_path / f"{name}{parts}" / "metrics.jsonl")
                                 if "terms" in line]  # fmt: skip
    for one, two in zip(ends["frozen", 1], ends["frozen", 2], strict=True):
        assert one == pytest.approx(two, rel=1e-4)
    assert ends["batch", 1][-1]["mse"] != pytest.approx(ends["batch", 2][-1]["mse"], rel=5e-4)


def test_check_sees_the_statistics_that_the_run_trains_on(tmp_path):
    run(tmp_path / "run")
    first = next(line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "terms" in line)
    report = check_terms(ToyTask(dropout=0.0), "cpu", 4, 0, toy_config(batch_norm="frozen"))
    assert {term.name: term.value for term in report.terms} == pytest.approx(first["terms"], rel=1e-4)


def test_small_batches_are_warned_of():
    small = toy_config(batch_size=2 * SMALL, accumulate=4)
    assert small_batch(3, toy_config(batch_size=SMALL)) is None
    assert f"3 batch norm layer(s) normalise with the statistics of {SMALL // 2} image(s)" in str(small_batch(3, small))
    assert small_batch(0, small) is None and small_batch(3, small, per_item=2) is None
    assert small_batch(3, small.model_copy(update={"batch_norm": "frozen"})) is None
