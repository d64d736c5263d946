"""Training in phases: what each one trains, what it leaves alone, and a resume that lands in the right one."""

import pytest
import torch
from toy_task import StopAt, ToyTask, toy_config, toy_yaml

from samdistill.engine import Checkpoint, Interrupted, fit, read_lines
from samdistill.engine.schedule import GlobalBatches, Shard
from samdistill.types import UserError

PHASES = [
    {"name": "mse", "epochs": 2, "lr": 1e-2, "warmup_steps": 3, "min_lr": 1e-3, "terms": ["mse"]},
    {"name": "cosine", "epochs": 1, "lr": 5e-3, "min_lr": 5e-3, "terms": ["cosine"]},
]


def train(run, task=None, resume=None, phases=PHASES, **changes):
    config = toy_config(phases=phases, ema=0.9, **changes)
    return fit(task or ToyTask(), config, run, resume, 0, toy_yaml(config))


def steps(run):
    return [line for line in read_lines(run / "metrics.jsonl") if "terms" in line]


def assert_same(a, b):
    a, b = (vars(Checkpoint.load(run / "ckpt_epoch_3.pt")) for run in (a, b))
    assert a["step"] == b["step"] == 15
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys() and all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    first, second = ([s[k] for s in x["optimizer"]["state"].values() for k in sorted(s)] for x in (a, b))
    assert len(first) == len(second) > 0 and all(map(torch.equal, first, second))
    assert a["terms"] == b["terms"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("whole")
    return run, train(run)


def test_each_phase_logs_its_own_terms_weights_and_rates(whole):
    run, result = whole
    lines = steps(run)
    assert [(list(line["terms"]), line["weights"]) for line in lines] == (
        [(["mse"], {"mse": 1.0})] * 10 + [(["cosine"], {"cosine": 0.5})] * 5
    )
    assert all(line["total"] == pytest.approx(line["terms"]["mse"]) for line in lines[:10])
    assert all(line["total"] == pytest.approx(line["terms"]["cosine"] / 2) for line in lines[10:])
    rates = [line["lr"] for line in lines]
    assert rates[0] == 0 and rates[3] == 1e-2 and rates[9] == pytest.approx(1e-3) and set(rates[10:]) == {5e-3}
    assert (result.steps, result.epochs) == (15, 3) and list(result.terms) == ["cosine"]


def test_the_second_phase_trains_its_own_term_alone_from_where_the_first_ended(tmp_path):
    """A plain loop from the first phase's checkpoint; the moments of Adam go on, the rate is the phase's."""
    train(tmp_path, ToyTask(dropout=0.0), weight_decay=0.1, clip_norm=None)
    before = Checkpoint.load(tmp_path / "ckpt_epoch_2.pt")
    task = ToyTask(dropout=0.0)
    student, data = task.build_student(), task.dataset(2)
    student.load_state_dict(before.model)
    matrices = [p for p in student.parameters() if p.ndim > 1]
    adam = torch.optim.AdamW([{"params": matrices}, {"params": [p for p in student.parameters() if p.ndim == 1]}])
    adam.load_state_dict(before.optimizer)
    student.train()
    for batch in GlobalBatches(22, Shard(4), 0, 2):
        for group in adam.param_groups:
            group["lr"] = 5e-3
        adam.zero_grad()
        (0.5 * task.terms(student, task.collate([data[i] for i in batch]))["cosine"].value).backward()
        adam.step()
    after = Checkpoint.load(tmp_path / "ckpt_epoch_3.pt").model
    for name, value in student.state_dict().items():
        assert torch.allclose(value, after[name], atol=1e-6), name
    assert not torch.allclose(before.model["4.weight"], after["4.weight"], atol=1e-4)


@pytest.mark.parametrize("at", [4, 10, 12])
def test_interrupted_and_resumed_it_is_the_uninterrupted_run(whole, tmp_path, at):
    """In the first phase, exactly at the boundary, in the second."""
    with pytest.raises(Interrupted) as stop:
        train(tmp_path, StopAt(at=at))
    assert Checkpoint.load(stop.value.checkpoint).step == at
    assert stop.value.checkpoint.name == ("ckpt_epoch_2.pt" if at == 10 else "ckpt_interrupt.pt")
    train(tmp_path)
    assert_same(whole[0], tmp_path)
    assert [line["terms"] for line in steps(tmp_path)] == [line["terms"] for line in steps(whole[0])]


def test_one_phase_of_everything_is_a_run_without_phases(tmp_path):
    only = [{"name": "all", "epochs": 3, "lr": 1e-2, "warmup_steps": 2, "warmup_lr": 1e-6, "min_lr": 1e-5}]
    for name, phases in (("phases", only), ("plain", None)):
        train(tmp_path / name, phases=phases)
    assert_same(tmp_path / "phases", tmp_path / "plain")


def test_other_phases_are_another_run(whole):
    longer = [PHASES[0], PHASES[1] | {"epochs": 2}]
    with pytest.raises(UserError, match=r"train\.phases"):
        train(whole[0], phases=longer)


def test_a_term_outside_the_phase_does_not_matter_even_if_it_is_no_number(tmp_path):
    train(tmp_path, ToyTask(broken="nan", at=0), phases=[PHASES[0] | {"epochs": 1}])
    with pytest.raises(UserError, match="loss term cosine = nan"):
        train(tmp_path / "second", ToyTask(broken="nan", at=0))
    assert Checkpoint.load(tmp_path / "second" / "ckpt_epoch_2.pt").step == 10
