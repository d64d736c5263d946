"""Video distillation: what is asked of a clip, what is remembered of it, and that nothing else trains."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_video import ALIGNED, CONTEXT_FRAMES, WIDTH, VideoRecipe
from torch import Tensor, nn
from torch.nn import functional as F

from samdistill.data.clips import ClipDataset
from samdistill.engine import Checkpoint, check_terms, fit
from samdistill.engine.task import Phase
from samdistill.jobs.video.config import VideoRunConfig
from samdistill.jobs.video.job import video_task
from samdistill.jobs.video.parts import VideoParts
from samdistill.jobs.video.student import VideoStudent, image_fingerprint
from samdistill.jobs.video.task import VideoTask
from samdistill.ops.images import normalise
from samdistill.pipeline import cache
from samdistill.students import EfficientSam3Model
from samdistill.types import UserError

LEVEL_3 = "student.memory.level=3"
TRAINED = ("memory_resampler.", "memory_attention.")


def task_of(config: VideoRunConfig) -> VideoTask:
    return video_task(VideoParts(config), prove_teacher=False)


@pytest.fixture(scope="module")
def stores(video: VideoRecipe, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A cache of each level. Read only."""
    found = {}
    for level in (2, 3):
        config = video(tmp_path_factory.mktemp(f"level{level}"), f"student.memory.level={level}")
        cache(config, device="cpu", progress=False)
        found[level] = config.store_root
    return found


@pytest.fixture
def task(video: VideoRecipe, stores: dict[int, Path], tmp_path: Path) -> VideoTask:
    """An epoch of alignment, three of memory, on level 3."""
    return task_of(video(tmp_path, LEVEL_3, ALIGNED, f"cache.root={stores[3]}"))


def batch_of(task: VideoTask, epoch: int, count: int = 4):
    data = task.dataset(epoch)
    items = [data[i] for i in range(count)]
    return task.to(task.collate(items, Phase.of(task.config.train, epoch)), torch.device("cpu"))


def test_every_term_reaches_the_memory_and_nothing_else(task: VideoTask) -> None:
    report = check_terms(task, "cpu", 4, 0, task.config.train)
    assert report.ok and not report.dead
    assert {term.phase for term in report.terms} == {"align", "memory", "memory, epoch 3"}
    assert [t.name for t in report.terms if t.phase == "align"] == ["align"]
    assert {t.name for t in report.terms} == set(task.config.term_names())
    assert all(name.startswith((*TRAINED, "memory_level.")) for name in report.trainable)
    student = task.build_student()
    held = {name for name, p in student.model.named_parameters() if not p.requires_grad}
    free = {name for name, p in student.model.named_parameters() if p.requires_grad}
    assert len(free) == len(report.trainable) and held
    assert all(name.startswith((*TRAINED, "vision_encoder.adapters.3.smooth.")) for name in free)


def test_a_level_that_the_heads_read_stays_as_it_is(
    video: VideoRecipe, stores: dict[int, Path], tmp_path: Path
) -> None:
    task = task_of(video(tmp_path, f"cache.root={stores[2]}"))
    assert all(name.startswith(TRAINED) for name, _ in task.build_student().named_parameters())
    with pytest.raises(UserError, match=r"level 2 feeds the heads"):
        VideoParts(video(tmp_path, ALIGNED)).view  # noqa: B018


def test_a_run_changes_the_memory_alone_and_its_checkpoints_hold_nothing_else(
    task: VideoTask, image_student: Path, tmp_path: Path, near: Callable[[Tensor, Tensor], None]
) -> None:
    config, run = task.config, tmp_path / "run"
    fit(task, config.train, run, workers=0, resolved=config.to_yaml())
    before = load_file(image_student / "model.safetensors")
    after = load_file(run / "student" / "model.safetensors")
    new = {name for name in after if name.startswith(TRAINED)}
    assert set(after) - new == set(before)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("vision_encoder.adapters.3.smooth.") for name in changed)
    saved = Checkpoint.load(run / "ckpt_epoch_4.pt")
    names = {name for name in saved.model if name != "_extra_state"}
    assert all(name.startswith(("memory_resampler.", "memory_attention.", "memory_level.")) for name in names)
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    assert len(saved.optimizer["state"]) == sum(not name.endswith(buffers) for name in names)
    kept = EfficientSam3Model.from_pretrained(run / "student")
    about = kept.config
    assert (about.memory_latents, about.memory_level, about.memory_context) == (12, 3, CONTEXT_FRAMES)
    image = EfficientSam3Model.from_pretrained(image_student).eval()
    asked = {"pixel_values": torch.randn(1, 3, 126, 126), **task.words.inputs(batch_of(task, 1).prompts, "cpu")}
    asked = {name: value[:1] for name, value in asked.items() if value.numel()}
    mine, theirs = kept.eval()(**asked), image(**asked)
    near(mine.pred_masks, theirs.pred_masks)
    near(mine.pred_logits, theirs.pred_logits)


