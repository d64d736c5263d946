"""Parts of a run that differ in what is trained: their names and first epochs."""

import pytest
from torch import nn

from samdistill.config import TrainConfig
from samdistill.engine.task import Task, stages_at

PHASES = [{"name": "early", "epochs": 2, "lr": 1e-3}, {"name": "late", "epochs": 3, "lr": 1e-3}]


class Bare(Task):
    """What every task has for nothing."""

    build_student = dataset = collate = to = terms = None


def config(*until, phases=None, epochs=5):
    freeze = [{"match": ["*"], "until": at} for at in until]
    return TrainConfig.model_validate({"freeze": freeze} | ({"phases": phases} if phases else {"epochs": epochs}))


@pytest.mark.parametrize(
    ("train", "stages"),
    [
        (config(), [("", 0)]),
        (config(None), [("", 0)]),
        (config(5, 9), [("", 0)]),  # they outlast the run
        (config(3), [("epoch 0", 0), ("epoch 3", 3)]),
        (config(4, 1, None, 4), [("epoch 0", 0), ("epoch 1", 1), ("epoch 4", 4)]),
        (config(phases=PHASES), [("early", 0), ("late", 2)]),
        (config(phases=PHASES[:1]), [("early", 0)]),
        (config(2, 3, 1, phases=PHASES), [("early", 0), ("early, epoch 1", 1), ("late", 2), ("late, epoch 3", 3)]),
    ],
)
def test_stages_are_the_phases_and_the_ends_of_freezes(train, stages):
    assert Bare().stages(train) == stages


def test_further_epochs_join_in_order():
    train = config(3, phases=PHASES)
    assert stages_at(train, (4, 3, 0, 7)) == [("early", 0), ("late", 2), ("late, epoch 3", 3), ("late, epoch 4", 4)]
    assert stages_at(config(), (2,)) == [("epoch 0", 0), ("epoch 2", 2)]
    assert stages_at(config(), (0,)) == [("", 0)]


def test_a_task_exports_its_student_unless_it_says_otherwise():
    student = nn.Linear(1, 1)
    assert Bare().export(student) is student
