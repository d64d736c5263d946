"""The video job's cache: a record per annotated frame, resumed, shared, verified, and held against the videos."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

import av
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from samdistill.cli import main
from samdistill.data import BadInput
from samdistill.data.skipped import read_skipped
from samdistill.jobs.caching import CacheReport, left_out_of, list_skipped, open_stores, prove
from samdistill.jobs.video import cache as video_cache
from samdistill.jobs.video import parts as video_parts
from samdistill.jobs.video.cache import complete_videos, source_fingerprints
from samdistill.jobs.video.config import VideoRunConfig
from samdistill.jobs.video.parts import VideoParts
from samdistill.pipeline import cache
from samdistill.sandbox.videos import VideoStyle
from samdistill.sandbox.write_videos import write_sav
from samdistill.store import FeatureStore, FeatureStoreWriter, make_codec
from samdistill.store.changes import refuse_changed
from samdistill.teachers import Sam3Detector, describe_detector
from samdistill.types import UserError

Recipe = Callable[..., VideoRunConfig]
FRAMES = {"sav_3000000": 6, "sav_3000001": 6, "sav_4000000": 18}
"""Annotated frames of each video: the last needs more than one decoding."""
TOTAL = sum(FRAMES.values())
STORE = ("rank0-values.bin", "rank0-keys.txt", "rank0-index.bin", "manifest.json")
RECORD = {2: 4 + 32 * 9 * 9 * 2, 3: 4 + 32 * 4 * 4 * 2}  # seed, then float16


def open_levels(parts: VideoParts) -> FeatureStore:
    return open_stores(parts.config.store_root, parts.specs(""))[""]


def run(config: VideoRunConfig, **options: object) -> CacheReport:
    return cache(config, device="cpu", progress=False, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def loaded_once() -> Iterator[None]:
    """Every teacher is read once: most runs here are of the same."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(video_parts, "Sam3Detector", lru_cache(Sam3Detector))
        patched.setattr(video_parts, "describe_detector", lru_cache(describe_detector))
        yield


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos in one folder. Read only."""
    root, others = tmp_path_factory.mktemp("videos"), tmp_path_factory.mktemp("others")
    write_sav(root, 2, (42, 63), seed=3, style=VideoStyle(frames=22))
    write_sav(others, 1, (42, 63), seed=4, style=VideoStyle(frames=70))
    shutil.copytree(others / "train", root / "train", dirs_exist_ok=True)
    return root / "train"


@pytest.fixture(scope="module")
def recipe(videos: Path, detector: tuple[object, Path]) -> Recipe:
    """recipe(output, level=3, root=..., codec=..., ...): the tiny teacher on the videos."""

    def make(
        output: Path, level: int = 3, root: Path = videos, codec: str = "fp16", workers: int = 0,
        teacher: Path = detector[1], image_size: int | None = None, geometry: str = "square",
    ) -> VideoRunConfig:  # fmt: skip
        return VideoRunConfig.model_validate({
            "output": output, "teacher": {"path": str(teacher), "image_size": image_size},
            "data": {"kind": "sav", "root": root, "held_out": None, "held_out_fraction": 0, "workers": workers,
                     "geometry": geometry},
            "cache": {"codec": codec}, "student": {"memory": {"level": level}},
        })  # fmt: skip

    return make


@pytest.fixture(scope="module")
def cached(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> VideoRunConfig:
    """A run whose cache is complete. Read only."""
    config = recipe(tmp_path_factory.mktemp("cached"))
    assert run(config).written == TOTAL
    return config


@pytest.fixture
def spoilt(videos: Path, tmp_path: Path) -> Path:
    """A copy of the videos, to be damaged."""
    return Path(shutil.copytree(videos, tmp_path / "spoilt"))


def frames_of(path: Path) -> list[Tensor]:
    """All frames of a video, one after the other; threads of the converter would hang the loaders forked later."""
    with av.open(str(path)) as container:
        return [torch.from_numpy(frame.to_ndarray(format="rgb24", threads=1)) for frame in container.decode(video=0)]


@torch.no_grad()
def said(model, frame: Tensor, level: int) -> Tensor:
    """What transformers' model says to one frame stretched over the canvas."""
    pixels = F.interpolate(frame.permute(2, 0, 1)[None], (126, 126), mode="bilinear", antialias=True)
    return model.get_vision_features((pixels / 255 - 0.5) / 0.5).fpn_hidden_states[level][0]


