"""Training and its proof, over real configs: what is refused, what resumes, what reaches the student."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoProcessor

import samdistill
from samdistill.cli import main
from samdistill.config import packaged
from samdistill.jobs.caching import left_out_of
from samdistill.jobs.encoder.config import EncoderRunConfig
from samdistill.jobs.loading import load_config
from samdistill.pipeline import cache, check, train
from samdistill.store import FeatureStore
from samdistill.types import UserError


@pytest.mark.parametrize("name", [name for name in packaged() if name.startswith("encoder/")])
def test_every_term_of_every_packaged_recipe_reaches_the_student(name: str, world: Path, tmp_path: Path) -> None:
    small = [
        "teacher.path=sandbox", "teacher.image_size=null", f"data.root={world}", "data.kind=sa1b", "data.fraction=1.0",
        "data.workers=0", "train.precision=fp32", f"output={tmp_path}",
    ]  # fmt: skip
    report = samdistill.check(load_config(name, small), device="cpu")
    assert report.ok and [term.name for term in report.terms] == ["mse", "cosine"]
    assert all(term.grad_norm > 0 and term.value > 0 and term.weight == 1 for term in report.terms)
    assert len(report.trainable) > 50
    assert list(tmp_path.iterdir()) == []  # without a cache the teacher runs


def test_check_reads_the_runs_own_cache(cached: EncoderRunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = FeatureStore.read_batch

    def spy(self: FeatureStore, keys: list[str]) -> object:
        assert self.root == cached.store_root
        read.extend(keys)
        return original(self, keys)

    monkeypatch.setattr(FeatureStore, "read_batch", spy)
    first, second = check(cached, device="cpu"), check(cached, device="cpu")
    assert first == second and first.ok  # the same batch, the same student
    assert len(read) == 8 and set(read) <= set(FeatureStore(cached.store_root).keys)


def test_one_image_is_too_few_for_a_check(recipe, world: Path, tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text(sorted(p.stem for p in (world / "images" / "train").iterdir())[0])
    with pytest.raises(UserError, match="two readable images"):
        check(recipe(tmp_path / "run", f"data.ids={tmp_path / 'one.txt'}"), device="cpu")


def test_an_absent_or_incomplete_cache_is_said(recipe, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"embeddings: no cached embeddings here; run `samdistill cache`"):
        train(recipe(tmp_path))
    cache(recipe(tmp_path, "data.fraction=0.5"), device="cpu", progress=False)
    held = len(FeatureStore(tmp_path / "embeddings"))
    assert 0 < held < 24
    for verb in (train, check):
        with pytest.raises(UserError, match=rf"{24 - held} of 24 views are not cached \(.*\); run `samdistill cache`"):
            verb(recipe(tmp_path))
    with pytest.raises(UserError, match=f"{48 - held} of 48 views are not cached"):
        train(recipe(tmp_path, "data.views=2"))


def test_a_subset_of_what_is_cached_can_be_trained_on(cached: EncoderRunConfig, recipe, tmp_path: Path) -> None:
    config = recipe(tmp_path, f"cache.root={cached.store_root}", "data.fraction=0.7", "train.epochs=1")
    assert train(config).steps == 15 // 8


def test_another_seed_than_the_caches_stops_by_key(
    cached: EncoderRunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(cached.to_yaml())
    argv = ["train", str(path), f"cache.root={cached.store_root}", f"output={tmp_path / 'run'}", "data.seed=9"]
    assert main(argv) == 2
    assert "set data.seed as it was, or cache again" in capsys.readouterr().err.splitlines()[-1]


def test_the_run_folder_is_the_published_one_and_its_student_opens(
    cached: EncoderRunConfig, recipe, tmp_path: Path
) -> None:
    config = recipe(tmp_path / "run", f"cache.root={cached.store_root}")
    result = train(config)
    names = {path.name for path in config.output.iterdir()}
    assert {"config.yaml", "log_rank0.txt", "metrics.jsonl", "tensorboard", "ckpt_epoch_2.pt", "student"} <= names
    assert load_config(config.output / "config.yaml") == config  # resolved: it repeats the run
    assert (result.steps, result.epochs, result.checkpoint.name) == (6, 2, "ckpt_epoch_2.pt")
    assert result.student is not None
    student = samdistill.StudentTrunk.from_pretrained(result.student)
    with torch.no_grad():
        assert student(pixel_values=torch.zeros(1, 3, 126, 126)).last_hidden_state.shape == (1, 81, 192)
    processor = AutoProcessor.from_pretrained(result.student)
    assert processor.size.height == 126 and list(processor.image_mean) == list(student.config.host_mean)
    assert train(config).images_per_second == 0  # finished


def test_data_may_move_between_two_calls_and_other_images_are_refused(
    cached: EncoderRunConfig, world: Path, recipe, tmp_path: Path
) -> None:
    settings = (f"cache.root={cached.store_root}", "train.epochs=1")
    train(recipe(tmp_path / "run", *settings))
    moved = shutil.copytree(world, tmp_path / "elsewhere")
    assert train(recipe(tmp_path / "run", *settings, f"data.root={moved}")).images_per_second == 0
    state = torch.load(tmp_path / "run" / "ckpt_epoch_1.pt", weights_only=True)
    torch.save(state | {"data": "0" * 64}, tmp_path / "run" / "ckpt_epoch_1.pt")  # as of 24 other images
    with pytest.raises(UserError, match=r"ckpt_epoch_1\.pt: trained on other images"):
        train(recipe(tmp_path / "run", *settings))


@pytest.mark.parametrize("content", ["{", '{"key": 3}', "[]", '{"reason": "x"}'])
def test_a_damaged_list_of_skipped_inputs_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "rank0-skipped.jsonl").write_text('{"key": "a", "reason": "torn"}\n' + content + "\n")
    with pytest.raises(UserError, match=r"rank0-skipped\.jsonl, line 2: .*delete it and cache again"):
        left_out_of(tmp_path, SimpleNamespace(keys=["a"], problems=()))  # type: ignore[arg-type]


def test_kill_9_in_the_middle_of_training_then_resume_ends_in_the_same_bits(
    cached: EncoderRunConfig, recipe, tmp_path: Path
) -> None:
    settings = (f"cache.root={cached.store_root}", "train.epochs=5", "train.log_every=1")
    whole, killed = recipe(tmp_path / "whole", *settings), recipe(tmp_path / "killed", *settings)
    train(whole)
    path = tmp_path / "run.yaml"
    path.write_text(killed.to_yaml())
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-m", "samdistill", "train", str(path)]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not (killed.output / "ckpt_epoch_2.pt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (killed.output / "ckpt_epoch_5.pt").exists()
    assert main(["train", str(path)]) == 0
    for name in ("model.safetensors", "config.json"):
        assert (killed.output / "student" / name).read_bytes() == (whole.output / "student" / name).read_bytes()
