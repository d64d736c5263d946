"""Sources that changed since they were cached: training refuses them, ``cache`` renews them, in all three caches."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from samdistill.cli import main
from samdistill.jobs.encoder.parts import EncoderParts
from samdistill.jobs.prompt.parts import PromptParts
from samdistill.pipeline import cache
from samdistill.store import FeatureStore
from samdistill.store.changes import Renewal, refuse_changed
from samdistill.teachers.base import Prompted
from samdistill.types import UserError

CACHED = "distillation.use_precomputed_features=true"


def run(config, **options):
    return cache(config, device="cpu", progress=False, **options)


def swap(folder: Path, names: list[str]) -> None:
    """Each file gets the next one's name: as many files, the same names."""
    for name in names:
        (folder / name).rename(folder / f"{name}.old")
    for name, other in zip(names, [*names[1:], names[0]], strict=True):
        (folder / f"{name}.old").rename(folder / other)


def test_an_encoders_cache_follows_its_images(world: Path, recipe, tmp_path: Path, capsys) -> None:
    root = Path(shutil.copytree(world, tmp_path / "world"))
    config = recipe(tmp_path / "run", f"data.root={root}", "data.views=2")
    assert run(config).written == 48
    EncoderParts(config).signals()
    keys = EncoderParts(config).train_source.keys
    swap(root / "images/train", [f"{key}.jpg" for key in keys[:3]])
    with pytest.raises(UserError) as error:
        EncoderParts(config).signals()
    assert f"6 input(s) changed since they were cached ({keys[0]}, {keys[1]}, {keys[2]}, ...)" in str(error.value)
    with pytest.raises(UserError, match=r"changed since they were cached .*; renew them in one process"):
        run(config, rank=0, world=2)
    old = FeatureStore(config.store_root)
    expected = {key: old.read(old_key).features for key, old_key in zip(keys[:3], [keys[2], *keys[:2]], strict=True)}
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    assert main(["cache", str(tmp_path / "run.yaml"), "--verify"]) == 0
    assert "renewed: 6 records whose image or video had changed" in capsys.readouterr().out
    new = FeatureStore(config.store_root)
    assert len(new) == 48 and new.keys == old.keys
    for key, features in expected.items():  # what was said about the same pixels, under their new name
        assert (new.read(key).features - features).norm() < 1e-2 * features.norm()
    for key in keys[3:]:
        assert (new.read(key).features == old.read(key).features).all()
    EncoderParts(config).signals()
    report = run(config)
    assert (report.written, report.renewed) == (0, 0)


def test_images_with_new_names_are_not_taken_for_the_old_ones(world: Path, recipe, tmp_path: Path) -> None:
    root = Path(shutil.copytree(world, tmp_path / "world"))
    config = recipe(tmp_path / "run", f"data.root={root}")
    run(config)
    keys = EncoderParts(config).train_source.keys
    for key in keys[:3]:
        for kind, suffix in (("images", "jpg"), ("annotations", "json")):
            folder = root / kind / "train"
            (folder / f"{key}.{suffix}").rename(folder / f"new_{key}.{suffix}")
    parts = EncoderParts(config)
    assert len(parts.train_source.keys) == len(keys)
    with pytest.raises(
        UserError, match=rf"3 of 24 views are not cached \(new_{keys[0]}, new_{keys[1]}, new_{keys[2]}\)"
    ):
        parts.signals(proven=False)
    assert run(config).written == 3


def test_a_renewal_that_was_interrupted_is_done_again(world: Path, recipe, tmp_path: Path) -> None:
    root = Path(shutil.copytree(world, tmp_path / "world"))
    config = recipe(tmp_path / "run", f"data.root={root}")
    run(config)
    parts = EncoderParts(config)
    keys = parts.train_source.keys
    path = root / "images/train" / f"{keys[5]}.jpg"
    ImageOps.invert(Image.open(path)).save(path)
    now = parts.source_fingerprints(keys)
    assert Renewal(config.store_root, 0, 1, now, set(keys)).stale == [keys[5]]  # and dies
    with pytest.raises(UserError, match="1 input"):
        refuse_changed(config.store_root, now)
    report = run(config)
    assert (report.written, report.renewed) == (1, 1)
    refuse_changed(config.store_root, now)


def test_a_cache_of_an_earlier_version_is_read_with_a_warning(cached, tmp_path: Path, caplog) -> None:
    shutil.copytree(cached.store_root, tmp_path / "embeddings")
    config = cached.model_copy(update={"output": tmp_path})
    (config.store_root / "rank0-sources.jsonl").unlink()
    with caplog.at_level(logging.WARNING, "samdistill"):
        EncoderParts(config).signals()
        assert run(config).written == 0
    warnings = [r.getMessage() for r in caplog.records if "have no fingerprint" in r.getMessage()]
    assert len(warnings) == 2 and "24 cached input(s), such as sa_" in warnings[0]
    assert "delete the cache and cache again to be sure" in warnings[0]


def test_a_prompt_cache_follows_its_masks_too(world: Path, prompted, tmp_path: Path) -> None:
    root = Path(shutil.copytree(world, tmp_path / "world"))
    config = prompted(tmp_path / "run", CACHED, f"data.root={root}")
    run(config)
    parts = PromptParts(config)
    parts.task("cpu")
    keys = parts.train_source.keys
    one = next(root.rglob(f"{keys[4]}.json"))
    record = json.loads(one.read_text())
    record["annotations"] = record["annotations"][1:] or record["annotations"]
    record["annotations"][0]["id"] += 1
    one.write_text(json.dumps(record))
    with pytest.raises(UserError, match=rf"1 input\(s\) changed since they were cached \({keys[4]}\)"):
        PromptParts(config).task("cpu")
    before = (parts.split_root / "prompts.jsonl").read_text().splitlines()
    report = run(config, verify=True)
    assert (report.written, report.renewed) == (1, 1)
    after = (parts.split_root / "prompts.jsonl").read_text().splitlines()
    assert len(after) == len(before) and sorted(json.loads(line)["key"] for line in after) == sorted(keys)
    task = PromptParts(config).task("cpu")
    batch = task.collate([task.dataset(0)[4]])
    assert task.signals.answer(
        Prompted(batch, batch.groups), batch.teacher_features
    )  # the prompts of the new masks were asked