def test_going_on_ends_in_the_same_weights_and_another_image_student_is_refused(
    video: VideoRecipe, stores: dict[int, Path], image_student: Path, tmp_path: Path
) -> None:
    settings = (LEVEL_3, ALIGNED, f"cache.root={stores[3]}")
    config = video(tmp_path, *settings)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(task_of(config), config.train, whole, workers=0, resolved=config.to_yaml())
    parts.mkdir()
    (parts / "ckpt_epoch_2.pt").write_bytes((whole / "ckpt_epoch_2.pt").read_bytes())
    fit(task_of(config), config.train, parts, workers=0, resolved=config.to_yaml())
    ends = [load_file(folder / "student" / "model.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
    other = tmp_path / "other" / "student"
    model = EfficientSam3Model.from_pretrained(image_student)
    with torch.no_grad():
        next(model.detr_decoder.parameters()).add_(1)
    model.save_pretrained(other)
    task = task_of(config)
    task.start = other
    with pytest.raises(
        UserError, match=r"belongs to the image checkpoint \w{12}, and this is \w{12}; give student.start"
    ):
        fit(task, config.train, parts, workers=0, resolved=config.to_yaml())


def test_the_fingerprint_is_of_the_image_student_alone(image_student: Path) -> None:
    from samdistill.checkpoints.student import load_with_memory

    first, second = load_with_memory(image_student, 12, 1), load_with_memory(image_student, 9, 2)
    assert image_fingerprint(first) == image_fingerprint(second)
    first.config.geometry = "longest_side"  # which checkpoints of earlier versions do not know
    assert image_fingerprint(first) == image_fingerprint(second)
    with torch.no_grad():
        first.vision_encoder.adapters[3].smooth[1].weight.add_(1)  # what an alignment changes
        assert image_fingerprint(first) == image_fingerprint(second)
        first.vision_encoder.adapters[2].smooth[1].weight.add_(1)
    assert image_fingerprint(first) != image_fingerprint(second)


def test_what_is_asked_and_what_is_true_of_it(task: VideoTask) -> None:
    """Against the clips themselves, object by object."""
    data = task.dataset(1)
    items = [data[i] for i in range(4)]
    batch, row = task.collate(items, Phase.of(task.config.train, 1)), 0
    for image, item in enumerate(items):
        assert len(item.objects) > 1
        for slot in range(len(item.objects)):
            assert batch.prompts.image[row] == image and batch.prompts.texts[row] in item.concepts[slot]
            there = bool(item.masks[slot].any())
            assert batch.truth.valid[row].tolist() == [there]
            assert torch.equal(batch.truth.masks[row, 0] > 0, item.masks[slot])
            if there:
                rows, columns = item.masks[slot].nonzero().unbind(1)
                box = torch.stack([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 126
                torch.testing.assert_close(batch.truth.boxes[row, 0], box)
            frames = len(item.context_rows)
            assert torch.equal(batch.past.marks[row, :frames], item.marks[slot])
            assert batch.past.marks[row, frames:].sum() == 0
            row += 1
        ages = batch.past.ages[image]
        assert ages[:frames].tolist() == [float(item.query_row - r) for r in item.context_rows.tolist()]
        assert batch.past.valid[image].tolist() == [True] * frames + [False] * (CONTEXT_FRAMES - frames)
    assert row == len(batch.prompts)


def test_without_marks_a_phrase_is_asked_once_and_all_objects_of_that_name_answer(
    video: VideoRecipe, stores: dict[int, Path], tmp_path: Path
) -> None:
    task = task_of(video(tmp_path, "student.memory.marks=false", f"cache.root={stores[2]}"))
    data = task.dataset(0)
    items = [data[i] for i in range(8)]
    batch = task.collate(items, Phase.of(task.config.train, 0))
    assert batch.past.marks is None
    for row, (text, image) in enumerate(zip(batch.prompts.texts, batch.prompts.image.tolist(), strict=True)):
        item = items[image]
        named = [slot for slot in range(len(item.objects)) if text in item.concepts[slot]]
        assert int(batch.truth.valid[row].sum()) == len(named)
        assert torch.equal(batch.truth.masks[row, : len(named)] > 0, item.masks[named])
    pairs = list(zip(batch.prompts.texts, batch.prompts.image.tolist(), strict=True))
    assert len(set(pairs)) == len(pairs) and {image for _, image in pairs} == set(range(8))


def test_a_clip_without_objects_is_asked_and_teaches_that_nothing_is_there(task: VideoTask) -> None:
    from dataclasses import replace

    data = task.dataset(1)
    item = data[0]
    none = replace(item, masks=item.masks[:0], objects=item.objects[:0], concepts=(), marks=item.marks[:0])
    batch = task.collate([none], Phase.of(task.config.train, 1))
    assert batch.prompts.texts == ("object",) and not batch.truth.valid.any() and batch.past.marks.sum() == 0
    terms = task.terms(task.build_student(), batch, Phase.of(task.config.train, 1))
    assert terms["mask"].value.item() == terms["select"].value.item() == 0 < terms["presence"].value.item()


def test_the_past_is_the_teachers_first_and_the_students_own_in_the_end(task: VideoTask) -> None:
    assert [task.own_share(epoch) for epoch in (1, 2, 3)] == [0.0, 0.5, 1.0]
    first, last = batch_of(task, 1), batch_of(task, 3)
    assert first.past.context is None and first.past.teacher is not None and not first.past.own.any()
    assert last.past.teacher is None and (last.past.own == last.past.valid).all()
    shares = [bool(flag) for i in range(8) for flag in task.dataset(2)[i].own]
    assert 0.2 < sum(shares) / len(shares) < 0.8


def test_each_frame_is_remembered_by_the_map_that_is_said(task: VideoTask) -> None:
    """Own maps are those of the frame alone; the teacher's come from the cache, brought to the grid as a grid."""
    batch, student = batch_of(task, 2), task.build_student().train()
    past, clips = batch.past, task.dataset(2)
    found = student.remembered(past)
    assert student.memory_level.training  # put back
    assert found.shape == (4, CONTEXT_FRAMES, WIDTH, 4, 4)
    model, kinds = student.model.eval(), set()
    vision = model.config.vision_config
    for row in range(4):
        item = clips[row]
        for slot in range(CONTEXT_FRAMES):
            if not past.valid[row, slot]:
                assert found[row, slot].abs().sum() == 0
                continue
            kinds.add(bool(past.own[row, slot]))
            if past.own[row, slot]:
                pixels = normalise(past.context[row, slot][None], tuple(vision.image_mean), tuple(vision.image_std))
                with torch.no_grad():
                    wanted = model.get_vision_features(pixels).fpn_hidden_states[3][0]
            else:
                wanted = task.levels.read([(item.key, int(item.context_frames[slot]))])[0][0]
            torch.testing.assert_close(found[row, slot], wanted, rtol=1e-4, atol=1e-4)
    assert kinds == {True, False}


def test_a_finer_map_keeps_its_rows_apart() -> None:
    from samdistill.ops.images import to_grid

    rows = torch.arange(9.0).view(1, 1, 9, 1).expand(1, 2, 9, 9)
    small = to_grid(rows, (4, 4))
    torch.testing.assert_close(small[..., :1].expand_as(small), small)
    assert (small[0, 0, 1:, 0] - small[0, 0, :-1, 0] > 1.5).all()
    assert to_grid(rows, (9, 9)) is rows


def test_alignment_brings_the_students_level_to_the_teachers(task: VideoTask) -> None:
    torch.manual_seed(0)
    student, batch = task.build_student().train(), batch_of(task, 0)
    assert batch.past.own.equal(batch.past.valid) and batch.past.teacher is not None
    optimiser = torch.optim.AdamW(student.memory_level.parameters(), 0.3)
    values = []
    for _ in range(20):
        loss = task.terms(student, batch, Phase.of(task.config.train, 0))["align"].value
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]
    _, own = student(None, batch.past, {}, batch.prompts.image)
    maps = batch.past.teacher[batch.past.valid]
    wanted = F.interpolate(maps, own.shape[-2:], mode="bilinear", antialias=True)
    assert task.terms(student, batch, Phase.of(task.config.train, 0))["align"].value.item() == pytest.approx(
        (own - wanted).square().mean().item(), rel=1e-3
    )


def test_statistics_of_the_aligned_level_are_kept_when_the_memory_trains(task: VideoTask) -> None:
    student = task.build_student().train()
    norm = next(m for m in student.memory_level.modules() if isinstance(m, nn.BatchNorm2d))
    seen = [norm.running_mean.clone()]
    for epoch in (0, 3):
        task.terms(student, batch_of(task, epoch), Phase.of(task.config.train, epoch))
        seen.append(norm.running_mean.clone())
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[1], seen[2])


def test_moving_the_student_moves_all_of_the_model(task: VideoTask) -> None:
    student = task.build_student()
    assert isinstance(student.double(), VideoStudent)
    kinds = {p.dtype for p in student.model.parameters()}
    assert kinds == {torch.float64} and {p.dtype for p in student.parameters()} == kinds


def test_the_same_clip_comes_again_and_another_epoch_brings_another(task: VideoTask) -> None:
    def drawn(epoch: int) -> list[tuple[int, list[int], Tensor]]:
        data = task.dataset(epoch)
        assert isinstance(data, ClipDataset)
        return [(data[i].query_row, data[i].context_rows.tolist(), data[i].own) for i in range(len(data))]

    first, again, other = drawn(2), drawn(2), drawn(3)
    assert all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(first, again, strict=True))
    assert [a[0] for a in first] != [a[0] for a in other]


def test_held_out_terms_are_those_of_the_students_own_memory(task: VideoTask) -> None:
    figures = task.validate(task.build_student().eval(), Phase.of(task.config.train, 1))
    assert set(figures) == {*task.config.term_names()[1:], "total"}
    weights = task.config.loss
    assert figures["total"] == pytest.approx(sum(getattr(weights, n) * v for n, v in figures.items() if n != "total"))


def test_held_out_figures_do_not_depend_on_the_size_of_a_batch(
    video: VideoRecipe, stores: dict[int, Path], tmp_path: Path
) -> None:
    """Four clips of unequal numbers of questions."""
    found, student = [], None
    for size in (4, 3, 1, 50):
        task = task_of(video(tmp_path, LEVEL_3, ALIGNED, f"cache.root={stores[3]}", f"cache.batch_size={size}"))
        torch.manual_seed(0)
        student = student or task.build_student().eval()
        found.append(task.validate(student, Phase.of(task.config.train, 1)))
    assert set(found[0]) == {*task.config.term_names()[1:], "total"}
    assert all(figures == pytest.approx(found[0], rel=1e-3, abs=1e-6) for figures in found)
    data = ClipDataset(task.held_out, task.transform, task.held_out.keys, task.rules(1.0, cached=False))
    questions = [task.counts(task.collate([data[i]]))["mask"] for i in range(len(data))]
    assert len(set(questions)) > 1, "or every division weighs alike"


def test_the_newest_image_student_is_found_and_strangers_are_refused(
    video: VideoRecipe, image_student: Path, tmp_path: Path
) -> None:
    import os
    import shutil

    runs = tmp_path / "runs"
    for name, age in (("old", 100), ("new", 10), ("video", 0)):
        shutil.copytree(image_student, runs / name / "student")
        os.utime(runs / name / "student" / "config.json", (1e9 - age, 1e9 - age))
    about = json.loads((runs / "video" / "student" / "config.json").read_text())
    (runs / "video" / "student" / "config.json").write_text(json.dumps(about | {"memory_latents": 64}))
    os.utime(runs / "video" / "student" / "config.json", (1e9, 1e9))
    parts = VideoParts(video(tmp_path / "out", "student.start=null", f"student.runs={runs}"))
    assert parts.start == runs / "new" / "student" and parts.resolved.student.start == parts.start

    def refused(start: Path, why: str) -> None:
        with pytest.raises(UserError, match=why):
            VideoParts(video(tmp_path / "out", f"student.start={start}")).start  # noqa: B018

    refused(runs / "video", "already has a memory")
    refused(tmp_path, "holds no student")
    (runs / "old" / "student" / "config.json").write_text(json.dumps({"model_type": "sam3"}))
    refused(runs / "old", "holds a 'sam3' model, no student of the detection job")
    with pytest.raises(UserError, match="no student of the detection job below"):
        VideoParts(video(tmp_path / "out", "student.start=null", f"student.runs={tmp_path / 'none'}")).start  # noqa: B018


def test_more_windows_than_cells_are_refused_and_the_stride_is_that_of_the_videos(
    video: VideoRecipe, task: VideoTask, tmp_path: Path
) -> None:
    config = video(tmp_path, "student.memory={level: 3, latents: 32, windows: 5}")
    with pytest.raises(UserError, match=r"windows=5: level 3 of .* has 4 x 4 cells; give 4 at most"):
        VideoParts(config).image_student_config  # noqa: B018
    assert task.build_student().model.config.memory_stride == 4

    class EachFrame:
        def record(self, key: str):
            return SimpleNamespace(annotated=(3, 5, 7))

    task.source = EachFrame()
    assert task.build_student().model.config.memory_stride == 2
