import math

import pytest
import torch
from toy_task import ToyTask, toy_config

from samdistill.dist import default_device
from samdistill.engine.check import check_terms
from samdistill.engine.schedule import GlobalBatches, Shard
from samdistill.engine.task import Phase
from samdistill.types import Term, Terms, UserError


def test_gradient_norms_agree_with_a_backward_per_term():
    report = check_terms(ToyTask(dropout=0.0), "cpu", batch_size=6)
    assert report.ok and not report.problems and not report.dead
    for row in report.terms:
        task = ToyTask(dropout=0.0)
        torch.manual_seed(0)
        student = task.build_student()
        data = task.dataset(0)
        batch = task.collate([data[i] for i in next(iter(GlobalBatches(22, Shard(6), 0, 0)))])
        term = task.terms(student, batch)[row.name]
        (term.weight * term.value).backward()
        flat = torch.cat([p.grad.flatten() for p in student.parameters()])
        assert row.value == pytest.approx(term.value.item(), rel=1e-5)
        assert row.grad_norm == pytest.approx(flat.norm().item(), rel=1e-5) and row.weight == term.weight


def test_to_dict_is_the_contract():
    found = check_terms(ToyTask(), "cpu").to_dict()
    assert list(found) == ["terms", "trainable"]
    assert [list(t) for t in found["terms"]] == [["name", "value", "weight", "grad_norm", "phase"]] * 2
    assert found["trainable"] == ["0.weight", "1.weight", "1.bias", "4.weight", "4.bias"]


@pytest.mark.parametrize(
    ("fault", "named", "why"),
    [("detached", ["mse", "cosine"], "detached"), ("weight", ["cosine"], "weight is 0"), ("nan", ["cosine"], "nan")],
)
def test_a_term_that_does_not_reach_the_student_fails_by_name(fault, named, why):
    report = check_terms(ToyTask(broken=fault, at=0), "cpu")
    assert not report.ok and len(report.problems) == len(named)
    for name, line in zip(named, report.problems, strict=True):
        assert repr(name) in line and why in line
    if fault == "detached":
        assert report.dead == report.trainable


def test_parameters_that_no_term_reaches_are_listed_and_frozen_ones_are_not_trainable():
    class Partly(ToyTask):
        def build_student(self):
            student = super().build_student()
            student.unused = torch.nn.Linear(2, 2)
            student.unused.forward = lambda x: x
            student[4].bias.requires_grad_(False)
            return student

    report = check_terms(Partly(), "cpu")
    assert report.dead == ("unused.weight", "unused.bias") and "4.bias" not in report.trainable
    assert report.ok, "every term still reaches the student"


class Adapted(ToyTask):
    """A convolution that is used in training alone comes behind the student that is kept."""

    cut = False

    def build_student(self):
        return torch.nn.ModuleDict({"kept": super().build_student(), "adapter": torch.nn.Conv2d(4, 4, 1)})

    def export(self, student):
        return student["kept"]

    def terms(self, student, batch, phase=Phase()):
        out = student["kept"](batch.images.float() / 255)
        direct = out.square().mean()
        adapted = student["adapter"](out.detach() if self.cut else out).square().mean()
        return Terms({"direct": Term(direct, 1.0), "adapted": Term(adapted, 1.0)})


def test_gradients_are_counted_at_what_is_exported():
    report = check_terms(Adapted(dropout=0.0), "cpu")
    assert report.ok and not report.dead
    task = Adapted(dropout=0.0)
    torch.manual_seed(0)
    student, data = task.build_student(), task.dataset(0)
    terms = task.terms(student, task.collate([data[i] for i in next(iter(GlobalBatches(22, Shard(4), 0, 0)))]))
    for row in report.terms:
        grads = torch.autograd.grad(terms[row.name].value, list(student["kept"].parameters()), retain_graph=True)
        assert row.grad_norm == pytest.approx(torch.cat([g.flatten() for g in grads]).norm().item(), rel=1e-5)
    task.cut = True
    (problem,) = check_terms(task, "cpu").problems
    assert problem.startswith("term 'adapted' does not reach the student: it is detached from the exported model")


def test_infinite_gradient_of_a_finite_term_fails():
    class Steep(ToyTask):
        def terms(self, student, batch, phase=Phase()):
            out = student(batch.images.float() / 255)
            return Terms({"root": Term((out - out.detach()).abs().sum().sqrt(), 1.0)})

    (row,) = check_terms(Steep(), "cpu").terms
    assert row.value == 0 and not math.isfinite(row.grad_norm) and "gradient of norm" in row.problem


PHASES = [{"name": "both", "epochs": 1, "lr": 1e-2}, {"name": "late", "epochs": 2, "lr": 1e-2, "terms": ["cosine"]}]


def test_every_phase_is_checked_on_its_own_terms_and_its_own_first_batch():
    report = check_terms(ToyTask(dropout=0.0), "cpu", batch_size=4, train=toy_config(phases=PHASES))
    assert [(t.phase, t.name) for t in report.terms] == [("both", "mse"), ("both", "cosine"), ("late", "cosine")]
    for row, epoch in zip(report.terms[1:], (0, 1), strict=True):  # the phase's first epoch sees another view
        task = ToyTask(dropout=0.0)
        torch.manual_seed(0)
        student, data = task.build_student(), task.dataset(epoch)
        batch = task.collate([data[i] for i in next(iter(GlobalBatches(22, Shard(4), 0, epoch)))])
        assert row.value == pytest.approx(task.terms(student, batch, Phase(epoch))["cosine"].value.item(), rel=1e-5)
    assert report.terms[1].value != report.terms[2].value
    assert [t["phase"] for t in report.to_dict()["terms"]] == ["both", "both", "late"]


