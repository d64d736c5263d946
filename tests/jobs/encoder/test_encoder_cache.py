"""Caching: resumed, shared between ranks, coded, verified, and refused where it would mix two things."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import samdistill.sandbox as sandbox_room
from samdistill.cli import main
from samdistill.data.skipped import read_skipped
from samdistill.jobs.caching import CacheReport, left_out_of
from samdistill.jobs.encoder.config import EncoderRunConfig
from samdistill.jobs.encoder.parts import EncoderParts
from samdistill.pipeline import cache, check, train
from samdistill.store import FeatureStore, FeatureStoreWriter
from samdistill.teachers.sam3 import Sam3Teacher
from samdistill.types import UserError

VALUES = "rank0-values.bin"
RECORD = 4 + 192 * 81 * 2  # seed, then the float16 grid: the published layout


def run(config: EncoderRunConfig, **options: object) -> CacheReport:
    return cache(config, device="cpu", progress=False, **options)  # type: ignore[arg-type]


def as_argv(config: EncoderRunConfig, verb: str, folder: Path) -> list[str]:
    """The same run as a command."""
    path = folder / "run.yaml"
    path.write_text(config.to_yaml())
    return [verb, str(path)]


def copy_of(cached: EncoderRunConfig, folder: Path) -> EncoderRunConfig:
    """The run with a store of its own, to be damaged."""
    shutil.copytree(cached.store_root, folder / "embeddings")
    return cached.model_copy(update={"output": folder})


def test_the_report_counts_what_is_on_disk(cached: EncoderRunConfig) -> None:
    report = run(cached)  # nothing is left to do
    values = cached.store_root / VALUES
    assert (report.records, report.written, report.skipped, report.recovered) == (24, 0, [], [])
    assert report.bytes == values.stat().st_size == 24 * RECORD and report.bytes_per_record == RECORD
    assert json.dumps(report.to_dict())
    assert run(cached, verify=True).verified == cached.cache.verify_records == 8


@pytest.mark.parametrize(("codec", "after"), [("fp16", 1), ("fp16", 7), ("int8", 22), ("pca16-int8", 7)])
def test_stopped_anywhere_and_run_again_every_byte_is_the_same(
    codec: str, after: int, recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the middle of a batch of four, and in the second view, with a teacher whose answer to an image depends
    on the others of its batch (as real ones' last bits do): a resumed run has to form the same batches."""
    right = Sam3Teacher._forward
    monkeypatch.setattr(
        Sam3Teacher, "_forward", lambda self, batch: {n: t + t.mean(0) for n, t in right(self, batch).items()}
    )
    settings = ("data.views=2", f"cache.codec={codec}", "data.fraction=0.7")
    whole, torn = recipe(tmp_path / "whole", *settings), recipe(tmp_path / "torn", *settings)
    total = run(whole).records
    assert total == 30  # 15 images: the last batch of a view is a short one
    write, calls = FeatureStoreWriter.write, []

    def stops(self: FeatureStoreWriter, *args: object) -> None:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        write(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FeatureStoreWriter, "write", stops)
        run(torn)
    assert len(FeatureStore(torn.store_root)) == after
    report = run(torn)
    assert (report.records, report.written) == (total, total - after)
    for name in (VALUES, "rank0-keys.txt", "rank0-index.bin", "manifest.json"):
        assert (torn.store_root / name).read_bytes() == (whole.store_root / name).read_bytes(), name


def test_two_ranks_write_the_records_of_one(cached: EncoderRunConfig, recipe, tmp_path: Path) -> None:
    config = recipe(tmp_path)
    reports = [run(config, rank=rank, world=2, verify=True) for rank in (0, 1)]
    assert [report.written for report in reports] == [12, 12]
    one, two = FeatureStore(cached.store_root), FeatureStore(config.store_root)
    assert sorted(two.keys) == sorted(one.keys) and two.verify() == []
    for key in one.keys:
        first, second = one.read(key), two.read(key)
        assert first.seed == second.seed and torch.equal(first.features, second.features)
    assert run(config).written == 0  # one process finds nothing to add


def test_a_codec_that_learns_is_shared_by_the_ranks(recipe, tmp_path: Path) -> None:
    config = recipe(tmp_path, "cache.codec=pca8-int8")
    for rank in (0, 1):
        run(config, rank=rank, world=2)
    assert len(FeatureStore(config.store_root)) == 24 and run(config, verify=True).worst_error <= 0.01


