"""The plan, against what the run then writes, builds and keeps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from samdistill.jobs.encoder.config import EncoderRunConfig
from samdistill.jobs.encoder.parts import EncoderParts
from samdistill.jobs.encoder.plan import saved_activation_bytes
from samdistill.jobs.encoder.task import trunk_config
from samdistill.pipeline import cache, plan, train
from samdistill.students import build_trunk


def measured_activation_bytes(student: nn.Module, batch: int, size: int) -> int:
    """What autograd really holds on to: distinct storages, weights and running statistics left out."""
    own = {t.untyped_storage().data_ptr() for t in (*student.parameters(), *student.buffers())}
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        student(pixel_values=torch.rand(batch, 3, size, size))
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("name", ["es_ev_s", "es_rv_s", "es_tv_s"])
@pytest.mark.parametrize("head", ["fused", "published"])
def test_parameters_and_activations_are_those_of_the_built_student(
    name: str, head: str, recipe, tmp_path: Path
) -> None:
    config: EncoderRunConfig = recipe(
        tmp_path, f"student.backbone={name}", f"student.head={head}", "train.accumulate=2"
    )
    found, parts = plan(config), EncoderParts(config)
    student = build_trunk(trunk_config(config.student, parts.teacher_info)).train()
    assert found.trunk_params + found.head_params == sum(p.numel() for p in student.parameters())
    assert found.head_params == sum(p.numel() for p in student.head.parameters())
    assert found.micro_batch == 4
    real = measured_activation_bytes(student, 4, 126)
    assert 0.8 * real < found.activation_bytes < 1.25 * real


def test_a_student_can_read_the_teachers_statistics(recipe, tmp_path: Path) -> None:
    configs = [recipe(tmp_path / name, f"student.host_statistics={name}") for name in ("true", "false")]
    same, own = (trunk_config(config.student, EncoderParts(config).teacher_info) for config in configs)
    assert (same.input_mean, same.input_std) == (same.host_mean, same.host_std) == ([0.5] * 3, [0.5] * 3)
    assert own.input_mean == pytest.approx([0.485, 0.456, 0.406]) and own.host_mean == same.host_mean


def test_activations_of_a_layer_counted_by_hand() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1, bias=False)

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.second(torch.relu(self.first(pixel_values)))

    with torch.device("meta"):
        model = Two()
    # the input of the first convolution and the output of ReLU, which ReLU and the second convolution share
    assert saved_activation_bytes(model, 2, 10) == 4 * 2 * 100 * (3 + 8)


@pytest.mark.parametrize(("codec", "views"), [("fp16", 1), ("int8", 2), ("pca16-int8", 1)])
def test_cache_bytes_are_those_the_cache_takes(codec: str, views: int, recipe, tmp_path: Path) -> None:
    config = recipe(tmp_path, f"cache.codec={codec}", f"data.views={views}")
    found = plan(config)
    assert not config.store_root.exists()  # a plan spends nothing
    cache(config, device="cpu", progress=False)
    assert found.cache_bytes == (config.store_root / "rank0-values.bin").stat().st_size
    assert found.cache_bytes == found.bytes_per_record * 24 * views and found.codec == codec


def test_steps_are_those_the_training_takes(cached: EncoderRunConfig, recipe, tmp_path: Path) -> None:
    config = recipe(tmp_path, f"cache.root={cached.store_root}", "train.batch_size=7")
    found = plan(config)
    assert (found.images, found.held_out_images, found.steps_per_epoch, found.steps) == (24, 8, 3, 6)
    assert train(config).steps == found.steps


def test_teacher_and_shapes(cached: EncoderRunConfig) -> None:
    found, teacher = plan(cached), EncoderParts(cached).running().teacher
    assert found.embedding_shape == teacher.embedding_shape == (192, 9, 9) and found.image_size == 126
    assert found.teacher_trunk_params == sum(p.numel() for p in teacher._trunk.parameters())


def test_memory_follows_the_settings(recipe, tmp_path: Path) -> None:
    plain, averaged = plan(recipe(tmp_path)), plan(recipe(tmp_path, "train.ema=0.99"))
    params = plain.trunk_params + plain.head_params
    assert plain.weights_and_optimiser_bytes == 16 * params  # float32: weights, gradients, two moments
    assert averaged.weights_and_optimiser_bytes == 20 * params
    held = plan(recipe(tmp_path, "train.freeze=[{match: [backbone.*]}]"))
    assert held.weights_and_optimiser_bytes == 4 * plain.trunk_params + 16 * plain.head_params
    config = recipe(tmp_path)
    assert plan(config, world=2).micro_batch == 4
    assert plan(config, world=2).activation_bytes == pytest.approx(plain.activation_bytes / 2, rel=0.01)


def test_small_batches_under_batch_norm_are_warned_of(recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Layers are counted in the built student; eight images a micro-batch are enough."""
    config = recipe(tmp_path, "train.batch_size=8", "train.accumulate=2")
    found, student = plan(config), build_trunk(trunk_config(config.student, EncoderParts(config).teacher_info))
    layers = sum(isinstance(module, nn.BatchNorm2d) for module in student.modules())
    assert found.batch_norms == layers > 0
    assert f"{layers} batch norm layer(s) normalise with the statistics of 4 image(s)" in caplog.text
    caplog.clear()
    for settings in (("train.accumulate=1",), ("train.accumulate=2", "train.batch_norm=frozen")):
        plan(recipe(tmp_path, "train.batch_size=8", *settings))
    assert not caplog.text