def test_a_problem_names_the_phase_it_is_in():
    report = check_terms(ToyTask(broken="weight"), "cpu", train=toy_config(phases=PHASES))
    assert report.problems == [
        f"term 'cosine' of phase '{name}' does not reach the student: its weight is 0" for name in ("both", "late")
    ]
    nothing = toy_config(phases=[{"name": "odd", "epochs": 1, "lr": 1e-2, "terms": ["mask"]}])
    with pytest.raises(UserError, match="no loss term for phase 'odd'"):
        check_terms(ToyTask(), "cpu", train=nothing)


class InParts(ToyTask):
    """One term on what comes out, one on what comes out of the first convolution alone."""

    def terms(self, student, batch, phase=Phase()):
        images = batch.images.float() / 255
        return Terms({"out": Term(student(images).square().mean(), 1.0), "first": Term(student[0](images).mean(), 1.0)})


def test_each_stage_is_checked_with_what_is_frozen_in_it():
    freeze = [{"match": ["0.*"], "until": 2}, {"match": ["4.bias"]}]
    report = check_terms(InParts(dropout=0.0), "cpu", train=toy_config(freeze=freeze))
    assert [(t.phase, t.name) for t in report.terms] == [
        ("epoch 0", "out"), ("epoch 0", "first"), ("epoch 2", "out"), ("epoch 2", "first"),
    ]  # fmt: skip
    (problem,) = report.problems
    assert problem.startswith("term 'first' of phase 'epoch 0' does not reach the student") and "frozen" in problem
    assert report.trainable == ("0.weight", "1.weight", "1.bias", "4.weight") and report.dead == ()
    without = check_terms(InParts(dropout=0.0), "cpu", train=toy_config(freeze=[{"match": ["4.bias"]}]))
    assert [t.phase for t in without.terms] == ["", ""] and without.ok, "one stage has no name"
    late = [without.terms[0].grad_norm, report.terms[2].grad_norm]  # nothing but the view differs: epochs 0 and 2
    assert late[0] == pytest.approx(late[1], rel=0.2) and report.terms[0].grad_norm < late[0]


def test_a_parameter_that_trains_later_and_is_never_reached_is_dead_one_frozen_for_ever_is_not():
    class Unused(ToyTask):
        def build_student(self):
            student = super().build_student()
            student.late, student.never = torch.nn.Linear(2, 2, bias=False), torch.nn.Linear(2, 2, bias=False)
            for part in (student.late, student.never):
                part.forward = lambda x: x
            return student

    freeze = [{"match": ["late.*"], "until": 1}, {"match": ["never.*"]}]
    assert check_terms(Unused(), "cpu", train=toy_config(freeze=freeze)).dead == ("late.weight",)


def test_frozen_batch_norm_is_checked_as_it_is_trained():
    """In eval mode while it is frozen: the first term of a fresh student, by hand."""
    task = ToyTask(dropout=0.0)
    frozen = toy_config(freeze=[{"match": ["1.*"], "until": 1}])
    found = {t.phase: t.value for t in check_terms(task, "cpu", train=frozen).terms if t.name == "mse"}
    for stage, epoch in (("epoch 0", 0), ("epoch 1", 1)):
        torch.manual_seed(0)
        student, data = task.build_student(), task.dataset(epoch)
        student[1].train(epoch == 1)
        batch = task.collate([data[i] for i in next(iter(GlobalBatches(22, Shard(4), 0, epoch)))])
        assert found[stage] == pytest.approx(task.terms(student, batch, Phase(epoch))["mse"].value.item(), rel=1e-5)


def test_a_task_adds_the_epochs_at_which_its_terms_change():
    class Grows(ToyTask):
        def stages(self, train):
            return [*super().stages(train), ("late", 2)]

        def terms(self, student, batch, phase=Phase()):
            return super().terms(student, batch).only(("mse", "cosine") if phase.epoch == 2 else ("mse",))

    report = check_terms(Grows(), "cpu", train=toy_config())
    assert [(t.phase, t.name) for t in report.terms] == [("", "mse"), ("late", "mse"), ("late", "cosine")]


def test_rules_that_cannot_work_are_found_before_the_data_is_read():
    with pytest.raises(UserError, match=r"train\.freeze: 'x\.\*' matches no parameter"):
        check_terms(ToyTask(items=0), "cpu", train=toy_config(freeze=[{"match": ["x.*"]}]))
    with pytest.raises(UserError, match=r"train\.rates: 'x\.\*' matches no parameter"):
        check_terms(ToyTask(items=0), "cpu", train=toy_config(rates=[{"match": ["x.*"], "scale": 2.0}]))
    with pytest.raises(UserError, match="nothing to train in epoch 0 "):
        check_terms(ToyTask(items=0), "cpu", train=toy_config(freeze=[{"match": ["*"], "until": 1}]))


def test_nothing_to_check_is_an_error():
    class Frozen(ToyTask):
        def build_student(self):
            return super().build_student().requires_grad_(False)

    with pytest.raises(UserError, match="frozen"):
        check_terms(Frozen(), "cpu")
    with pytest.raises(UserError, match="empty"):
        check_terms(ToyTask(items=0), "cpu")


def test_ranks_of_one_machine_spread_over_its_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert default_device() == torch.device("cuda")
    found = []
    for rank in ("0", "1", "2"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        found.append(default_device())
    assert found == [torch.device("cuda", i) for i in (0, 1, 0)]
