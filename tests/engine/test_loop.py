import copy
import json
import logging
import os
import resource
import shutil
import signal

import pytest
import torch
from torch import nn
from toy_task import StopAt, ToyTask, toy_config, toy_yaml
from transformers import PretrainedConfig, PreTrainedModel

from samdistill.engine import Checkpoint, Interrupted, fit, read_lines
from samdistill.engine.schedule import GlobalBatches, Schedule, Shard
from samdistill.engine.task import Phase
from samdistill.types import UserError

logging.getLogger("samdistill.run.0").setLevel(logging.ERROR)


class ToyHostConfig(PretrainedConfig):
    model_type = "samdistill_test_toy"


class ToyHost(PreTrainedModel):
    config_class = ToyHostConfig

    def __init__(self, config):
        super().__init__(config)
        self.net = ToyTask().build_student()
        self.post_init()

    def forward(self, x):
        return self.net(x)


class HostedTask(ToyTask):
    def build_student(self):
        return ToyHost(ToyHostConfig())


def train(run, task=None, resume=None, workers=0, **changes):
    config = toy_config(**changes)
    return fit(task or ToyTask(), config, run, resume, workers, toy_yaml(config))


def same(a, b):
    """Bit for bit, through any nesting; the time spent aside."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k != "seconds")
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def final(run, name="ckpt_epoch_3.pt"):
    return vars(Checkpoint.load(run / name))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    return run, train(run, ema=0.9)


def steps(run):
    return [line for line in read_lines(run / "metrics.jsonl") if "terms" in line]


def test_run_folder_and_result(whole):
    run, result = whole
    names = {p.name for p in run.iterdir()}
    assert names == {
        "config.yaml", "log_rank0.txt", "metrics.jsonl", "tensorboard", *(f"ckpt_epoch_{n}.pt" for n in (1, 2, 3)),
    }  # fmt: skip
    assert (run / "config.yaml").read_text() == toy_yaml(toy_config(ema=0.9))
    assert list((run / "tensorboard").iterdir()) and "step 15/15" in (run / "log_rank0.txt").read_text()
    assert (result.steps, result.epochs, result.student) == (15, 3, None)
    assert result.checkpoint == run / "ckpt_epoch_3.pt" and result.images_per_second > 0
    assert result.terms == steps(run)[-1]["terms"]


def test_metrics_are_complete_and_consistent(whole):
    run, _ = whole
    lines = steps(run)
    assert [line["step"] for line in lines] == list(range(1, 16))
    assert [line["epoch"] for line in lines] == [1] * 5 + [2] * 5 + [3] * 5
    for line in lines:
        assert set(line) == {
            "step", "epoch", "terms", "weights", "total", "lr", "grad_norm", "images_per_second", "seconds",
        }  # fmt: skip
        assert line["total"] == pytest.approx(line["terms"]["mse"] + 0.5 * line["terms"]["cosine"])
    assert lines[0]["lr"] == 1e-6 and lines[-1]["lr"] == 1e-5 and max(line["lr"] for line in lines) == 1e-2
    assert lines[-1]["total"] < 0.9 * lines[0]["total"], "it learns"
    checks = [line for line in read_lines(run / "metrics.jsonl") if "validate" in line]
    assert [line["step"] for line in checks] == [5, 10, 15]


def test_log_every_thins_the_lines_but_keeps_both_ends(tmp_path):
    train(tmp_path, log_every=6)
    assert [line["step"] for line in steps(tmp_path)] == [1, 6, 12, 15]


def test_validation_does_not_disturb_training(whole, tmp_path):
    class Unvalidated(ToyTask):
        def validate(self, student, phase=Phase()):
            return {}

    train(tmp_path, Unvalidated(), ema=0.9)
    assert same(final(whole[0]), final(tmp_path))


@pytest.mark.parametrize("epoch", [1, 2])
def test_resume_from_an_epoch_ends_in_the_same_bits(whole, tmp_path, epoch):
    shutil.copytree(whole[0], tmp_path / "run")
    for later in range(epoch + 1, 4):
        (tmp_path / "run" / f"ckpt_epoch_{later}.pt").unlink()
    result = train(tmp_path / "run", ema=0.9)
    assert same(final(whole[0]), final(tmp_path / "run"))
    assert result.terms == whole[1].terms and [s["step"] for s in steps(tmp_path / "run")] == list(range(1, 16))
    assert [s["terms"] for s in steps(tmp_path / "run")] == [s["terms"] for s in steps(whole[0])]


@pytest.mark.parametrize(("at", "workers", "accumulate"), [(1, 0, 1), (7, 0, 1), (8, 2, 1), (11, 0, 2), (5, 0, 1)])
def test_interrupt_finishes_the_step_saves_and_resumes_in_the_same_bits(tmp_path, at, workers, accumulate):
    train(tmp_path / "whole", accumulate=accumulate)
    with pytest.raises(Interrupted) as stop:
        train(tmp_path / "run", StopAt(at=at), workers=workers, accumulate=accumulate)
    step = -(-at // accumulate)
    assert stop.value.code == 130 and Checkpoint.load(stop.value.checkpoint).step == step
    assert stop.value.checkpoint.name == ("ckpt_interrupt.pt" if step % 5 else "ckpt_epoch_1.pt")
    train(tmp_path / "run", workers=workers, accumulate=accumulate)
    assert same(final(tmp_path / "whole"), final(tmp_path / "run"))
    assert not (tmp_path / "run" / "ckpt_interrupt.pt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored(tmp_path, number):
    """As a shell script starts what it runs in the background."""

    class Ignoring(StopAt):
        def on_batch(self):
            if self.seen == 7:
                os.kill(os.getpid(), number)

    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert train(tmp_path, Ignoring()).steps == 15
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_stopping_in_the_last_step_just_ends_the_run(tmp_path):
    assert train(tmp_path, StopAt(at=15)).steps == 15


def test_a_second_signal_aborts(tmp_path, monkeypatch):
    monkeypatch.setattr("samdistill.engine.signals._ONE_PRESS", -1.0)

    class Twice(StopAt):
        def on_batch(self):
            if self.seen == 7:
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, Twice())
    assert not (tmp_path / "ckpt_interrupt.pt").exists() and (tmp_path / "ckpt_epoch_1.pt").exists()


def test_resume_reads_none_of_the_items_it_skips(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path, StopAt(at=3), epochs=1)

    class NoValidation(ToyTask):
        def validate(self, student, phase=Phase()):
            return {}

    task = NoValidation()
    train(tmp_path, task, epochs=1)
    assert len(task.data.read) == 2 * 4


def test_accumulation_gives_the_losses_and_gradients_of_the_whole_batch(tmp_path):
    for accumulate in (1, 4):
        train(tmp_path / str(accumulate), ToyTask(norm="group", dropout=0.0), accumulate=accumulate)
    for one, four in zip(steps(tmp_path / "1"), steps(tmp_path / "4"), strict=True):
        assert one["terms"] == pytest.approx(four["terms"], abs=1e-5)
        assert one["grad_norm"] == pytest.approx(four["grad_norm"], abs=1e-4)


def test_the_loop_does_what_a_plain_loop_does(tmp_path):
    """The same steps by hand: order, schedule, clipping, AdamW without decay on 1-D parameters."""
    config = toy_config(clip_norm=0.5, weight_decay=0.2, epochs=2)
    fit(ToyTask(dropout=0.0), config, tmp_path, resolved=toy_yaml(config), workers=0)
    task = ToyTask(dropout=0.0)
    torch.manual_seed(0)
    student = task.build_student()
    matrices = [p for p in student.parameters() if p.ndim > 1]
    vectors = [p for p in student.parameters() if p.ndim == 1]
    adam = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}])
    schedule, step = Schedule.of(config, 5), 0
    for epoch in range(2):
        data = task.dataset(epoch)
        student.train()
        for batch in GlobalBatches(22, Shard(4), 0, epoch):
            for group in adam.param_groups:
                group["lr"] = schedule(step)
            adam.zero_grad()
            task.terms(student, task.collate([data[i] for i in batch])).total.backward()
            nn.utils.clip_grad_norm_(student.parameters(), 0.5)
            adam.step()
            step += 1
    trained = final(tmp_path, "ckpt_epoch_2.pt")["model"]
    for name, value in student.state_dict().items():
        assert torch.allclose(value, trained[name], atol=1e-6), name


@pytest.mark.parametrize(("fault", "words"), [("nan", "loss term cosine = nan"), ("gradient", "the gradient is not")])
def test_not_finite_stops_names_it_and_keeps_the_last_good_checkpoint(tmp_path, fault, words):
    with pytest.raises(UserError) as error:
        train(tmp_path, ToyTask(broken=fault, at=7))
    text = str(error.value)
    assert words in text and "step 8" in text and str(tmp_path / "ckpt_epoch_1.pt") in text and "\n" not in text
    kept = Checkpoint.load(tmp_path / "ckpt_epoch_1.pt")
    assert kept.step == 5 and all(torch.isfinite(v).all() for v in kept.model.values())
    assert not list(tmp_path.glob("*.tmp")) and "step 8" in (tmp_path / "log_rank0.txt").read_text()
    json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])


def test_finished_run_says_so_and_is_left_alone(whole, tmp_path, capsys):
    shutil.copytree(whole[0], tmp_path / "run")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    result = train(tmp_path / "run", ema=0.9)
    assert (result.steps, result.terms, result.images_per_second) == (15, whole[1].terms, 0.0)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert "finished" in (tmp_path / "run" / "log_rank0.txt").read_text()


def test_a_folder_that_holds_a_run_is_not_overwritten_by_another(whole):
    before = {p.name: p.stat().st_mtime_ns for p in whole[0].iterdir()}
    with pytest.raises(UserError, match=r"contains another run .* or use another output"):
        train(whole[0], ema=0.9, resume=whole[0] / "ckpt_epoch_1.pt")
    assert before == {p.name: p.stat().st_mtime_ns for p in whole[0].iterdir()}


def test_a_finished_run_is_not_gone_on_with_elsewhere(whole, tmp_path):
    with pytest.raises(UserError, match=r"ckpt_epoch_3\.pt: its run is finished"):
        train(tmp_path / "new", ema=0.9, resume=whole[0])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("change", [{"seed": 1}, {"epochs": 4}, {"batch_size": 2}, {"lr": 0.1}])
def test_resume_with_other_settings_names_them(whole, change):
    (key,) = change
    with pytest.raises(UserError, match=rf"train\.{key} \(was .*, now {change[key]}\)"):
        train(whole[0], ema=0.9, **change)


def test_resume_with_other_data_gives_both_sizes(whole):
    with pytest.raises(UserError, match=r"22 image\(s\), it now has 23"):
        train(whole[0], ToyTask(items=23), ema=0.9)


def test_resume_by_path(whole, tmp_path):
    train(tmp_path / "new", resume=whole[0] / "ckpt_epoch_1.pt", ema=0.9)
    assert same(final(whole[0]), final(tmp_path / "new"))
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match=str(missing)):
            train(tmp_path / "other", resume=missing)


def test_resume_without_a_checkpoint_starts(tmp_path, whole):
    assert train(tmp_path, ema=0.9).terms == whole[1].terms


def test_only_the_last_checkpoints_are_kept(tmp_path):
    train(tmp_path, epochs=4, keep=2)
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["ckpt_epoch_3.pt", "ckpt_epoch_4.pt"]


def test_full_disk_stops_and_the_run_can_be_resumed(tmp_path, whole):
    class Fills(ToyTask):
        def on_batch(self):
            if self.seen == 7:
                resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))

    try:
        with pytest.raises(UserError, match=r"ckpt_epoch_2.pt: cannot be written.*ckpt_epoch_1.pt"):
            train(tmp_path, Fills(), ema=0.9)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert [p.name for p in tmp_path.glob("ckpt*")] == ["ckpt_epoch_1.pt"]
    train(tmp_path, ema=0.9)
    assert same(final(whole[0]), final(tmp_path))


def test_a_full_disk_at_the_student_leaves_no_half_of_it(tmp_path):
    class Fills(HostedTask):
        def validate(self, student, phase=Phase()):
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            return {}

    try:
        with pytest.raises(UserError, match="student: cannot be written"):
            train(tmp_path, Fills(), epochs=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
    assert not list(tmp_path.glob("student*"))
    assert train(tmp_path, HostedTask(), epochs=1).student == tmp_path / "student"


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_student_folder_holds_the_averaged_weights(tmp_path, ema):
    result = train(tmp_path, HostedTask(), ema=ema)
    loaded = ToyHost.from_pretrained(result.student).state_dict()
    saved = Checkpoint.load(result.checkpoint)
    wanted = saved.ema if ema else saved.model
    assert same(loaded, dict(wanted))
    assert not ema or not same(dict(saved.ema), dict(saved.model))


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_a_task_may_train_a_wrapper_and_export_the_model_inside(tmp_path, ema):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.extra = ToyHost(ToyHostConfig()), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.extra(self.model(x))

    class WrappedTask(ToyTask):
        def build_student(self):
            return Wrapper()

    class Exporting(WrappedTask):
        def export(self, student):
            return student.model

    assert train(tmp_path / "wrapper", WrappedTask(), ema=ema, epochs=1).student is None, "no Hugging Face model"
    result = train(tmp_path / "model", Exporting(), ema=ema, epochs=1)
    assert result.student == tmp_path / "model" / "student"
    saved = Checkpoint.load(result.checkpoint)
    wanted = {key.removeprefix("model."): v for key, v in (saved.ema or saved.model).items() if "extra" not in key}
    assert same(dict(ToyHost.from_pretrained(result.student).state_dict()), wanted)


def test_precision(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"fp16 needs a GPU .*use bf16 or fp32"):
        train(tmp_path / "half", precision="fp16")
    train(tmp_path / "full", ToyTask(dropout=0.0))
    train(tmp_path / "brain", ToyTask(dropout=0.0), precision="bf16")
    full, brain = steps(tmp_path / "full")[0], steps(tmp_path / "brain")[0]
    assert full["terms"] != brain["terms"] and full["terms"] == pytest.approx(brain["terms"], rel=0.02)
    assert all(v.dtype == torch.float32 for v in final(tmp_path / "brain")["model"].values() if v.is_floating_point())


def test_compile_is_honoured_and_leaves_names_alone(tmp_path, whole, monkeypatch):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda self, *args: compiled.append(self))
    train(tmp_path, compile=True, ema=0.9)
    assert len(compiled) == 1 and final(tmp_path)["model"].keys() == final(whole[0])["model"].keys()


def test_epochs_of_different_length_are_refused(tmp_path):
    class Shrinks(ToyTask):
        def dataset(self, epoch):
            self.items = 22 - epoch
            return super().dataset(epoch)

    with pytest.raises(UserError, match=r"epoch 1 has 21 image\(s\), the first had 22"):
        train(tmp_path, Shrinks())


def test_random_streams_of_the_caller_do_not_matter(tmp_path, whole):
    torch.manual_seed(77)
    train(tmp_path, copy.copy(ToyTask()), ema=0.9)
    assert same(final(whole[0]), final(tmp_path))