@pytest.mark.parametrize(("codec", "worst", "share"), [("int8", 0.02, 0.6), ("pca64-int8", 0.5, 0.25)])
def test_smaller_codecs_stay_near_the_float16_features(
    codec: str, worst: float, share: float, cached: EncoderRunConfig, recipe, tmp_path: Path
) -> None:
    config = recipe(tmp_path, f"cache.codec={codec}")
    report = run(config, verify=True)
    assert report.bytes == (config.store_root / VALUES).stat().st_size < share * 24 * RECORD
    full, small = FeatureStore(cached.store_root), FeatureStore(config.store_root)
    for key in full.keys:
        exact = full.read(key).features
        assert (small.read(key).features - exact).norm() / exact.norm() < worst


def test_verify_sees_that_the_teacher_answers_otherwise(
    cached: EncoderRunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Sam3Teacher._forward

    def other(self: Sam3Teacher, batch: object) -> dict[str, torch.Tensor]:
        return {tap: tensor * 1.05 for tap, tensor in right(self, batch).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(Sam3Teacher, "_forward", other)
    with pytest.raises(UserError, match=r"record 'sa_10000000' differs from the teacher's output by 4\.8%"):
        run(cached, verify=True)


@pytest.mark.parametrize("damage", ["flip", "truncate"])
def test_a_damaged_record_is_named_by_verify_and_stops_training(
    damage: str, cached: EncoderRunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy_of(cached, tmp_path)
    values = config.store_root / VALUES
    content = bytearray(values.read_bytes())
    row = 5 if damage == "flip" else 23
    if damage == "flip":
        content[5 * RECORD + 100] ^= 1
    else:
        del content[-200:]
    values.write_bytes(content)
    key = FeatureStore(cached.store_root).keys[row]
    assert main([*as_argv(config, "cache", tmp_path), "--verify"]) == 2
    verified = capsys.readouterr().err
    assert verified.count("\n") == 1 and f"1 damaged record(s): {VALUES}: '{key}'" in verified
    for workers in (0, 1):  # an error of a loader's worker arrives as clear as any other
        argv = [*as_argv(config, "train", tmp_path), f"data.workers={workers}", f"output={tmp_path / str(workers)}"]
        assert main([*argv, f"cache.root={config.store_root}"]) == 2
        said = capsys.readouterr().err
        assert repr(key) in said.splitlines()[-1] and "cache again" in said and "Traceback" not in said
    assert values.read_bytes() == content  # nobody touched the evidence


def test_the_youngest_records_are_mended_and_it_is_said(
    cached: EncoderRunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = copy_of(cached, tmp_path)
    values = config.store_root / VALUES
    whole = values.read_bytes()
    values.write_bytes(whole[:-200])
    assert main(as_argv(config, "cache", tmp_path)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert f"mended: {VALUES}" in said and "24 records (1 new)" in said
    assert values.read_bytes() == whole


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packaged teacher with one number changed."""
    folder = tmp_path_factory.mktemp("other") / "teacher"
    shutil.copytree(Path(sandbox_room.__path__[0]) / "weights" / "tracker", folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "vision_encoder.backbone" in name and name.endswith("weight"))
    weights[name].view(-1)[0] += 0.5
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("override", "field"),
    [
        ("teacher.path=OTHER", "teacher: stored"),
        ("teacher.precision=bf16", "teacher: stored"),
        ("data.geometry=longest_side", "transform: stored"),
        ("data.augment.flip=0.25", "transform: stored"),
        ("teacher.image_size=140", "image_size: stored 126, wanted 140"),
        ("cache.codec=int8", "codec: stored fp16, wanted int8"),
    ],
)
def test_a_cache_of_something_else_is_refused_by_every_verb(
    override: str, field: str, cached: EncoderRunConfig, recipe, other_teacher: Path
) -> None:
    config = recipe(cached.output, override.replace("OTHER", str(other_teacher)))
    before = {path.name: path.read_bytes() for path in cached.store_root.iterdir()}
    for verb in (run, train, check):
        with pytest.raises(UserError) as error:
            verb(config)
        message = str(error.value)
        assert "cached with other settings" in message and field in message and "\n" not in message, verb
    assert {path.name: path.read_bytes() for path in cached.store_root.iterdir()} == before


@pytest.fixture
def spoilt(world: Path, tmp_path: Path) -> Path:
    """The world with a corrupt JPEG, an image without its JSON and a JSON without its image."""
    root = tmp_path / "spoilt"
    shutil.copytree(world, root)
    images = root / "images" / "train"
    names = sorted(path.stem for path in images.glob("*.jpg"))
    (images / f"{names[3]}.jpg").write_bytes((images / f"{names[3]}.jpg").read_bytes()[:300])
    (images / f"{names[8]}.jpg").unlink()
    (root / "annotations" / "train" / f"{names[20]}.json").unlink()
    return root


def test_bad_inputs_are_counted_and_listed_and_the_run_goes_on(
    spoilt: Path, recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = recipe(tmp_path / "run", f"data.root={spoilt}", "train.epochs=1")
    names = sorted(path.stem for path in (spoilt / "images" / "train").glob("*.jpg"))
    broken, lonely, gone = names[3], names[19], "sa_10000008"
    for repeat in range(2):  # the second run lists them again
        caplog.clear()
        assert main(as_argv(config, "cache", tmp_path)) == 0
        assert f"21 records ({0 if repeat else 21} new)" in " ".join(capsys.readouterr().out.split())
        assert f"cache: 3 inputs are left out; all are listed in {config.output / 'skipped.jsonl'}" in caplog.text
        assert f"left out: {lonely}: image without its JSON" in caplog.text
        assert ": JSON without its image" in caplog.text
        assert f"left out: {broken}: " in caplog.text and "not a readable image" in caplog.text
        listed = read_skipped(config.output / "skipped.jsonl")
        assert {(line["key"], line["stage"]) for line in listed} == {(k, "cache") for k in (broken, gone, lonely)}
    assert left_out_of(config.store_root, EncoderParts(config).train_source).keys() == {broken}
    result = train(config)
    assert result.steps == 21 // 8 and set(result.terms) == {"mse", "cosine"}
    stages = [line["stage"] for line in read_skipped(config.output / "skipped.jsonl")]
    assert stages == ["cache"] * 3 + ["train"] * 3  # training does not use them either
    assert f"train: left out: {broken}: " in (config.output / "log_rank0.txt").read_text()


def test_nothing_readable_is_an_error_that_names_the_first(recipe, tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.jpg").write_bytes(b"no image")
    config = recipe(tmp_path / "run", f"data.root={tmp_path}", "data.kind=folder", "data.held_out_fraction=0")
    with pytest.raises(UserError, match=r"not one input could be cached; the first.*a\.jpg"):
        run(config)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 130)])
def test_stopped_in_the_middle_then_the_same_command_gives_the_same_bytes(
    recipe, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """SIGTERM goes to the loader's worker too, as a scheduler sends it."""
    settings = ("data.views=6", "cache.batch_size=2", f"data.workers={int(number == signal.SIGTERM)}")
    whole, killed = recipe(tmp_path / "whole", *settings), recipe(tmp_path / "killed", *settings)
    run(whole)
    expected = (whole.store_root / VALUES).read_bytes()
    argv = as_argv(killed, "cache", tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "samdistill", *argv], env=environment, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    values, deadline = killed.store_root / VALUES, time.monotonic() + 600
    while not values.exists() or values.stat().st_size < 9 * RECORD:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, number)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == code and "Traceback" not in said
    if code == 130:
        assert said.splitlines()[-1].startswith("samdistill cache: interrupted; what was finished is kept")
    assert 8 * RECORD <= values.stat().st_size < len(expected)  # the batch that was being written may be lost
    assert main(argv) == 0
    assert values.read_bytes() == expected
    assert (killed.store_root / "rank0-keys.txt").read_bytes() == (whole.store_root / "rank0-keys.txt").read_bytes()


def test_the_spec_of_a_store_is_that_of_its_teacher(cached: EncoderRunConfig) -> None:
    spec, parts = FeatureStore(cached.store_root).spec, EncoderParts(cached)
    assert (spec.tap, spec.shape, spec.image_size, spec.codec) == ("image_embedding", (192, 9, 9), 126, "fp16")
    assert {"": spec} == parts.specs(parts.running().fingerprint)
