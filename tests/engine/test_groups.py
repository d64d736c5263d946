"""Globs over a student's parameters: what they freeze, at what rate the rest trains, and globs that cannot work."""

import pytest
import torch
from torch import nn

from samdistill.config import FreezeConfig, RateConfig
from samdistill.engine.groups import Freezing, parameter_groups
from samdistill.types import UserError


class Tiny(nn.Module):
    """An encoder with a norm, a decoder, a token, and a decoder's weight that is also the embedding's."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
        self.decoder = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, affine=False))
        self.embedding = nn.Embedding(4, 4)
        self.embedding.weight = self.decoder[0].weight
        self.token = nn.Parameter(torch.zeros(4))


def freezing(*rules, epochs=6, student=None):
    student = student or Tiny()
    return student, Freezing(student, [FreezeConfig(match=match, until=until) for match, until in rules], epochs)


def training(student):
    return {name for name, p in student.named_parameters() if p.requires_grad}


ALL = {"encoder.0.weight", "encoder.1.weight", "encoder.1.bias", "encoder.2.weight", "encoder.2.bias",
       "decoder.0.weight", "decoder.0.bias", "token"}  # fmt: skip


def test_a_parameter_is_frozen_while_any_rule_that_matches_it_holds():
    student, rules = freezing((["encoder.*"], 2), (["encoder.2.*", "token"], 4), (["encoder.0.weight"], None))
    decoder = {"decoder.0.weight", "decoder.0.bias"}
    assert training(student) == ALL - {"encoder.0.weight"}, "all that ever trains, for the optimiser"
    for epoch in (0, 1, 2, 3, 4, 5, 0, 5):  # any order: a function of the epoch
        count = rules.start(epoch)
        norm = {"encoder.1.weight", "encoder.1.bias"} if epoch >= 2 else set()
        late = {"encoder.2.weight", "encoder.2.bias", "token"} if epoch >= 4 else set()
        assert training(student) == decoder | norm | late
        assert count == len(training(student))


def test_without_rules_what_the_task_froze_stays_frozen_and_the_rest_trains():
    student = Tiny()
    student.token.requires_grad_(False)
    _, rules = freezing(student=student)
    assert rules.start(0) == 7 and training(student) == ALL - {"token"}
    _, rules = freezing((["token", "encoder.*"], 3), student=student)
    rules.start(3)
    assert training(student) == ALL - {"token"}, "the end of a rule does not train what the task never trains"


def test_a_rule_that_outlasts_the_run_holds_for_ever():
    student, rules = freezing((["encoder.*"], 6))
    assert training(student) == {name for name in ALL if not name.startswith("encoder")}
    rules.start(5)
    assert not any(name.startswith("encoder") for name in training(student))


def test_a_tied_parameter_is_found_by_each_of_its_names():
    student, _ = freezing((["embedding.*"], None))
    assert training(student) == ALL - {"decoder.0.weight"} and not student.embedding.weight.requires_grad
    rate = [RateConfig(match=("embedding.weight",), scale=0.5)]
    (half,) = [group for group in parameter_groups(Tiny(), 0.1, rate) if group["scale"] == 0.5]
    assert len(half["params"]) == 1


def test_frozen_batch_norms_are_in_eval_mode_and_come_back():
    student, rules = freezing((["encoder.1.*"], 1))
    norm, plain = student.encoder[1], student.decoder[1]
    for epoch, trains in ((0, False), (1, True)):
        student.train()
        rules.start(epoch)
        assert norm.training is trains and student.encoder[0].training
        assert plain.training, "a norm without parameters is not frozen"
    half, rules = freezing((["encoder.1.bias"], None))
    rules.start(0)
    assert half.encoder[1].training, "its weight still trains"


@pytest.mark.parametrize(
    ("rules", "where"),
    [
        ([(["*"], None)], "epoch 0 to 5 "),
        ([(["encoder.*", "token"], 2), (["decoder.*"], 3)], "epoch 0 to 1 "),
        ([(["encoder.*", "token"], 1), (["decoder.*"], None)], "epoch 0 "),
    ],
)
def test_an_epoch_with_nothing_to_train_is_named(rules, where):
    with pytest.raises(UserError, match=rf"train\.freeze leaves nothing to train in {where}\(of 0 to 5\)"):
        freezing(*rules)
    freezing((["encoder.*", "token"], 2), epochs=2)


@pytest.mark.parametrize(
    ("glob", "words"),
    [
        ("encodr.*", "; did you mean 'encoder.*'?"),
        ("decoder.0.weigth", "; did you mean 'decoder.0.weight'?"),
        ("Encoder.1.bias", "; did you mean 'encoder.1.bias'?"),
        ("encoder", "; did you mean 'encoder.*'?"),
        ("zzz", "; there is: token, encoder.*, decoder.*, embedding.*"),
    ],
)
def test_a_glob_that_matches_nothing_is_answered_with_one_that_does(glob, words):
    for key, call in (
        ("train.freeze", lambda: freezing((["token", glob], 1))),
        ("train.rates", lambda: parameter_groups(Tiny(), 0.1, [RateConfig(match=("token", glob), scale=2.0)])),
    ):
        with pytest.raises(UserError) as error:
            call()
        text = str(error.value)
        assert text.startswith(f"{key}: {glob!r} matches no parameter of the student") and text.endswith(words)
        assert "\n" not in text


def test_the_list_of_what_there_is_stays_short():
    many = nn.ModuleDict({f"part{i}": nn.Linear(1, 1) for i in range(12)})
    with pytest.raises(UserError, match=r"part0\.\*, .*part7\.\* and 4 more$"):
        freezing((["zzz"], 1), student=many)


def test_every_trainable_parameter_is_in_one_group():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model.token = nn.Parameter(torch.zeros(4))
    model[2].weight.requires_grad_(False)
    decayed, plain = parameter_groups(model, 0.1)
    assert decayed["weight_decay"] == 0.1 and plain["weight_decay"] == 0
    assert decayed["scale"] == plain["scale"] == 1
    assert [p.shape for p in decayed["params"]] == [model[0].weight.shape]
    ids = [id(p) for p in decayed["params"] + plain["params"]]
    assert len(set(ids)) == len(ids) and set(ids) == {id(p) for p in model.parameters() if p.requires_grad}


def test_the_first_rate_that_matches_counts_and_decay_is_apart():
    student, _ = freezing((["encoder.0.*"], None), (["encoder.2.*"], 3))
    rates = [RateConfig(match=("encoder.1.*",), scale=2.0), RateConfig(match=("token", "encoder.*"), scale=0.1)]
    names = {id(p): name for name, p in student.named_parameters()}
    found = {
        (group["scale"], group["weight_decay"]): {names[id(p)] for p in group["params"]}
        for group in parameter_groups(student, 0.3, rates)
    }
    assert found == {
        (1.0, 0.3): {"decoder.0.weight"},
        (1.0, 0.0): {"decoder.0.bias"},
        (2.0, 0.0): {"encoder.1.weight", "encoder.1.bias"},
        (0.1, 0.3): {"encoder.2.weight"},
        (0.1, 0.0): {"encoder.2.bias", "token"},
    }


def test_a_rate_of_frozen_parameters_alone_is_an_error():
    student, _ = freezing((["encoder.*"], None), (["token"], 3))
    rates = [RateConfig(match=("encoder.*", "token"), scale=0.1), RateConfig(match=("encoder.0.*",), scale=2.0)]
    parameter_groups(student, 0.1, rates[:1])  # the token trains later
    said = r"^train\.rates: 'encoder\.0\.\*': every parameter that matches is frozen for the whole run; leave .*$"
    with pytest.raises(UserError, match=said):
        parameter_groups(student, 0.1, rates)


def test_nothing_trainable_is_an_error():
    student = Tiny().requires_grad_(False)
    for call in (lambda: parameter_groups(student, 0.1), lambda: freezing(student=student)):
        with pytest.raises(UserError, match="no trainable parameter"):
            call()