@pytest.mark.parametrize("level", [2, 3])
def test_a_record_is_what_the_model_says_to_one_annotated_frame(
    level: int, videos: Path, detector, recipe: Recipe, tmp_path: Path
) -> None:
    config = recipe(tmp_path, level)
    report = run(config, verify=True)
    assert (report.records, report.written, report.skipped, report.recovered) == (TOTAL, TOTAL, [], [])
    assert report.verified == config.cache.verify_records == 8 and report.worst_error < 1e-3
    assert report.bytes == (config.store_root / STORE[0]).stat().st_size == TOTAL * RECORD[level]
    store, (model, _) = FeatureStore(config.store_root), detector
    assert store.keys == [f"{key}@{4 * row}" for key, count in FRAMES.items() for row in range(count)]
    for key in FRAMES:
        frames = frames_of(videos / f"{key}.mp4")
        for number in range(0, len(frames), 4):
            record, expected = store.read(f"{key}@{number}"), said(model, frames[number], level)
            assert record.seed == 0 and record.features.shape == (32, *[9 if level == 2 else 4] * 2)
            torch.testing.assert_close(record.features, expected, rtol=1e-3, atol=1e-3)
    spec, parts = store.spec, VideoParts(config)
    assert (spec.tap, spec.image_size, spec.codec) == (f"fpn_level_{level}", 126, "fp16")
    again = run(config)  # nothing is left to do
    assert (again.records, again.written) == (TOTAL, 0)
    assert complete_videos(parts, open_levels(parts)) == (list(FRAMES), [])
    prove(parts.config.store_root, parts.specs(parts.teacher().fingerprint))


