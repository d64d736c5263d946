"""The video job on a hosted student of the detection job: a memory in a SAM 3 with a distilled trunk."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_video import VideoRecipe
from torch import Tensor
from transformers import AutoModel, AutoProcessor, Sam3LiteTextModel, Sam3Model

import samdistill as sd
from samdistill.checkpoints.processors import write_processor
from samdistill.checkpoints.student import load_with_memory
from samdistill.config import TeacherConfig
from samdistill.engine import check_terms, fit
from samdistill.jobs.video.config import VideoRunConfig
from samdistill.jobs.video.job import video_task
from samdistill.jobs.video.parts import VideoParts
from samdistill.jobs.video.plan import plan_video
from samdistill.jobs.video.student import image_fingerprint
from samdistill.sandbox.concepts import sandbox_words
from samdistill.students import (
    HostedVideoLiteModel,
    HostedVideoModel,
    StudentTrunkConfig,
    build_trunk,
    host_trunk,
    without_dropout,
)
from samdistill.teachers import Sam3Detector
from samdistill.types import ConceptPrompts, ImageBatch, UserError

MEMORY = ("memory_resampler.", "memory_attention.")
OWN, ONLINE = "clips.own=[1.0, 1.0]", "cache.mode=online"
KINDS = {"sam3": (Sam3Model, HostedVideoModel), "lite": (Sam3LiteTextModel, HostedVideoLiteModel)}


@pytest.fixture(scope="session")
def starts(detector: tuple[object, Path], lite: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Hosted students with SAM 3's own text encoder and with a small one, as runs of the detection job. Read only."""
    found = {}
    for name, (kind, _) in KINDS.items():
        host = kind.from_pretrained(detector[1] if name == "sam3" else lite)
        vit = host.config.vision_config.backbone_config
        torch.manual_seed(5)
        trunk = build_trunk(StudentTrunkConfig(
            backbone="es_ev_s", head="strided", hidden_size=vit.hidden_size, image_size=vit.image_size,
        ))  # fmt: skip
        host.config = without_dropout(host.config)
        found[name] = tmp_path_factory.mktemp(name)
        folder = found[name] / "student"
        host_trunk(host, trunk).save_pretrained(folder)
        sandbox_words().save(folder)
        write_processor(folder)
    return found


def recipe(video: VideoRecipe, start: Path, output: Path, *more: str) -> VideoRunConfig:
    return video(output, f"student.start={start}", OWN, *more)


def ask(model: object) -> Tensor:
    """Query logits of one grey image."""
    batch = ImageBatch.full(torch.full((1, 3, 126, 126), 90, dtype=torch.uint8))
    return model.answer(batch, ConceptPrompts.words(["red circle"], [0])).pred_logits


@pytest.mark.parametrize("name", list(KINDS))
def test_it_trains_the_memory_alone_and_serves(
    name: str, starts: dict[str, Path], video: VideoRecipe, films: Path, tmp_path: Path,
    near: Callable[[Tensor, Tensor], None],
) -> None:  # fmt: skip
    config = recipe(video, starts[name], tmp_path / "run", "train.phases=[{name: memory, epochs: 2, lr: 1e-2}]")
    parts = VideoParts(config)
    task = video_task(parts)
    report = check_terms(task, "cpu", 4, 0, config.train)
    assert report.ok and not report.dead and all(own.startswith(MEMORY) for own in report.trainable)
    planned = plan_video(parts)
    assert set(planned.parts) == {prefix.rstrip(".") for prefix in MEMORY}
    fit(task, config.train, config.output, workers=0, resolved=config.to_yaml())
    task.words.save(config.output / "student")
    before = load_file(starts[name] / "student" / "model.safetensors")
    after = load_file(config.output / "student" / "model.safetensors")
    assert all(torch.equal(after[tensor], value) for tensor, value in before.items())
    new = set(after) - set(before)
    assert new and all(tensor.startswith(MEMORY) for tensor in new)
    first = load_with_memory(starts[name] / "student", 12, 1, 2)
    assert any(not torch.equal(first.state_dict()[tensor], after[tensor]) for tensor in new)
    kept = AutoModel.from_pretrained(config.output / "student")
    assert type(kept) is KINDS[name][1] and kept.config.memory_latents == 12 and kept.config.memory_level == 2
    opened = sd.load(config.output, device="cpu")
    assert opened.kind == "detector with memory"
    image = Sam3Detector(TeacherConfig(path=str(starts[name] / "student")))
    near(ask(opened.network), ask(image))
    write_processor(config.output / "student")
    assert AutoProcessor.from_pretrained(config.output / "student") is not None
    film = next((films / "val").glob("*.mp4"))
    seen = list(opened.track(film, boxes=[(5, 5, 40, 40)], threshold=0.0, frames=6))
    assert len(seen) == 6 and seen[0].objects[0].visible
    if name == "sam3":
        assert opened.evaluate(films, videos=1, progress=False).names == ["without memory", "student"]
    with pytest.raises(UserError, match="a hosted student with a memory cannot be exported"):
        opened.export(tmp_path / "out")


