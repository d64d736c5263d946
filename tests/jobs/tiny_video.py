"""A video job of seconds for the tests of its task and its verbs: random models at 126 px on rendered videos."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from samdistill.checkpoints.words import Words
from samdistill.jobs.loading import load_config
from samdistill.jobs.video.config import VideoRunConfig
from samdistill.sandbox.concepts import CONTEXT, VOCABULARY, build_tokenizer
from samdistill.sandbox.videos import VideoStyle
from samdistill.sandbox.write_videos import write_sav
from samdistill.students import build_detector, efficient_sam3_config

VideoRecipe = Callable[..., VideoRunConfig]
WIDTH, CONTEXT_FRAMES = 32, 3
ALIGNED = (
    "train.phases=[{name: align, epochs: 1, lr: 1e-2, terms: [align]}, "
    "{name: memory, epochs: 3, lr: 1e-2, terms: [mask, box_l1, giou, iou, presence, select]}]"
)


@pytest.fixture(scope="session")
def image_student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random image student, with its tokenizer. Read only."""
    torch.manual_seed(0)
    config = efficient_sam3_config(
        backbone="es_ev_s", image_size=126, hidden_size=WIDTH, heads=4, ffn=64, encoder_layers=1, decoder_layers=1,
        queries=6, text={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "projection_dim": 32,
                         "num_attention_heads": 2, "vocab_size": len(VOCABULARY)},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("images") / "run" / "student"
    build_detector(config).save_pretrained(folder)
    Words(build_tokenizer(), CONTEXT).save(folder)
    return folder


@pytest.fixture(scope="session")
def films(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training and two held-out videos of six annotated frames as SA-V. Read only."""
    root = tmp_path_factory.mktemp("films")
    for split, count, seed in (("train", 4, 3), ("val", 2, 4)):
        write_sav(root, count, (63, 84), seed, split, VideoStyle(frames=24))
    return root


@pytest.fixture(scope="session")
def video(detector: tuple[object, Path], films: Path, image_student: Path) -> VideoRecipe:
    """video(output, *overrides): ``video/sandbox`` with the tiny models, on the videos."""

    def make(output: Path, *overrides: str) -> VideoRunConfig:
        settings = [
            f"output={output}", f"teacher.path={detector[1]}", f"data.root={films}", "data.workers=0",
            f"student.start={image_student}", "student.memory={latents: 12, layers: 1, windows: 2}",
            f"clips={{context: {CONTEXT_FRAMES}, per_video: 2}}", "train.batch_size=4", "train.log_every=1",
            "cache.batch_size=2", *overrides,
        ]  # fmt: skip
        config = load_config("video/sandbox", settings)
        assert isinstance(config, VideoRunConfig)
        return config

    return make