@pytest.mark.parametrize(("codec", "after"), [("fp16", 2), ("fp16", 27), ("int8", 13), ("pca8-int8", 12)])
def test_stopped_anywhere_and_run_again_every_byte_is_the_same(
    codec: str, after: int, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a block and between two, with a teacher whose answer to a frame depends on the others of its
    block, as real ones' last bits do."""
    right, write = Sam3Detector.pyramid, FeatureStoreWriter.write
    monkeypatch.setattr(Sam3Detector, "pyramid", lambda *given: tuple(t + t.mean(0) for t in right(*given)))
    whole, torn = recipe(tmp_path / "whole", codec=codec), recipe(tmp_path / "torn", codec=codec)
    run(whole)

    def stops(self: FeatureStoreWriter, *record: object) -> None:
        if len(self.done) == after:
            raise KeyboardInterrupt
        write(self, *record)  # type: ignore[arg-type]

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(FeatureStoreWriter, "write", stops)
        run(torn)
    assert len(FeatureStore(torn.store_root)) == after
    report = run(torn)
    assert (report.records, report.written) == (TOTAL, TOTAL - after)
    for name in STORE:
        assert (torn.store_root / name).read_bytes() == (whole.store_root / name).read_bytes(), name


def test_the_bytes_do_not_depend_on_loader_processes(
    cached: VideoRunConfig, recipe: Recipe, tmp_path: Path
) -> None:  # fmt: skip
    config = recipe(tmp_path, workers=2)
    run(config)
    for name in STORE:
        assert (config.store_root / name).read_bytes() == (cached.store_root / name).read_bytes()


def test_two_ranks_write_the_records_of_one(cached: VideoRunConfig, recipe: Recipe, tmp_path: Path) -> None:
    config = recipe(tmp_path)
    reports = [run(config, rank=rank, world=2, verify=True) for rank in (0, 1)]
    assert [report.written for report in reports] == [24, 6] and [report.verified for report in reports] == [8, 6]
    one, two = FeatureStore(cached.store_root), FeatureStore(config.store_root)
    assert sorted(two.keys) == sorted(one.keys) and two.verify() == []
    assert all(torch.equal(one.read(key).features, two.read(key).features) for key in one.keys)
    assert run(config).written == 0  # one process finds nothing to add
    assert run(recipe(tmp_path / "idle"), rank=3, world=4).records == 0  # more processes than videos


@pytest.mark.parametrize(("codec", "worst", "size"), [("int8", 0.02, 32 * (8 + 16)), ("pca8-int8", 0.6, 8 * (8 + 16))])
def test_smaller_codecs_stay_near_the_float16_maps(
    codec: str, worst: float, size: int, cached: VideoRunConfig, recipe: Recipe, tmp_path: Path
) -> None:
    config = recipe(tmp_path, codec=codec)
    report = run(config, verify=True)
    assert report.bytes_per_record == 4 + size and report.worst_error <= 0.01
    full, small = FeatureStore(cached.store_root), FeatureStore(config.store_root)
    for key in full.keys:
        exact = full.read(key).features
        assert (small.read(key).features - exact).norm() / exact.norm() < worst


def test_a_codec_that_learns_is_the_same_for_any_number_of_ranks(recipe: Recipe, tmp_path: Path) -> None:
    alone, shared = recipe(tmp_path / "1", codec="pca8-int8"), recipe(tmp_path / "2", codec="pca8-int8")
    run(alone)
    for rank in (0, 1):
        run(shared, rank=rank, world=2)
    one, two = FeatureStore(alone.store_root), FeatureStore(shared.store_root)
    assert one.codec.digest == two.codec.digest is not None and len(two) == TOTAL


def test_unusable_videos_are_counted_and_listed_and_the_run_goes_on(
    spoilt: Path, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torn, foreign, good = FRAMES
    video = spoilt / f"{torn}.mp4"
    video.write_bytes(video.read_bytes()[: video.stat().st_size // 2])
    about = json.loads((spoilt / f"{foreign}_manual.json").read_text())
    (spoilt / f"{foreign}_manual.json").write_text(json.dumps(about | {"video_id": "sav_77"}))
    shutil.copy(spoilt / f"{good}.mp4", spoilt / "sav_5.mp4")
    config = recipe(tmp_path / "run", root=spoilt)
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    for repeat in range(2):  # the second run lists them again
        assert main(["cache", str(path)]) == 0
        assert f"18 records ({0 if repeat else 18} new)" in " ".join(capsys.readouterr().out.split())
        listed = {line["key"]: line["reason"] for line in read_skipped(config.output / "skipped.jsonl")}
        assert listed.keys() == {torn, foreign, "sav_5"}
        assert f"{torn}.mp4 is not a readable video" in listed[torn]
        assert "belongs to another video, sav_77" in listed[foreign]
        assert "sav_5.mp4 has no sav_5_manual.json" in listed["sav_5"]
    parts = VideoParts(config)
    assert left_out_of(config.store_root, parts.train_source).keys() == {torn, foreign}
    whole, bad = complete_videos(parts, open_levels(parts))
    assert whole == [good] and [one.key for one in bad] == [torn, foreign]
    assert main(["cache", str(path), "--layout", "npy"]) == 2
    assert "--layout npy is for the prompt job; the video job has only store" in capsys.readouterr().err


def test_a_video_that_breaks_off_is_left_out_and_can_be_mended(
    spoilt: Path, videos: Path, cached: VideoRunConfig, recipe: Recipe, tmp_path: Path
) -> None:
    """Damage that only decoding shows, behind the 16 frames that are decoded first: those are there already."""
    key = "sav_4000000"
    path = spoilt / f"{key}.mp4"
    with av.open(str(path)) as container:
        packets = {packet.pts: (packet.pos, packet.size) for packet in container.demux(video=0) if packet.size}
    position, size = packets[sorted(packets)[66]]
    data = bytearray(path.read_bytes())
    data[position : position + size] = bytes(size)
    path.write_bytes(data)
    config = recipe(tmp_path / "run", root=spoilt)
    for written in (6 + 6 + 16, 0):
        report = run(config, verify=True)
        assert report.written == written and [bad.key for bad in report.skipped] == [key]
        assert "depends on is damaged" in report.skipped[0].reason
    parts = VideoParts(config)
    assert complete_videos(parts, open_levels(parts)) == ([*FRAMES][:2], report.skipped)
    shutil.copy(videos / f"{key}.mp4", path)
    with pytest.raises(UserError, match="changed since they were cached"):  # it is another file now
        refuse_changed(config.store_root, source_fingerprints(parts.train_source, {key: range(0, 69, 4)}))
    report = run(config)
    assert (report.written, report.renewed, report.skipped) == (18, 16, [])
    for name in STORE:
        assert (config.store_root / name).read_bytes() == (cached.store_root / name).read_bytes()
    assert complete_videos(parts, open_levels(parts)) == ([*FRAMES], [])


def test_no_usable_video_is_an_error_that_names_the_first(spoilt: Path, recipe: Recipe, tmp_path: Path) -> None:
    for path in spoilt.glob("*.mp4"):
        path.write_bytes(b"no video")
    config = recipe(tmp_path / "run", root=spoilt)
    with pytest.raises(UserError, match=r"not one input could be cached; the first: sav_3000000: .*not a readable"):
        run(config)
    parts = VideoParts(config)
    with pytest.raises(UserError, match="not one video can be trained on; the first: sav_3000000: "):
        complete_videos(parts, open_levels(parts))


def test_a_video_with_a_frame_too_few_is_refused(recipe: Recipe, spoilt: Path, tmp_path: Path) -> None:
    """Also where listing the folder left out another file of the same name."""
    config = recipe(tmp_path / "run", root=spoilt)
    parts, (first, second, _) = VideoParts(config), FRAMES
    with pytest.raises(UserError, match="no cached features here; run `samdistill cache` with this config first"):
        open_levels(parts)
    spec = parts.specs("ab")[""]
    with FeatureStoreWriter(config.store_root, spec, make_codec("fp16", spec.shape)) as writer:
        for key, count in FRAMES.items():
            for row in range(count - (key in (first, second))):
                writer.write(f"{key}@{4 * row}", 0, torch.zeros(spec.shape))
    (spoilt / "again").mkdir()
    shutil.copy(spoilt / f"{first}.mp4", spoilt / "again")
    parts = VideoParts(config)
    problems = parts.train_source.problems
    assert [bad.key for bad in problems] == [first]
    list_skipped(config.store_root, 0, problems)
    with pytest.raises(UserError) as error:
        complete_videos(parts, open_levels(parts))
    assert str(error.value) == (
        f"{config.store_root}: 2 of 3 videos are not wholly cached, first {first}: 5 of 6 frames; run `samdistill "
        "cache` with this config again, it resumes"
    )
    list_skipped(config.store_root, 1, [BadInput(first, "x"), BadInput(second, "y")])
    assert complete_videos(parts, open_levels(parts)) == (["sav_4000000"], [(first, "x"), (second, "y")])


@pytest.fixture(scope="module")
def other_teacher(detector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny detector with one number changed."""
    folder = Path(shutil.copytree(detector[1], tmp_path_factory.mktemp("other") / "detector"))
    model, weight = detector[0], next(detector[0].parameters()).data.view(-1)
    weight[0] += 0.5
    model.save_pretrained(folder)
    weight[0] -= 0.5
    return folder


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"teacher": "OTHER"}, "teacher: stored"),
        ({"image_size": 168}, "image_size: stored 126, wanted 168"),
        ({"codec": "int8"}, "codec: stored fp16, wanted int8"),
        ({"level": 2}, "tap: stored fpn_level_3, wanted fpn_level_2"),
        ({"geometry": "longest_side"}, "transform: stored"),
    ],
)
def test_a_cache_of_something_else_is_refused(
    settings: dict[str, object], field: str, cached: VideoRunConfig, recipe: Recipe, other_teacher: Path
) -> None:
    given = settings | ({"teacher": other_teacher} if "teacher" in settings else {})
    parts = VideoParts(recipe(cached.output, **given))
    before = {path.name: path.read_bytes() for path in cached.store_root.iterdir()}

    def opened() -> None:
        open_levels(parts)
        prove(parts.config.store_root, parts.specs(parts.teacher().fingerprint))

    for action in (lambda: run(parts.config), opened):
        with pytest.raises(UserError, match="cached with other settings") as error:
            action()
        assert field in str(error.value) and "\n" not in str(error.value)
    assert {path.name: path.read_bytes() for path in cached.store_root.iterdir()} == before


def test_a_teacher_of_another_shape_is_refused_before_anything_is_written(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, config = Sam3Detector.pyramid, recipe(tmp_path / "run")
    for order in ((0, 1, 2), (0, 1, 2, 2)):
        monkeypatch.setattr(Sam3Detector, "pyramid", lambda *given, order=order: [right(*given)[i] for i in order])
        shapes = ", ".join(("32x36x36", "32x18x18", "32x9x9")[i] for i in order)
        with pytest.raises(UserError, match=f"its pyramid is {shapes}, but level 3 should be 32x4x4 as its config"):
            run(config)
    assert not config.store_root.exists()


def test_verify_sees_damage_and_that_the_teacher_answers_otherwise(
    cached: VideoRunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Sam3Detector.pyramid
    with monkeypatch.context() as patched:
        patched.setattr(Sam3Detector, "pyramid", lambda *given: tuple(1.05 * level for level in right(*given)))
        with pytest.raises(UserError, match=r"record 'sav_3000000@0' differs from the teacher's output by 4\.8%"):
            run(cached, verify=True)
    config = cached.model_copy(update={"output": tmp_path})
    shutil.copytree(cached.store_root, config.store_root)
    values = config.store_root / STORE[0]
    content = bytearray(values.read_bytes())
    content[13 * RECORD[3] + 100] ^= 1
    values.write_bytes(content)
    with pytest.raises(UserError, match=r"1 damaged record\(s\): rank0-values.bin: 'sav_4000000@4'"):
        run(config, verify=True)


def test_a_sample_is_spread_over_all_frames() -> None:
    videos = {"a": (0, 4), "none": (), "b": (3,), "c": tuple(range(0, 40, 4))}
    frames = [(key, (number,)) for key, numbers in videos.items() for number in numbers]

    def spread(count: int) -> list[tuple[str, tuple[int, ...]]]:
        return [(group.key, group.frames) for group in video_cache._spread(videos, count)]

    assert spread(13) == spread(99) == frames
    for count in range(1, 13):
        assert spread(count) == [frames[i * 13 // count] for i in range(count)]
    assert video_cache._spread({}, 5) == []
