"""Tiny SAM 3 hosts in every layout, and students that fit them."""

import pytest
import torch
import transformers
from original_names import to_original
from small_students import HIDDEN, make_student
from tiny_sam3 import detector_config, memory_config, tracker_config, video_config
from transformers import Sam3Model, Sam3TrackerModel, Sam3TrackerVideoModel, Sam3VideoModel

MODELS = {
    "sam3": lambda: Sam3Model(detector_config()),
    "tracker": lambda: Sam3TrackerModel(tracker_config()),
    "video": lambda: Sam3VideoModel(video_config()),
    "memory": lambda: Sam3TrackerVideoModel(memory_config()),
}


def scramble(model: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    return model.eval()


@pytest.fixture(autouse=True)
def quiet():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="session")
def hosts(tmp_path_factory):
    """Name to (model, folder): each layout that a student can be merged into."""
    made = {}
    for name, build in MODELS.items():
        transformers.logging.set_verbosity_error()
        model = scramble(build())
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text('{"size": {"height": 126, "width": 126}}')
        (folder / "tokenizer.json").write_text('{"tiny": true}')
        (folder / "README.md").write_text("the teacher's model card")
        made[name] = (model, folder)
    return made


@pytest.fixture(scope="session")
def original_state(hosts) -> dict[str, torch.Tensor]:
    """The tensors of a ``sam3.pt``, with what the published one has beside those of ``Sam3Model``."""
    state, left = to_original(hosts["sam3"][0].state_dict())
    assert not left
    state["detector.backbone.vision_backbone.trunk.blocks.1.attn.freqs_cis"] = torch.randn(4, 8)
    state["detector.backbone.vision_backbone.sam2_convs.2.conv_1x1.weight"] = torch.randn(32, HIDDEN, 1, 1)
    state["detector.geometry_encoder.points_direct_project.weight"] = torch.randn(32, 2)
    state["tracker.no_mem_embed"] = torch.randn(1, 1, 32)
    return {name: tensor.clone() for name, tensor in state.items()}


@pytest.fixture(scope="session")
def original(original_state, tmp_path_factory):
    path = tmp_path_factory.mktemp("original") / "sam3.pt"
    torch.save({"model": original_state}, path)
    return path


@pytest.fixture(scope="session")
def student(tmp_path_factory):
    """(student, run folder) with the folder ``student/`` in it."""
    model = make_student()
    run = tmp_path_factory.mktemp("run")
    model.save_pretrained(run / "student")
    (run / "config.yaml").write_text("job: encoder\n")
    return model, run
