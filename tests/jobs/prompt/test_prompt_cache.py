"""The prompt job's cache: what is on disk, resumed, shared, verified, equal to online, refused where foreign."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from samdistill.cli import main
from samdistill.data import record_key
from samdistill.jobs.caching import CacheReport
from samdistill.jobs.prompt import parts as parts_of
from samdistill.jobs.prompt.cache import npy_name
from samdistill.jobs.prompt.config import PromptRunConfig
from samdistill.jobs.prompt.parts import FEATURES, PromptParts
from samdistill.pipeline import cache
from samdistill.store import FeatureStore, FeatureStoreWriter
from samdistill.teachers.base import Prompted
from samdistill.teachers.stored_signals import record_seeds
from samdistill.types import UserError

CACHED, TEACHERS = "distillation.use_precomputed_features=true", ("large", "small")
ONE = 2 * (24 * 16 + 16 * 16 + 2 * 4 * 16 + 6 * 16 * 16) + 4 * 4
"""Bytes of a teacher's four fp16 records and their seeds: patches of 24 channels, embedding, tokens, masks."""


def run(config: PromptRunConfig, **options: object) -> CacheReport:
    return cache(config, device="cpu", progress=False, **options)  # type: ignore[arg-type]


def content(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def lines(config: PromptRunConfig) -> list[dict]:
    text = (PromptParts(config).split_root / "prompts.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def kept(prompted, tmp_path_factory) -> PromptRunConfig:
    """A complete cache of two views of 14 images. Read only."""
    config = prompted(tmp_path_factory.mktemp("kept"), CACHED, "data.views=2")
    report = run(config, verify=True)
    assert (report.records, report.written, report.verified, report.skipped) == (28, 28, 8, [])
    assert report.bytes_per_record == 2 * ONE and report.bytes == 28 * report.bytes_per_record
    return config


def copy_of(kept: PromptRunConfig, folder: Path) -> PromptRunConfig:
    """The run with a cache of its own, to be damaged."""
    shutil.copytree(kept.feature_root, folder / "features")
    return kept.model_copy(update={"output": folder})


def test_records_are_what_the_teachers_say_to_the_prompts_beside_them(kept) -> None:
    parts = PromptParts(kept)
    assert parts.split_root == kept.output / "features" / "train"
    entries = {(line["key"], line["view"]): line for line in lines(kept)}
    assert len(entries) == len(lines(kept)) == 28 and {line["kind"] for line in entries.values()} >= {"point", "box"}
    ensemble = parts.ensemble("cpu")
    for view in range(2):
        data = parts.objects(view)
        for index in (0, 13):
            item = data[index]
            line, (draw,) = entries[item.key, view], item.draws
            for name in ("points", "labels", "boxes"):
                drawn = getattr(draw, name)
                assert (line[name] is None) == (drawn is None)
                assert drawn is None or torch.equal(torch.tensor(line[name]).to(drawn.dtype), drawn[0])
            batch = parts_of.PromptTask(kept, None, lambda _: None).collate([item])  # type: ignore[arg-type,return-value]
            for name, signals in ensemble.answer(Prompted(batch, batch.groups), {}).items():
                folder = parts.split_root / name
                record = FeatureStore(folder / "mask_token").read(record_key(item.key, view))
                assert record.seed == record_seeds(batch)[0]
                torch.testing.assert_close(record.features, signals.groups[0].mask_tokens[0], rtol=2e-3, atol=1e-4)
                patch = FeatureStore(folder / "encoder_patch").read(record_key(item.key, view)).features
                torch.testing.assert_close(patch, signals.encoder_patch[0], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("codec", "close"), [("fp32", 1e-5), ("fp16", 2e-3)])
def test_losses_from_the_cache_are_those_of_running_teachers(codec, close, prompted, tmp_path) -> None:
    online = PromptParts(prompted(tmp_path / "online")).task("cpu")
    config = prompted(tmp_path / codec, CACHED, f"cache.codec={codec}")
    run(config)
    cached = PromptParts(config).task("cpu")
    torch.manual_seed(0)
    student, data = online.build_student(), online.dataset(0)
    items = [data[i] for i in (11, 3, 4, 0, 7)]  # none of the cache's batches
    ours, theirs = (task.terms(student, task.collate(items)) for task in (cached, online))
    whole = 22 + sum(getattr(config.distillation, name).weight for name in config.distilled)  # two teachers share each
    assert list(ours) == list(theirs) and sum(term.weight for term in ours.values()) == pytest.approx(whole)
    for name in theirs:
        assert ours[name].value.item() == pytest.approx(theirs[name].value.item(), rel=close, abs=1e-7), name
        assert ours[name].weight == theirs[name].weight


def test_no_teacher_is_needed_but_for_the_proof(kept, monkeypatch) -> None:
    """Rank 0 opens each once; the others never do."""

    def refuse(*_: object) -> None:
        raise AssertionError("a teacher was opened")

    monkeypatch.setattr(parts_of, "PromptTeacher", refuse)
    monkeypatch.setattr(parts_of.Ensemble, "load", refuse)
    with pytest.raises(AssertionError, match="opened"):
        PromptParts(kept).task("cpu")
    monkeypatch.setenv("RANK", "1")
    task = PromptParts(kept).task("cpu")
    batch = task.collate([task.dataset(3)[0]])  # epoch 3 shows view 1
    assert list(task.signals.answer(Prompted(batch, batch.groups), batch.teacher_features)) == list(TEACHERS)  # type: ignore[union-attr]


@pytest.mark.parametrize("after", [3, 41])
def test_stopped_anywhere_and_run_again_every_byte_is_the_same(after, prompted, tmp_path, monkeypatch) -> None:
    """In the middle of an image, whose teachers are not all written, too."""
    settings = (CACHED, "data.views=2", "data.fraction=0.2")
    whole, torn = prompted(tmp_path / "whole", *settings), prompted(tmp_path / "torn", *settings)
    total = run(whole).records
    write, calls = FeatureStoreWriter.write, []

    def stops(self: FeatureStoreWriter, *args: object) -> None:
        if len(calls) == after:
            raise KeyboardInterrupt
        calls.append(args)
        write(self, *args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FeatureStoreWriter, "write", stops)
        run(torn)
    with (PromptParts(torn).split_root / "prompts.jsonl").open("ab") as file:
        file.write(b'{"key": "torn off in the mid')
    report = run(torn)
    assert report.records == total and 0 < report.written <= total
    assert content(PromptParts(torn).split_root) == content(PromptParts(whole).split_root)
    assert run(torn).written == 0


def test_two_ranks_write_the_records_of_one(kept, prompted, tmp_path) -> None:
    config = prompted(tmp_path, CACHED, "data.views=2")
    reports = [run(config, rank=rank, world=2, verify=True) for rank in (0, 1)]
    assert [report.written for report in reports] == [14, 14]
    for teacher in TEACHERS:
        for feature in FEATURES:
            one, two = (FeatureStore(PromptParts(c).split_root / teacher / feature) for c in (kept, config))
            assert sorted(one.keys) == sorted(two.keys)
            for key in one.keys:  # other batches: the last bit may differ
                torch.testing.assert_close(one.read(key).features, two.read(key).features, rtol=2e-3, atol=1e-3)
    written = (PromptParts(config).split_root / f"prompts{end}.jsonl" for end in ("", "-rank1"))
    found = [json.loads(line) for path in written for line in path.read_text().splitlines()]
    assert sorted(map(str, found)) == sorted(map(str, lines(kept)))
    assert run(config).written == 0


def test_a_file_per_image_and_feature_on_request(kept, tmp_path) -> None:
    config = copy_of(kept, tmp_path)
    assert run(config, layout="npy").written == 0
    root = config.feature_root / "npy" / "train"
    assert len(list(root.rglob("*.npy"))) == 2 * 4 * 28 and not [p for p in root.rglob("*") if p.name.startswith(".")]
    key = PromptParts(config).train_source.keys[5]
    for teacher in TEACHERS:
        for feature in FEATURES:
            store = FeatureStore(PromptParts(config).split_root / teacher / feature)
            for name, suffix in ((key, ""), (record_key(key, 1), ".view1")):
                values = np.load(root / teacher / feature / f"{key}{suffix}.npy")
                assert values.dtype == np.float16
                assert np.array_equal(values.astype(np.float32), store.read(name).features.numpy())


def test_an_image_that_cannot_be_used_is_listed_and_trained_around(prompted, world, tmp_path) -> None:
    root = tmp_path / "data"
    shutil.copytree(world, root)
    config = prompted(tmp_path / "run", CACHED, f"data.root={root}")
    keys = PromptParts(config).train_source.keys
    images = {path.stem: path for path in root.rglob("*.jpg")}
    images[keys[2]].write_bytes(b"no image")
    annotation = next(root.rglob(f"{keys[6]}.json"))
    annotation.write_text(json.dumps({**json.loads(annotation.read_text()), "annotations": []}))
    report = run(config)
    assert (report.records, report.written) == (len(keys) - 2, len(keys) - 2)
    assert {bad.key for bad in report.skipped} == {keys[2], keys[6]}
    assert {line["key"] for line in lines(config)} == set(keys) - {keys[2], keys[6]}
    task = PromptParts(config).task("cpu")
    assert len(task.dataset(0)) == len(keys) - 2
    batch = task.collate([task.dataset(0)[i] for i in (2, 5)])
    assert batch.images.keys == (keys[3], keys[7])
    assert set(task.signals.answer(Prompted(batch, batch.groups), batch.teacher_features)) == set(TEACHERS)  # type: ignore[union-attr]


def test_verify_sees_damage_and_a_teacher_that_answers_otherwise(kept, tmp_path, monkeypatch) -> None:
    config = copy_of(kept, tmp_path)
    values = PromptParts(config).split_root / "small" / "prompt_embed" / "rank0-values.bin"
    good = bytearray(values.read_bytes())
    values.write_bytes(good[:100] + bytes([good[100] ^ 1]) + good[101:])
    with pytest.raises(UserError, match=r"prompt_embed: 1 damaged record\(s\): rank0-values\.bin"):
        run(config, verify=True)
    values.write_bytes(good)
    answer = parts_of.Ensemble.answer

    def otherwise(self, asked, read):
        said = answer(self, asked, read)
        large = said["large"]
        return said | {"large": type(large)(large.encoder_patch * 1.1, large.groups)}

    monkeypatch.setattr(parts_of.Ensemble, "answer", otherwise)
    with pytest.raises(UserError, match=r"large/encoder_patch: record 'sa_\d+' differs from the teacher's .* 9\.1%"):
        run(config, verify=True)


def other_teacher(sams: dict[str, Path]) -> str:
    entries = [{"name": "large", "checkpoint": str(sams["other"]), "weight": 3.0},
               {"name": "small", "checkpoint": str(sams["small"]), "weight": 1.0}]  # fmt: skip
    return f"teachers={json.dumps(entries)}"


FOREIGN = {
    "teacher": ("TEACHER", r"of another teacher than 'large' is now"),
    "prompts": ("prompts.mode=box", "made with other prompts: set the block prompts and data.seed as they were"),
    "objects": ("prompts.objects=3", "made with other prompts"),
    "seed": ("data.seed=1", "made with other prompts"),
    "views": ("data.augment={flip: 0.2}", "made with other views of the images: set data.geometry, data.augment"),
    "codec": ("cache.codec=fp32", "codec: stored fp16, wanted fp32"),
}


@pytest.mark.parametrize("case", FOREIGN)
@pytest.mark.parametrize("verb", ["cache", "train"])
def test_a_foreign_cache_is_refused_by_name(case, verb, kept, sams, tmp_path, capsys) -> None:
    setting, complaint = FOREIGN[case]
    path = tmp_path / "run.yaml"
    path.write_text(kept.to_yaml())
    before = content(kept.feature_root)
    places = [f"output={tmp_path / 'run'}", f"distillation.precomputed_root={kept.feature_root}"]
    setting = other_teacher(sams) if setting == "TEACHER" else setting
    assert main([verb, str(path), *places, setting]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(f"samdistill {verb}: ") and complaint in said and str(kept.feature_root) in said
    assert content(kept.feature_root) == before  # nothing was touched


def test_an_absent_or_incomplete_cache_stops_training(kept, prompted, tmp_path, capsys) -> None:
    absent = prompted(tmp_path / "absent", CACHED)
    for verb in ("train", "check"):
        (tmp_path / "run.yaml").write_text(absent.to_yaml())
        assert main([verb, str(tmp_path / "run.yaml")]) == 2
        assert "no cached features here; run `samdistill cache` with this config first" in capsys.readouterr().err
    config = copy_of(kept, tmp_path / "copy")
    with pytest.raises(UserError, match=r"14 of 42 views are not cached \(.*\); run `samdistill cache`.* it resumes"):
        PromptParts(config.model_copy(update={"data": config.data.model_copy(update={"views": 3})})).task("cpu")
    shutil.rmtree(PromptParts(config).split_root / "small" / "mask_token")
    with pytest.raises(UserError, match="decoder_mask_token is on, but mask_token of teacher 'small' is in no cache"):
        PromptParts(config).task("cpu")
    assert run(config).written == 28  # the hole alone is filled
    PromptParts(config).task("cpu")
    next(config.feature_root.glob("projections/small.safetensors")).unlink()
    with pytest.raises(UserError, match=r"projections/small\.safetensors: no such file"):
        PromptParts(config).task("cpu")


def test_mask_logits_can_be_left_out(prompted, tmp_path) -> None:
    off = "distillation.dense_mask_logits.enable=false"
    config = prompted(tmp_path, CACHED, "cache.dense=false", off, "data.fraction=0.2")
    assert run(config).records > 0
    assert sorted(path.name for path in (PromptParts(config).split_root / "large").iterdir()) == sorted(FEATURES[:3])
    task = PromptParts(config).task("cpu")
    batch = task.collate([task.dataset(0)[0]])
    assert not [name for name in task.terms(task.build_student(), batch) if name.startswith("dense")]


def test_other_jobs_and_runs_without_teachers_have_nothing_to_cache_here(prompted, recipe, tmp_path) -> None:
    with pytest.raises(UserError, match="there is nothing to cache: list teachers"):
        run(prompted(tmp_path, "teachers=[]", "distillation.enable=false"))
    with pytest.raises(UserError, match="--layout npy is for the prompt job"):
        cache(recipe(tmp_path), layout="npy")
    with pytest.raises(UserError, match="no layout is called 'nyp'; did you mean 'npy'"):
        run(prompted(tmp_path), layout="nyp")


def test_the_names_of_npy_files_stay_below_their_folder() -> None:
    assert npy_name("sub/a", 0) == "sub/a.npy"
    assert npy_name("sub/a", 2) == "sub/a.view2.npy"
    keys = ["a", "a.view1", "a%2Eview1", "a.view1.view1", "con", ".a", "ab:c"]
    names = {npy_name(key, view) for key in keys for view in (0, 1)}
    assert len(names) == 2 * len(keys)
    for key in ("/tmp/out", "../out", "a/../../out", "a\\b", "a:b"):
        with pytest.raises(UserError, match="its name"):
            npy_name(key, 0)
