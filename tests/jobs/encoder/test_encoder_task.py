"""Encoder distillation: the record is the teacher's answer to the very view the student sees."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from samdistill.data import record_key, view_seed
from samdistill.engine import fit
from samdistill.jobs.encoder.config import EncoderRunConfig
from samdistill.jobs.encoder.parts import EncoderParts
from samdistill.jobs.encoder.task import EncoderBatch, EncoderTask
from samdistill.pipeline import cache
from samdistill.students import TrunkOutput
from samdistill.teachers import build_teacher
from samdistill.types import ImageBatch, UserError

VARIED = ("data.views=3", "data.augment.crop_scale=[0.5, 1.0]", "data.augment.brightness=0.3")


@pytest.fixture(scope="module")
def varied(recipe, tmp_path_factory) -> EncoderRunConfig:
    """Three augmented views of each image, cached."""
    config = recipe(tmp_path_factory.mktemp("varied"), *VARIED)
    cache(config, device="cpu", progress=False)
    return config


def task_of(config: EncoderRunConfig) -> EncoderTask:
    parts = EncoderParts(config)
    return parts.task(parts.signals(proven=False))


@pytest.fixture(scope="module")
def task(varied: EncoderRunConfig) -> EncoderTask:
    return task_of(varied)


def one_batch(task: EncoderTask, indices: list[int], epoch: int = 0) -> EncoderBatch:
    data = task.dataset(epoch)
    return task.to(task.collate([data[i] for i in indices]), torch.device("cpu"))


class Fixed(nn.Module):
    """A student that answers the same tokens to everything, and remembers its input."""

    def __init__(self, grid: torch.Tensor) -> None:
        super().__init__()
        self.tokens = nn.Parameter(grid.flatten(2).transpose(1, 2).clone())

    def forward(self, pixel_values: torch.Tensor) -> TrunkOutput:
        self.seen = pixel_values
        return TrunkOutput(last_hidden_state=self.tokens)


def test_the_target_is_the_teachers_output_of_the_replayed_view(task: EncoderTask, varied: EncoderRunConfig) -> None:
    teacher = build_teacher(varied.teacher)
    for view in range(3):
        data, indices = task.dataset(view), [0, 5, 23]
        parts = EncoderParts(varied)
        for index in indices:
            item, _ = data[index]
            target = one_batch(task, [index], view).target[0]
            key = data.images.keys[index]
            seed = task.signals.stores[0].read(record_key(key, view)).seed
            assert seed == view_seed(varied.data.seed, key, view) == item.seed
            with Image.open(varied.data.root / "images" / "train" / f"{key}.jpg") as image:
                canvas, size = parts.transform(image.convert("RGB"), seed)  # replayed from the record's seed alone
            assert size == item.size and torch.equal(canvas, item.image)
            fresh = teacher.extract(ImageBatch.full(canvas[None]))["image_embedding"][0]
            assert (target - fresh).norm() / fresh.norm() < 2e-3  # float16, and a batch of another size
            other = one_batch(task, [(index + 1) % 24], view).target[0]
            assert (target - other).norm() / fresh.norm() > 0.05  # the bound above means something


def test_epochs_rotate_through_the_views(task: EncoderTask) -> None:
    seeds = [[task.dataset(epoch)[i][0].seed for i in range(4)] for epoch in range(6)]
    assert seeds[:3] == seeds[3:]
    assert len({tuple(row) for row in seeds[:3]}) == 3
    assert not torch.equal(one_batch(task, [0], 0).target, one_batch(task, [0], 1).target)
    assert len({len(task.dataset(epoch)) for epoch in range(3)}) == 1


def test_another_seed_than_the_caches_is_refused_by_name(varied: EncoderRunConfig) -> None:
    other = task_of(varied.model_copy(update={"data": varied.data.model_copy(update={"seed": 1})}))
    key = other.dataset(0).identity[3]
    with pytest.raises(UserError, match=f"^{key}: the cache was made with augmentation seed .* set data.seed"):
        one_batch(other, [3])


def test_an_image_that_broke_after_it_was_cached_is_named(task: EncoderTask, monkeypatch: pytest.MonkeyPatch) -> None:
    data = task.dataset(0)
    monkeypatch.setattr(data.images.source, "image_file", lambda key: Path("gone.jpg"))
    with pytest.raises(UserError, match=f"^{data.images.keys[2]}: cached, but no longer readable"):
        _ = data[2]


def test_terms_are_the_published_sums_on_a_case_done_by_hand(task: EncoderTask) -> None:
    batch = one_batch(task, [0, 7])
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(batch.target.shape, generator=generator)
    student = Fixed(predicted)
    terms = task.terms(student, batch)
    mse, cosine = 0.0, 0.0
    for image in range(2):
        for row in range(9):
            for column in range(9):
                p, t = (x[image, :, row, column].double() for x in (predicted, batch.target))
                mse += sum((a - b) ** 2 for a, b in zip(p.tolist(), t.tolist(), strict=True)) / 81 / 2
                cosine += (1 - float(p @ t) / math.sqrt(float(p @ p) * float(t @ t))) / 81 / 2
    assert list(terms) == ["mse", "cosine"]
    assert terms["mse"].value.item() == pytest.approx(mse, rel=1e-4)
    assert terms["cosine"].value.item() == pytest.approx(cosine, rel=1e-4)
    assert terms.total.item() == pytest.approx(mse + cosine, rel=1e-4)
    expected = batch.images.images.double() / 127.5 - 1  # SAM 3's statistics: the host's own normalisation
    torch.testing.assert_close(student.seen.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_perfect_student_has_nothing_to_learn(task: EncoderTask) -> None:
    batch = one_batch(task, [1, 2])
    terms = task.terms(Fixed(batch.target), batch)
    assert terms["mse"].value.item() == 0 and terms["cosine"].value.item() == pytest.approx(0, abs=1e-6)


def test_weights_come_from_the_config(varied: EncoderRunConfig) -> None:
    config = varied.model_copy(update={"loss": varied.loss.model_copy(update={"mse": 0.25, "cosine": 3.0})})
    changed = task_of(config)
    batch = one_batch(changed, [0, 1])
    terms = changed.terms(Fixed(torch.zeros_like(batch.target) + 1), batch)
    assert (terms["mse"].weight, terms["cosine"].weight) == (0.25, 3.0)


@pytest.fixture(scope="module")
def padded(recipe, tmp_path_factory) -> EncoderTask:
    """Wide images on a padded canvas: 140 x 70 pixels lie on the upper half of 126 x 126."""
    root = tmp_path_factory.mktemp("wide")
    for number in range(4):
        noise = torch.randint(0, 256, (70, 140, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(root / f"{number}.png")
    config = recipe(
        tmp_path_factory.mktemp("padded"), f"data.root={root}", "data.kind=folder", "data.geometry=longest_side",
        "data.held_out_fraction=0.25",
    )  # fmt: skip
    cache(config, device="cpu", progress=False)
    return task_of(config)


def test_padding_does_not_influence_the_loss(padded: EncoderTask) -> None:
    batch = one_batch(padded, [0, 1])
    assert batch.images.sizes.tolist() == [[63, 126]] * 2
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(batch.target.shape, generator=generator)
    wild, target = predicted.clone(), batch.target.clone()
    # 63 px are 4.5 cells of 14; the centre of row 4 lies at 63 and so, as the first, not on the image
    wild[:, :, 4:] = 1e4
    target[:, :, 4:] = -1e4
    first, student = padded.terms(Fixed(predicted), batch), Fixed(wild)
    second = padded.terms(student, EncoderBatch(batch.images, (target,)))
    for name in first:
        assert first[name].value.item() == second[name].value.item() > 0
    second.total.backward()
    gradient = student.tokens.grad.view(2, 9, 9, -1).abs().sum(-1)
    assert bool((gradient[:, 4:] == 0).all()) and bool((gradient[:, :4] > 0).all())
    wild[:, :, 3] = 1e4
    assert padded.terms(Fixed(wild), batch)["mse"].value > 10 * first["mse"].value


def test_the_student_fits_into_the_teachers_place(task: EncoderTask) -> None:
    torch.manual_seed(0)
    student = task.build_student()
    config = student.config
    assert (config.hidden_size, config.image_size, config.patch_size) == (192, 126, 14)
    assert tuple(config.host_mean) == task.teacher.mean and tuple(config.host_std) == task.teacher.std
    batch = one_batch(task, [0, 1])
    terms = task.terms(student.train(), batch)
    terms.total.backward()
    assert terms.nonfinite() == [] and all(p.grad is not None for p in student.parameters())


def test_batches_move_whole(task: EncoderTask) -> None:
    moved = task.to(task.collate([task.dataset(0)[0]]), torch.device("meta"))
    assert moved.target.device.type == moved.images.images.device.type == moved.images.sizes.device.type == "meta"


def test_training_lowers_both_terms_below_those_of_the_best_constant(varied: EncoderRunConfig, tmp_path: Path) -> None:
    """24 images, 36 steps: the student must have learnt more than the mean of its targets."""
    settings = varied.train.model_copy(update={"epochs": 12, "lr": 4e-3, "warmup_epochs": 1.0})
    task = task_of(varied)
    result = fit(task, settings, tmp_path / "run", workers=0, resolved=varied.to_yaml())
    batch = one_batch(task, list(range(24)))
    images, targets = batch.images, batch.target
    constant = targets.mean((0, 2, 3), keepdim=True).expand_as(targets)
    floor = task.terms(Fixed(constant), EncoderBatch(images, (targets,)))
    assert result.terms["mse"] < floor["mse"].value.item()
    assert result.terms["cosine"] < floor["cosine"].value.item()
