"""``sandbox render``: what is written where, and how much."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from samdistill.cli import main
from samdistill.data import open_videos
from samdistill.sandbox import render as sandbox


def test_videos_are_rendered_as_the_data_room_reads_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["sandbox", "render", str(tmp_path), "--train", "2", "--val", "1", "--size", "48", "--format", "sav"]
    assert main(asked) == 0
    assert capsys.readouterr().out.endswith(f"{tmp_path}: 2 training and 1 held-out videos, sav\n")
    for split, keys in (("train", ["sav_10000000", "sav_10000001"]), ("val", ["sav_11000000"])):
        source = open_videos(tmp_path / split, "sav", "held_out", held_out_fraction=1)
        assert source.keys == keys and source.problems == []
        record = source.record(keys[0])
        assert record.size == (48, 48) and len(record.annotated) == 18 and record.concepts and record.visible.any()


def test_how_many_are_rendered_unless_somebody_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written = {}
    for name, layout in sandbox.LAYOUTS.items():
        write = lambda root, count, size, name=name, **rest: written.setdefault((name, rest["split"]), count)  # noqa: E731
        monkeypatch.setitem(sandbox.LAYOUTS, name, replace(layout, write=write))
    monkeypatch.setattr(sandbox, "write_concept_set", lambda root, count, *rest, **more: written.update(asked=count))
    for name in sandbox.LAYOUTS:
        sandbox.render_sandbox(tmp_path, format=name, progress=False)  # type: ignore[arg-type]
    assert written == {
        ("sa1b", "train"): 2000, ("sa1b", "val"): 128, ("coco", "train"): 2000, ("coco", "val"): 128, "asked": 128,
        ("sav", "train"): 64, ("sav", "val"): 16,
    }  # fmt: skip
