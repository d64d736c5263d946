"""Training with frozen parts and rates by group: what stays, what a later unfreeze trains, on any number of ranks."""

import pytest
import torch
from torch import nn
from toy_task import StopAt, ToyTask, toy_config, toy_yaml

from samdistill.engine import Checkpoint, Interrupted, fit, read_lines
from samdistill.engine.schedule import GlobalBatches, Schedule, Shard
from samdistill.engine.task import Phase
from samdistill.types import UserError

TRUNK = ("0.weight", "1.weight", "1.bias")
BUFFERS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
FROZEN = ({"match": ["0.*", "1.*"], "until": 1},)
"""The first convolution and its batch norm; five steps an epoch, three epochs."""
SETTINGS = {"freeze": FROZEN, "weight_decay": 0.3, "ema": 0.9}


def train(run, task=None, resume=None, **changes):
    config = toy_config(**SETTINGS | changes)
    return fit(task or ToyTask(), config, run, resume, 0, toy_yaml(config))


def start(task=None):
    torch.manual_seed(0)
    return (task or ToyTask()).build_student().state_dict()


def saved(run, epoch):
    return Checkpoint.load(run / f"ckpt_epoch_{epoch}.pt")


def lines(run):
    return [line for line in read_lines(run / "metrics.jsonl") if "terms" in line]


def assert_same(a, b):
    a, b = (vars(saved(run, 3)) for run in (a, b))
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys() and all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    first, second = (x["optimizer"]["state"] for x in (a, b))
    assert first.keys() == second.keys() and len(first) == 5
    assert all(torch.equal(first[i][k], second[i][k]) for i in first for k in first[i])
    assert a["terms"] == b["terms"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    train(run)
    return run


def test_frozen_weights_and_statistics_stay_bit_for_bit_and_train_after_the_unfreeze(whole):
    before, one, three = start(), saved(whole, 1), saved(whole, 3)
    for weights in (one.model, one.ema):
        for name in (*TRUNK, *BUFFERS):
            assert torch.equal(before[name], weights[name]), name
    assert not torch.equal(before["4.weight"], one.model["4.weight"]), "the rest trains from the start"
    for name in TRUNK:
        assert not torch.allclose(one.model[name], three.model[name], atol=1e-4), name
        assert not torch.equal(before[name], three.ema[name]), name
    assert three.model["1.num_batches_tracked"] == 10 and len(one.optimizer["state"]) == 2
    log = (whole / "log_rank0.txt").read_text()
    assert "epoch 1 trains 2 of 5 parameter tensors" in log and "epoch 2 trains 5 of 5" in log


def test_without_the_rule_weight_decay_would_have_moved_them(tmp_path):
    """What the test above tells apart."""
    train(tmp_path, freeze=())
    assert all(not torch.equal(start()[name], saved(tmp_path, 1).model[name]) for name in (*TRUNK, *BUFFERS))


def by_hand(config, frozen, scales):
    """The run as a plain loop: gradients of ``frozen(epoch)`` are thrown away, every parameter is its own group."""
    task = ToyTask(dropout=0.0)
    torch.manual_seed(0)
    student = task.build_student()
    groups = [
        {"params": [p], "weight_decay": config.weight_decay if p.ndim > 1 else 0.0, "scale": scales.get(name, 1.0)}
        for name, p in student.named_parameters()
    ]
    adam, schedule, step = torch.optim.AdamW(groups), Schedule.of(config, 5), 0
    for epoch in range(config.epochs):
        data, still = task.dataset(epoch), frozen(epoch)
        student.train()
        student[1].train("1.weight" not in still)
        for batch in GlobalBatches(22, Shard(4), 0, epoch):
            for group in adam.param_groups:
                group["lr"] = schedule(step) * group["scale"]
            adam.zero_grad()
            task.terms(student, task.collate([data[i] for i in batch])).total.backward()
            for name, parameter in student.named_parameters():
                if name in still:
                    parameter.grad = None
            nn.utils.clip_grad_norm_(student.parameters(), config.clip_norm)
            adam.step()
            step += 1
    return student.state_dict()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_freezing_and_rates_do_what_a_plain_loop_does(tmp_path, accumulate):
    rates = [{"match": ["0.*"], "scale": 0.1}, {"match": ["1.*", "0.*"], "scale": 3.0}]
    freeze = [{"match": ["0.*"], "until": 1}, {"match": ["[01].*"], "until": 2}, {"match": ["4.bias"]}]
    changes = {"freeze": freeze, "rates": rates, "clip_norm": 0.2, "ema": 0.0, "accumulate": accumulate, "epochs": 4}
    task = ToyTask(dropout=0.0, norm="batch" if accumulate == 1 else "group")
    if accumulate == 1:
        train(tmp_path, task, **changes)
        expected = by_hand(
            toy_config(**SETTINGS | changes),
            lambda epoch: {"4.bias", *(TRUNK if epoch < 2 else ())},
            {"0.weight": 0.1, "1.weight": 3.0, "1.bias": 3.0},
        )
    else:  # a group norm makes micro-batches exact
        for parts in (1, 2):
            train(tmp_path / str(parts), task, **changes | {"accumulate": parts})
        expected = saved(tmp_path / "1", 4).model
        tmp_path = tmp_path / "2"
    found = saved(tmp_path, 4).model
    for name, value in expected.items():
        assert torch.allclose(value, found[name], atol=1e-6), name
    assert torch.equal(found["4.bias"], start(task)["4.bias"])


def test_each_group_trains_at_its_share_of_the_logged_rate(tmp_path):
    train(tmp_path, rates=[{"match": ["4.*"], "scale": 0.25}], freeze=[{"match": ["4.bias"]}])
    rate = lines(tmp_path)[-1]["lr"]
    groups = saved(tmp_path, 3).optimizer["param_groups"]
    assert [(g["scale"], g["lr"], len(g["params"])) for g in groups] == [
        (1.0, rate, 1), (1.0, rate, 2), (0.25, rate / 4, 1),
    ]  # fmt: skip


@pytest.mark.parametrize("at", [3, 5, 7])
def test_interrupted_before_at_and_after_the_unfreeze_it_is_the_uninterrupted_run(whole, tmp_path, at):
    with pytest.raises(Interrupted) as stop:
        train(tmp_path, StopAt(at=at))
    assert Checkpoint.load(stop.value.checkpoint).step == at
    train(tmp_path, resume=None)
    assert_same(whole, tmp_path)
    assert [line["terms"] for line in lines(tmp_path)] == [line["terms"] for line in lines(whole)]


def test_other_rules_are_another_run(whole):
    with pytest.raises(UserError, match=r"train\.freeze"):
        train(whole, resume=None, freeze=[FROZEN[0] | {"until": 2}])
    with pytest.raises(UserError, match=r"train\.rates"):
        train(whole, resume=None, rates=[{"match": ["0.*"], "scale": 2.0}])


def test_a_glob_that_matches_nothing_and_an_epoch_without_training_stop_the_run(tmp_path):
    with pytest.raises(UserError, match=r"train\.freeze: '0\.weigth' matches no parameter.*did you mean '0\.weight'"):
        train(tmp_path / "a", freeze=[{"match": ["0.weigth"]}])
    with pytest.raises(UserError, match=r"train\.rates: 'trunk\.\*' matches no parameter"):
        train(tmp_path / "b", rates=[{"match": ["trunk.*"], "scale": 2.0}])
    with pytest.raises(UserError, match="nothing to train in epoch 0 to 1 "):
        train(tmp_path / "c", freeze=[{"match": ["*"], "until": 2}])


def test_terms_that_reach_frozen_parts_alone_stop_the_run_by_epoch(tmp_path):
    class Deep(ToyTask):
        def terms(self, student, batch, phase=Phase()):
            return super().terms(student[0], batch) if student.training else super().terms(student, batch)

        def build_student(self):
            return nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 1)), nn.Conv2d(4, 4, 1))

    with pytest.raises(UserError, match=r"epoch 0: no loss term depends on a parameter that trains"):
        train(tmp_path, Deep(), freeze=[{"match": ["0.*"], "until": 1}])