def test_the_memory_changes_answers_and_only_a_gradient_to_it_arrives(starts: dict[str, Path]) -> None:
    model = load_with_memory(starts["sam3"] / "student", 12, 1, 2).requires_grad_(False)
    model.memory_resampler.requires_grad_(True)
    words = sandbox_words().inputs(ConceptPrompts.words(["star"], [0]), "cpu")
    asked = {"pixel_values": torch.zeros(1, 3, 126, 126), "input_ids": words["input_ids"],
             "attention_mask": words["attention_mask"]}  # fmt: skip
    side, made = model.config.level_side(2), torch.Generator().manual_seed(1)
    past = torch.randn(1, 3, model.config.vision_config.fpn_hidden_size, side, side, generator=made)
    plain, told = model(**asked), model.forward_video(**asked, memory_features=past)
    assert not torch.allclose(plain.pred_logits, told.pred_logits)
    told.pred_masks.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.memory_resampler.parameters()
               if p is not model.memory_resampler.target)  # fmt: skip  # no marks are given


def test_the_coarsest_level_is_aligned_with_the_teacher(
    starts: dict[str, Path], video: VideoRecipe, tmp_path: Path
) -> None:
    phases = "train.phases=[{name: align, epochs: 1, lr: 1e-2, terms: [align]}, {name: memory, epochs: 1, lr: 1e-2}]"
    config = recipe(video, starts["sam3"], tmp_path, ONLINE, "student.memory.level=3", phases)
    report = check_terms(video_task(VideoParts(config)), "cpu", 4, 0, config.train)
    assert report.ok
    assert {name.split(".")[0] for name in report.trainable} == {"memory_resampler", "memory_attention", "memory_level"}


def test_a_memory_belongs_to_its_image_student(starts: dict[str, Path], video: VideoRecipe, tmp_path: Path) -> None:
    student = video_task(VideoParts(recipe(video, starts["sam3"], tmp_path))).build_student()
    state = copy.deepcopy(student.state_dict())
    student.load_state_dict(state)
    assert image_fingerprint(student.model) == student.fingerprint
    student.model.vision_encoder.backbone.head.state_dict(keep_vars=True)
    with torch.no_grad():
        next(student.model.vision_encoder.backbone.parameters()).add_(1.0)
    changed = type(student)(student.model, "elsewhere")
    with pytest.raises(UserError, match="this memory belongs to the image checkpoint"):
        changed.load_state_dict(state)


def test_other_starts_are_refused(
    detector: tuple[object, Path], tracker: tuple[object, Path], starts: dict[str, Path], video: VideoRecipe,
    tmp_path: Path,
) -> None:  # fmt: skip
    load_with_memory(starts["sam3"] / "student", 12, 1, 2).save_pretrained(tmp_path / "remembers")
    for start, complaint in (
        (detector[1], "holds a 'sam3' model, no student of the detection job"),
        (tracker[1], "holds a 'sam3_tracker' model, no student of the detection job"),
        (tmp_path / "remembers", "already has a memory; give a student of the detection job"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=complaint) as refused:
            _ = VideoParts(recipe(video, start, tmp_path)).start
        assert str(refused.value).startswith("student.start: ") and "\n" not in str(refused.value)
