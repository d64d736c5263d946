"""The text student: its sizes against the published ones, its names against its host's, saving and loading."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModel, Sam3LiteTextConfig, Sam3LiteTextModel

from samdistill.students import TEXT_SIZES, TextStudent, TextStudentConfig

PUBLISHED = {"s0": 42.54, "s1": 63.53, "b": 63.53, "l": 123.8}
"""Millions of parameters of SAM3-LiteText's encoders with their projection, as published (B is not)."""
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2,
         "projection_dim": 16, "vocab_size": 40, "max_position_embeddings": 8, "width": 12}  # fmt: skip


@pytest.mark.parametrize("size", TEXT_SIZES)
def test_the_sizes_are_the_published_ones(size: str) -> None:
    with torch.device("meta"):
        student = TextStudent(TextStudentConfig(**TEXT_SIZES[size], projection_dim=TEXT_SIZES[size]["hidden_size"]))
    count = sum(parameter.numel() for parameter in student.parameters()) / 1e6
    assert count == pytest.approx(PUBLISHED[size], rel=0.005)


def test_names_are_those_in_the_host() -> None:
    student = TextStudent(TextStudentConfig(**SMALL))
    text = {key: value for key, value in SMALL.items() if key != "width"}
    heads = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 8}
    config = Sam3LiteTextConfig(text_config=text, detr_encoder_config={**heads, "num_layers": 1})
    with torch.device("meta"):
        host = Sam3LiteTextModel(config).state_dict()
    own = {name: tensor.shape for name, tensor in student.state_dict().items()}
    assert own == {name: host[name].shape for name in host if name.startswith(("text_encoder.", "text_projection."))}


def test_it_is_saved_and_opened_by_transformers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    student = TextStudent(TextStudentConfig(**SMALL)).eval()
    student.save_pretrained(tmp_path)
    ids = torch.randint(0, 40, (3, 8))
    mask = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] + [0] * 7])
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(again, TextStudent)
    with torch.no_grad():
        found, wanted = again(ids, mask), student(ids, mask)
    assert found.last_hidden_state.shape == (3, 8, 12)
    assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)
    assert torch.equal(found.pooler_output[1], found.last_hidden_state[1, 4])


def test_every_trained_parameter_gets_a_gradient_and_what_no_output_reads_is_frozen() -> None:
    torch.manual_seed(0)
    student = TextStudent(TextStudentConfig(**SMALL))
    frozen = [name for name, parameter in student.named_parameters() if not parameter.requires_grad]
    assert frozen == ["text_encoder.projection.weight"]
    ids, mask = torch.randint(0, 40, (4, 8)), torch.ones(4, 8, dtype=torch.int64)
    nn.functional.mse_loss(student(ids, mask).last_hidden_state, torch.randn(4, 8, 12)).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in student.parameters() if p.requires_grad)
