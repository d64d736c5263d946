"""The rendered world as SA-1B and COCO files, read back by other code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from samdistill.config import DataConfig
from samdistill.data import CocoSource, open_source
from samdistill.data.saco import ConceptSet, find_concepts
from samdistill.sandbox.concepts import GENERIC, PHRASES
from samdistill.sandbox.scenes import COLOURS, SHAPES, SceneStyle, render_scenes
from samdistill.sandbox.write import CATEGORIES, NEGATIVES, POSITIVES, WORLD, write_coco, write_concept_set, write_sa1b
from samdistill.sandbox.write_videos import write_sav
from samdistill.types import UserError

REAL = Path(__file__).parents[3] / "shared" / "data" / "sa1b"
SIZE = (40, 56)


def content(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_sa1b_tree_holds_the_scenes(tmp_path: Path) -> None:
    keys = write_sa1b(tmp_path, 6, SIZE, seed=3)
    scenes = render_scenes(range(6), SIZE, seed=3)
    source = open_source(DataConfig(root=tmp_path), "train")
    assert source.keys == sorted(keys) == [f"sa_{3 * WORLD + i}" for i in range(6)] and source.problems == []
    for i, key in enumerate(keys):
        expected = scenes.masks[i][scenes.valid[i]].numpy()
        found = [instance.mask for instance in source.instances(key)]
        assert len(found) == len(expected) and all(map(np.array_equal, found, expected))
        picture = np.asarray(source.load(key)).astype(int)
        assert np.abs(picture - scenes.images[i].permute(1, 2, 0).numpy()).mean() < 4


def test_sa1b_records_follow_the_published_schema(tmp_path: Path) -> None:
    write_sa1b(tmp_path, 8, SIZE, seed=1, split="val")
    ids, count = set(), 0
    for path in sorted((tmp_path / "annotations/val").iterdir()):
        record = json.loads(path.read_text())
        image = record["image"]
        assert image == {"image_id": int(path.stem[3:]), "width": 56, "height": 40, "file_name": f"{path.stem}.jpg"}
        assert Image.open(tmp_path / "images/val" / image["file_name"]).size == (56, 40)
        for a in record["annotations"]:
            mask = coco_mask.decode(a["segmentation"])
            x, y, width, height = coco_mask.toBbox(a["segmentation"])
            assert a["area"] == mask.sum() and a["bbox"] == [x, y, width - 1, height - 1]
            (px, py) = a["point_coords"][0]
            assert mask[int(py), int(px)] == 1
            assert a["crop_box"] == [0, 0, 56, 40] and a["predicted_iou"] == a["stability_score"] == 1.0
            ids.add(a["id"])
            count += 1
    assert len(ids) == count > 8


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real SA-1B sample at {REAL}")
def test_sa1b_records_have_the_keys_and_types_of_real_ones(tmp_path: Path) -> None:
    def skeleton(value: object) -> object:
        if isinstance(value, dict):
            return {key: skeleton(v) for key, v in value.items()}
        return [skeleton(value[0])] if isinstance(value, list) else type(value)

    write_sa1b(tmp_path, 1, 64, seed=1)
    ours = json.loads(next(tmp_path.glob("annotations/train/*.json")).read_text())
    real = json.loads(min(REAL.glob("*.json")).read_text())
    assert skeleton(ours) == skeleton(real)


def test_coco_is_read_by_pycocotools_and_by_us(tmp_path: Path) -> None:
    keys = write_coco(tmp_path, 6, SIZE, seed=3)
    scenes = render_scenes(range(6), SIZE, seed=3)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCO(str(tmp_path / "annotations/instances_train.json"))
    source = CocoSource(tmp_path, "train")
    assert source.keys == keys and source.problems == []
    assert {c["name"] for c in reference.cats.values()} == {f"{c} {s}" for c in COLOURS for s in SHAPES}
    assert len(CATEGORIES) == len(reference.cats) == 120 and set(reference.cats) == set(range(1, 121))
    for i, key in enumerate(keys):
        slots = scenes.valid[i].nonzero()[:, 0].tolist()
        annotations = reference.imgToAnns[3 * WORLD + i]
        for slot, a, instance in zip(slots, annotations, source.instances(key), strict=True):
            mask, names = scenes.masks[i, slot].numpy(), scenes.concepts[i][slot]
            assert np.array_equal(reference.annToMask(a), mask) and np.array_equal(instance.mask, mask)
            assert instance.category in names and len(instance.category.split()) == 2 and not instance.crowd
            assert a["concepts"] == [names[0], names[1], f"{names[1]} {names[0]}"] and set(a["concepts"]) <= set(names)
            assert set(a["concepts"]) <= set(PHRASES)
            assert a["area"] == mask.sum() and a["bbox"] == coco_mask.toBbox(a["segmentation"]).tolist()


@pytest.mark.parametrize("write", [write_sa1b, write_coco])
def test_rerun_grows_and_restores_the_same_bytes(tmp_path: Path, write: object) -> None:
    write(tmp_path / "a", 9, SIZE, seed=1)  # type: ignore[operator]
    write(tmp_path / "b", 4, SIZE, seed=1)  # type: ignore[operator]
    for path in sorted((tmp_path / "b").rglob("*.jpg"))[1:3]:
        path.unlink()
    calls: list[tuple[int, int]] = []
    write(tmp_path / "b", 9, SIZE, seed=1, progress=lambda a, b: calls.append((a, b)))  # type: ignore[operator]
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert calls[-1] == (9, 9)


def test_splits_of_two_worlds_share_no_key(tmp_path: Path) -> None:
    train = write_sa1b(tmp_path, 3, 32, seed=1)
    assert not set(train) & set(write_sa1b(tmp_path, 3, 32, seed=2, split="val"))
    assert len(list(tmp_path.glob("images/*/*.jpg"))) == 6


@pytest.mark.parametrize(("module", "write", "count"), [("write", write_sa1b, 60), ("write_videos", write_sav, 14)])
def test_killed_in_the_middle_and_run_again_gives_the_same_tree(
    tmp_path: Path, module: str, write: Callable[..., Any], count: int
) -> None:
    write(tmp_path / "fresh", count, SIZE, seed=1)
    code = (
        f"import os, signal, sys\nfrom pathlib import Path\nfrom samdistill.sandbox.{module} import {write.__name__}\n"
        "def die(done, total):\n    if done == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        f"{write.__name__}(Path(sys.argv[1]), {count}, {SIZE}, seed=1, progress=die)"
    )
    environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
    victim = subprocess.run([sys.executable, "-c", code, str(tmp_path / "dst")], env=environment)
    assert victim.returncode == -signal.SIGKILL
    half = {n: c for n, c in content(tmp_path / "dst").items() if not Path(n).name.startswith(".")}
    assert half.items() <= content(tmp_path / "fresh").items() and len(half) < len(content(tmp_path / "fresh"))
    write(tmp_path / "dst", count, SIZE, seed=1)
    whole = {n: c for n, c in content(tmp_path / "dst").items() if not Path(n).name.startswith(".")}
    assert whole == content(tmp_path / "fresh")


@pytest.mark.parametrize("write", [write_sa1b, write_coco])
def test_other_settings_are_not_mixed_in(tmp_path: Path, write: object) -> None:
    write(tmp_path, 1, 32, seed=1)  # type: ignore[operator]
    for size, seed, style in ((40, 1, SceneStyle()), (32, 2, SceneStyle()), (32, 1, SceneStyle(max_objects=2))):
        with pytest.raises(UserError, match="rendered with other settings"):
            write(tmp_path, 1, size, seed=seed, style=style)  # type: ignore[operator]
    with pytest.raises(UserError, match="count 0"):
        write(tmp_path, 0, 32, seed=1)  # type: ignore[operator]


def test_concept_set_asks_what_is_there_and_what_is_not(tmp_path: Path) -> None:
    """Answers are worked out again from the renderer's masks and names, not from what the writer drew."""
    count, style = 120, SceneStyle(min_visible=0.02)  # some objects are drawn, but too small to be annotated
    write_coco(tmp_path, count, SIZE, seed=3, split="val", style=style)
    path = write_concept_set(tmp_path, count, SIZE, seed=3, style=style)
    concepts, scenes = ConceptSet.load(path), render_scenes(range(count), SIZE, seed=3, style=style)
    assert path == find_concepts(tmp_path) and concepts.problems == ()
    asked: dict[int, list[bool]] = {}
    near, hidden, generic = 0, 0, 0
    for pair in concepts.pairs:
        scene = int(Path(pair.file_name).stem) - 3 * WORLD
        assert concepts.path(pair) == tmp_path / f"images/val/{3 * WORLD + scene:012d}.jpg"
        shows = scenes.masks[scene].flatten(1).any(1)
        valid, names = scenes.valid[scene], scenes.concepts[scene]
        answers = [s for s in range(len(names)) if valid[s] and (pair.text == GENERIC or pair.text in names[s])]
        assert np.array_equal(concepts.masks(pair), scenes.masks[scene, answers].numpy())
        asked.setdefault(scene, []).append(bool(answers))
        generic += pair.text == GENERIC
        if not answers:
            assert pair.text in PHRASES and not any(shows[s] and pair.text in n for s, n in enumerate(names))
            words = {word for s, n in enumerate(names) if shows[s] for word in n[:2]}
            near += " " in pair.text and bool(words & set(pair.text.split()))
            hidden += bool((shows & ~valid).any())
    assert len(asked) == count and hidden > 10
    for scene, answers in asked.items():
        expected = [True] * POSITIVES if scenes.valid[scene].any() else []
        assert answers == expected + [False] * NEGATIVES
    assert 0.3 < near / (count * NEGATIVES) < 0.75 and 0.05 < generic / (count * POSITIVES) < 0.2
    texts = [(pair.file_name, pair.text) for pair in concepts.pairs]
    assert len(set(texts)) == len(texts)


def test_questions_of_a_scene_stay_when_others_join(tmp_path: Path) -> None:
    few, many = (write_concept_set(tmp_path / str(n), n, SIZE, seed=3) for n in (3, 7))
    pairs = ConceptSet.load(many, check_images=False).pairs
    assert ConceptSet.load(few, check_images=False).pairs == pairs[: len(pairs) * 3 // 7]
    again = write_concept_set(tmp_path / "again", 7, SIZE, seed=3)
    assert again.read_bytes() == many.read_bytes()
    with pytest.raises(UserError, match="rendered with other settings"):
        write_concept_set(tmp_path / "again", 7, 32, seed=3)