def test_compiled_students_are_compiled_anew_at_the_unfreeze(tmp_path, monkeypatch):
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled(self, backend="eager"))
    train(tmp_path / "compiled", ToyTask(dropout=0.0), compile=True)
    train(tmp_path / "plain", ToyTask(dropout=0.0))
    a, b = (saved(tmp_path / name, 3).model for name in ("compiled", "plain"))
    assert all(torch.allclose(a[k], b[k], atol=1e-4) for k in b)
    assert torch.equal(saved(tmp_path / "compiled", 1).model["0.weight"], start()["0.weight"])


class Rebuilt(ToyTask):
    """Its frozen parameters are made again. ``shift`` stands for a model from which it is built that has changed."""

    rebuilds_frozen = True
    shift = 0.0

    def build_student(self):
        student = super().build_student()
        with torch.no_grad():
            student[0].weight.add_(self.shift)
        return student


class Stopped(Rebuilt, StopAt):
    pass


FOREVER = {"freeze": ({"match": ["0.*", "1.*"]},)}


def test_checkpoints_leave_out_what_never_trains_and_a_resumed_run_ends_in_the_same_bits(tmp_path):
    """Against the same run with complete checkpoints. Buffers stay in, and so does what trains from a later epoch."""
    train(tmp_path / "complete", **FOREVER)
    train(tmp_path / "run", Rebuilt(), **FOREVER)
    with pytest.raises(Interrupted):
        train(tmp_path / "stopped", Stopped(at=7), **FOREVER)
    train(tmp_path / "stopped", Rebuilt(), **FOREVER)
    complete = vars(saved(tmp_path / "complete", 3))
    assert complete["frozen"] == "" and complete["model"].keys() == start().keys()
    for run in ("run", "stopped"):
        found = vars(saved(tmp_path / run, 3))
        assert complete["model"].keys() - found["model"].keys() == set(TRUNK)
        for part in ("model", "ema"):
            assert not set(TRUNK) & found[part].keys()
            assert all(torch.equal(value, complete[part][name]) for name, value in found[part].items())
        assert len(found["frozen"]) == 64
    train(tmp_path / "later", Rebuilt())
    assert saved(tmp_path / "later", 1).model.keys() == start().keys() and not saved(tmp_path / "later", 1).frozen


def test_a_checkpoint_is_refused_for_other_frozen_parameters_and_a_complete_one_is_read(tmp_path):
    with pytest.raises(Interrupted):
        train(tmp_path / "run", Stopped(at=7), **FOREVER)
    other = Rebuilt()
    other.shift = 1e-6
    with pytest.raises(UserError, match="trained with other frozen parameters than the student now has") as refused:
        train(tmp_path / "run", other, **FOREVER)
    assert "\n" not in str(refused.value)
    train(tmp_path / "run", Rebuilt(), **FOREVER)
    with pytest.raises(Interrupted):
        train(tmp_path / "old", StopAt(at=7), **FOREVER)  # as earlier versions wrote it
    train(tmp_path / "old", Rebuilt(), **FOREVER)
    one, two = (vars(saved(tmp_path / run, 3)) for run in ("run", "old"))
    assert one["frozen"] == two["frozen"] and one["model"].keys() == two["model"].keys()
    assert all(torch.equal(value, two["model"][name]) for name, value in one["model"].items())
