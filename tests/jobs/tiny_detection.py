"""A detection job of seconds for the tests of its task and its verbs: random models at 126 px on rendered scenes."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from samdistill.checkpoints.merge import merge
from samdistill.checkpoints.words import Words
from samdistill.jobs.detection.config import DetectionRunConfig
from samdistill.jobs.loading import load_config
from samdistill.sandbox.concepts import VOCABULARY, sandbox_words
from samdistill.sandbox.write import write_coco, write_concept_set
from samdistill.students import TextStudent, TextStudentConfig

_SPEC = importlib.util.spec_from_file_location("tiny_models", Path(__file__).parents[1] / "teachers" / "conftest.py")
assert _SPEC is not None and _SPEC.loader is not None
tiny_models = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(tiny_models)

Recipe = Callable[..., DetectionRunConfig]
OUTPUTS = ("mask", "box_l1", "giou", "logit", "presence", "semantic")
TERMS = (*OUTPUTS, "fpn", "encoder")
PHASES = (
    "train.phases=[{name: align, epochs: 1, lr: 1e-3, terms: [fpn]}, {name: features, epochs: 1, lr: 1e-3}, "
    "{name: outputs, epochs: 1, lr: 5e-4, terms: [mask, box_l1, giou, logit, presence, semantic]}]"
)
"""The three kinds of phase, an epoch each."""
TRUNK_PHASES = PHASES.replace("{name: align, epochs: 1, lr: 1e-3, terms: [fpn]}",
                              "{name: trunk, epochs: 1, lr: 1e-3, terms: [trunk]}")  # fmt: skip
"""Those of a hosted student."""

detector, tracker = tiny_models.detector, tiny_models.tracker


DESCRIBED = (
    "student.queries=4", "student.encoder_layers=1", "student.decoder_layers=1", "student.heads=4", "student.ffn=32",
    "student.text={hidden: 32, layers: 3, heads: 2, ffn: 32, context: 6}",
)  # fmt: skip
"""Sizes of a student with heads of its own."""


def small(detector: Path, scenes: Path, output: Path, sizes: tuple[str, ...] = DESCRIBED) -> list[str]:
    """Overrides that make any detection recipe tiny: the random teacher, the smallest student, four scenes a step."""
    return [
        f"output={output}", f"teacher.path={detector}", "teacher.image_size=null", "teacher.precision=fp32",
        "student.backbone=efficientvit_b0", *sizes, "data.kind=coco",
        f"data.root={scenes}", "data.held_out=val", "data.held_out_last=null", "data.workers=0",
        "questions.source=names", "match.floor=0.0", "train.batch_size=4", "train.accumulate=1", "train.precision=fp32",
        "train.log_every=1", "evaluate.batch_size=2",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 training and 4 held-out scenes as COCO, with the questions about the latter. Read only."""
    root = tmp_path_factory.mktemp("scenes")
    write_coco(root, 16, 126, 3, "train")
    write_coco(root, 4, 126, 4, "val")
    write_concept_set(root, 4, 126, 4, "val")
    return root


BATCHES = 7
"""Batches that the batch norms of ``measured`` have seen."""


def measured(module: nn.Module) -> nn.Module:
    """Give every batch norm random statistics, as those of a trained model."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
            norm.num_batches_tracked.fill_(BATCHES)
    return module


@pytest.fixture(scope="session")
def words_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished text run of the tiny teacher."""
    run = tmp_path_factory.mktemp("words")
    torch.manual_seed(4)
    return save_text(run)


def save_text(run: Path, width: int = 32, vocabulary: int = len(VOCABULARY), context: int = 6) -> Path:
    """Write a finished text run with random weights."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "projection_dim": 16, "num_hidden_layers": 3}
    student = TextStudent(
        TextStudentConfig(
            **sizes, num_attention_heads=2, vocab_size=vocabulary, width=width, max_position_embeddings=context
        )
    )
    for parameter in student.parameters():  # a layer scale begins so small that a step moves nothing behind it
        nn.init.normal_(parameter, std=0.2)
    measured(student).eval().save_pretrained(run / "student")
    Words(sandbox_words().tokenizer, context).save(run / "student")
    return run


@pytest.fixture(scope="session")
def lite(words_run: Path, detector: tuple[object, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny teacher with a small text encoder, as a merge of a text run writes it."""
    out = tmp_path_factory.mktemp("lite") / "merged"
    merge(words_run, detector[1], out)
    return out


@pytest.fixture(scope="session")
def detection(detector: tuple[object, Path], scenes: Path) -> Recipe:
    """detection(output, *overrides): ``detection/sandbox`` with the tiny models, on the scenes."""

    def make(output: Path, *overrides: str) -> DetectionRunConfig:
        config = load_config("detection/sandbox", [*small(detector[1], scenes, output), PHASES, *overrides])
        assert isinstance(config, DetectionRunConfig)
        return config

    return make


@pytest.fixture(scope="session")
def hosted(detector: tuple[object, Path], scenes: Path) -> Recipe:
    """hosted(output, *overrides): ``detection/hosted_sandbox`` with the tiny teacher, on the scenes."""

    def make(output: Path, *overrides: str) -> DetectionRunConfig:
        settings = [*small(detector[1], scenes, output, ()), TRUNK_PHASES, *overrides]
        config = load_config("detection/hosted_sandbox", settings)
        assert isinstance(config, DetectionRunConfig)
        return config

    return make
