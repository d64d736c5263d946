"""A task may change the trained student before it is saved, once, and its checkpoints keep what was trained."""

import pytest
import torch
from torch import nn
from toy_task import ToyTask, toy_config, toy_yaml
from transformers import PretrainedConfig, PreTrainedModel

from samdistill.engine import Checkpoint, fit


class ModelConfig(PretrainedConfig):
    model_type = "samdistill_test_finish"


class Model(PreTrainedModel):
    config_class = ModelConfig

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.net = ToyTask().build_student()
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x)


class Doubles(ToyTask):
    """Doubles all weights at the end."""

    calls = 0

    def build_student(self) -> nn.Module:
        return Model(ModelConfig())

    @torch.no_grad()
    def finish(self, student: nn.Module) -> None:
        self.calls += 1
        for parameter in student.parameters():
            parameter.mul_(2)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_the_saved_student_is_changed_once_and_checkpoints_are_not(tmp_path, ema: float) -> None:
    config, task = toy_config(ema=ema), Doubles()
    result = fit(task, config, tmp_path, workers=0, resolved=toy_yaml(config))
    saved = Checkpoint.load(result.checkpoint)
    trained = dict(saved.ema or saved.model)
    loaded = Model.from_pretrained(result.student)
    assert all(torch.equal(value, 2 * trained[name]) for name, value in loaded.named_parameters())
    again = fit(task, config, tmp_path, workers=0, resolved=toy_yaml(config))
    assert task.calls == 1 and again.student == result.student
    assert all(torch.equal(value, saved.model[name]) for name, value in Checkpoint.load(again.checkpoint).model.items())
