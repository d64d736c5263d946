"""Frames out of video files: exact numbers, whatever the encoding, and clear words about what cannot be read."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from samdistill.data.sav import SavSource
from samdistill.data.skipped import BadInput
from samdistill.data.videos import VIDEOS, BadVideo, VideoFile, open_videos, read_frames, scan_video, seen_objects
from samdistill.types import UserError

REAL = Path(__file__).parents[3] / "shared" / "data" / "sav" / "sav_900010.mp4"
CLOSED = {"g": "12", "bf": "2", "sc_threshold": "0"}
OPEN = {"x264-params": "open-gop=1:bframes=3:b-adapt=0:keyint=12:min-keyint=12:scenecut=0"}
SHORT = {"g": "3", "bf": "2", "x264-params": "b-adapt=0:scenecut=0"}


def everything(path: Path) -> list[np.ndarray]:
    """All frames, decoded from the start to the end."""
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def agree(path: Path, sets: int) -> VideoFile:
    """Random sets of frames are, pixel by pixel, those of decoding everything."""
    video, expected = scan_video(path), everything(path)
    assert len(video) == len(expected)
    assert video.size == expected[0].shape[:2]
    rng = np.random.default_rng(0)
    for _ in range(sets):
        wanted = rng.integers(0, len(video), rng.integers(1, 9)).tolist()
        found = list(read_frames(video, wanted))
        assert [number for number, _ in found] == sorted(set(wanted))
        assert all(np.array_equal(pixels, expected[number]) for number, pixels in found)
    found = list(read_frames(video, range(len(video))))
    assert all(np.array_equal(pixels, frame) for (_, pixels), frame in zip(found, expected, strict=True))
    return video


def patched(path: Path, box: bytes, offset: int, layout: str, *values: int) -> None:
    """Write ``values`` at ``offset`` behind the name of an mp4's ``box``."""
    data = bytearray(path.read_bytes())
    struct.pack_into(layout, data, data.index(box) + 4 + offset, *values)
    path.write_bytes(data)


@pytest.mark.parametrize("options", [CLOSED, OPEN, SHORT, {"g": "1"}, {"g": "250", "bf": "3"}])
def test_frames_are_those_of_decoding_everything(
    tmp_path: Path, write_video: Callable, number_of: Callable, options: dict[str, str]
) -> None:
    path = write_video(tmp_path / "a.mp4", options=options)
    video = agree(path, 30)
    assert (len(video), video.rate, video.size) == (60, 24.0, (64, 96))
    assert [number_of(pixels) for _, pixels in read_frames(video, [59, 7, 31, 7])] == [7, 31, 59]
    assert list(read_frames(video, [])) == []


@pytest.mark.parametrize("suffix", ["mov", "mkv", "ts"])
def test_other_containers(tmp_path: Path, write_video: Callable, suffix: str) -> None:
    agree(write_video(tmp_path / f"a.{suffix}"), 10)


@pytest.mark.parametrize(
    ("codec", "options", "exact"),
    [("libx264", {"g": "12", "bf": "2", "sc_threshold": "0"}, False), ("libx264", {"g": "24", "bf": "4"}, False),
     ("libx264", {"g": "12", "bf": "0"}, True), ("mpeg4", {"g": "12", "bf": "2"}, True), ("mjpeg", {}, True)],
)  # fmt: skip
def test_numbers_in_an_avi_are_exact_or_refused(tmp_path: Path, numbered, number_of, codec, options, exact) -> None:
    """An AVI has no times, and with B-frames FFmpeg's guess may be wrong: with the first of these by one frame."""
    path = tmp_path / "a.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(60):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(number), format="rgb24")))
        container.mux(stream.encode(None))
    if not exact:
        with pytest.raises(UserError, match="an AVI with B-frames has no valid timestamps; convert it"):
            scan_video(path)
        return
    video = scan_video(path)
    assert len(video) == 60
    for wanted in ([0, 7, 13, 31, 59], [31], [13]):
        assert [(n, number_of(pixels)) for n, pixels in read_frames(video, wanted)] == [(n, n) for n in wanted]


def test_a_changing_rate_moves_no_frame(tmp_path: Path, write_video: Callable, number_of: Callable) -> None:
    millis = np.cumsum([20, 55, 33, 90] * 15).tolist()
    video = agree(write_video(tmp_path / "a.mp4", millis=millis), 10)
    assert [number_of(pixels) for _, pixels in read_frames(video, range(60))] == list(range(60))


@pytest.mark.parametrize("skip", [5, 15])
def test_frames_that_an_edit_cuts_off_are_not_counted(
    tmp_path: Path, write_video: Callable, number_of: Callable, skip: int
) -> None:
    path = write_video(tmp_path / "a.mp4")
    with av.open(str(path)) as container:
        ticks = container.streams.video[0].duration // 60
    patched(path, b"elst", 12, ">i", 2 * ticks + skip * ticks)  # two frames of delay come first
    video = agree(path, 10)
    assert [number_of(pixels) for _, pixels in read_frames(video, [0, 9, 30])] == [skip, skip + 9, skip + 30]


def test_a_group_is_entered_at_its_own_key_frame(tmp_path: Path, write_video: Callable) -> None:
    video = scan_video(write_video(tmp_path / "a.mp4", options=CLOSED))
    assert [video.entry(i) for i in (0, 11, 12, 23, 24, 59)] == [0, 0, 1, 1, 2, 4]
    video = scan_video(write_video(tmp_path / "b.mp4", options=OPEN))
    assert [video.entry(i) for i in (8, 11, 12, 13, 24)] == [0, 0, 1, 1, 2]  # 9..11 are stored behind 12


def test_decoding_neither_starts_at_the_start_nor_hides_damage(
    tmp_path: Path, write_video: Callable, number_of: Callable
) -> None:
    path = write_video(tmp_path / "a.mp4", options=CLOSED)
    with av.open(str(path)) as container:
        packets = {p.pts: (p.pos, p.size) for p in container.demux(video=0) if p.size}
    position, size = packets[sorted(packets)[15]]
    data = bytearray(path.read_bytes())
    data[position : position + size] = bytes(size)
    path.write_bytes(data)
    video = scan_video(path)
    assert [number_of(pixels) for _, pixels in read_frames(video, [3, 24, 40])] == [3, 24, 40]
    reason = r"a\.mp4 is not a readable video: frame 2\d or one that it depends on is damaged"
    for wanted in ([23], [3, 22, 40]):
        with pytest.raises(UserError, match=reason):
            list(read_frames(video, wanted))


def test_bits_that_flip_give_an_error_and_not_other_pixels(tmp_path: Path, write_video: Callable) -> None:
    path = write_video(tmp_path / "a.mp4", options=CLOSED)
    expected, whole, rng = everything(path), path.read_bytes(), np.random.default_rng(0)
    with av.open(str(path)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size > 60]
    refused = 0
    for position, size in packets[4:44:4]:
        data = bytearray(whole)
        for place in rng.integers(position + 12, position + size, 6):
            data[place] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        try:
            for number, pixels in read_frames(scan_video(path), range(60)):
                assert np.abs(pixels.astype(int) - expected[number]).mean() < 3
        except UserError:
            refused += 1
    assert refused >= 8


# where a pixel at column p and row q is shown: a p + c q, b p + d q
SHOWN = {
    (1, 0, 0, 1): lambda f: f,
    (0, 1, -1, 0): lambda f: np.rot90(f, -1),  # a quarter turn clockwise, as phones write it
    (-1, 0, 0, -1): lambda f: np.rot90(f, 2),
    (0, -1, 1, 0): lambda f: np.rot90(f, 1),
    (-1, 0, 0, 1): np.fliplr,
    (1, 0, 0, -1): np.flipud,
    (0, 1, 1, 0): lambda f: f.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda f: np.rot90(f, 2).transpose(1, 0, 2),
}


@pytest.mark.parametrize("matrix", SHOWN)
def test_frames_are_upright(tmp_path: Path, write_video: Callable, matrix: tuple[int, ...]) -> None:
    path = write_video(tmp_path / "a.mp4", 14)
    expected = SHOWN[matrix](everything(path)[13])
    a, b, c, d = (65536 * value for value in matrix)
    patched(path, b"tkhd", 40, ">5i", a, b, 0, c, d)
    video = scan_video(path)
    assert video.size == expected.shape[:2]
    assert np.array_equal(dict(read_frames(video, [13]))[13], expected)


def test_a_slanted_video_is_refused(tmp_path: Path, write_video: Callable) -> None:
    path = write_video(tmp_path / "a.mp4", 3)
    patched(path, b"tkhd", 40, ">5i", 46341, 46341, 0, -46341, 46341)
    with pytest.raises(UserError, match=r"a\.mp4 .* rotation is not a multiple of 90 degrees"):
        scan_video(path)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def silent(path: Path) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def timeless(path: Path) -> None:
    patched(path, b"stts", 12, ">I", 0)


def beyond(path: Path) -> None:
    patched(path, b"elst", 12, ">i", 2**30)


def no_first(path: Path) -> None:
    with av.open(str(path)) as container:
        packet = next(container.demux(video=0))
        position, size = packet.pos, packet.size
    data = bytearray(path.read_bytes())
    data[position : position + size] = bytes(size)
    path.write_bytes(data)


@pytest.mark.parametrize("movflags", ["faststart", "disable_chpl"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [(cut, "ends early|Invalid data"), (Path.unlink, "No such file"), (silent, "it has no video stream"),
     (timeless, "two of its frames have the same timestamp"), (beyond, "it holds no frame"), (no_first, "Invalid data"),
     (lambda path: path.write_bytes(b""), "Invalid data"), (lambda path: path.write_text("no"), "Invalid data")],
)  # fmt: skip
def test_unreadable_files_are_named(
    tmp_path: Path, write_video: Callable, movflags: str, spoil: Callable, reason: str
) -> None:
    path = write_video(tmp_path / "a.mp4", 30, movflags=movflags)
    spoil(path)
    with pytest.raises(UserError, match=rf"a\.mp4 is not a readable video: .*({reason})") as error:
        scan_video(path)
    assert "\n" not in str(error.value)


def test_a_stream_without_times_is_refused(tmp_path: Path, write_video: Callable) -> None:
    with pytest.raises(UserError, match=r"a\.h264 is not a readable video: its frames have no timestamps; store it"):
        scan_video(write_video(tmp_path / "a.h264", 5))


def test_a_video_that_changes_its_size_is_refused(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "c.ts"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width = 64, 96
        for width, start in ((96, 0), (64, 12)):
            encoder = av.CodecContext.create("libx264", "w")
            encoder.height, encoder.width, encoder.pix_fmt, encoder.max_b_frames = 64, width, "yuv420p", 0
            encoder.time_base, encoder.framerate = Fraction(1, 24), 24
            black = av.VideoFrame.from_ndarray(np.zeros((64, width, 3), np.uint8), format="rgb24")
            packets = []
            for number in range(start, start + 12):
                black.pts, black.time_base = number, Fraction(1, 24)
                packets += encoder.encode(black)
            for packet in packets + encoder.encode(None):
                packet.stream = stream
                container.mux(packet)
    video = scan_video(tmp_path / "c.ts")
    assert len(video) == 24 and len(list(read_frames(video, [3, 11]))) == 2
    with pytest.raises(UserError, match=r"c\.ts .*frame 20 has another size than the first"):
        list(read_frames(video, [3, 20]))


def test_numbers_beyond_the_end(tmp_path: Path, write_video: Callable) -> None:
    video = scan_video(write_video(tmp_path / "a.mp4", 5))
    for index in (5, -1):
        with pytest.raises(IndexError, match=rf"frame {index} of .*a\.mp4, which has 5"):
            list(read_frames(video, [0, index]))


@pytest.mark.skipif(not REAL.is_file(), reason=f"no real SA-V sample at {REAL}")
def test_frames_of_a_real_video() -> None:
    assert len(agree(REAL, 8)) == 60


def test_objects_that_are_never_seen() -> None:
    visible = np.array([[True, False, False], [False, False, True]])
    kept, lost = seen_objects("v", [4, 7, 9], visible)
    assert kept == [0, 2] and lost == (BadInput("v, object 7", "it appears in no annotated frame"),)


def test_videos_are_divided_by_key(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"sav_{number:06d}.mp4").touch()
        (tmp_path / f"sav_{number:06d}_manual.json").touch()
    train, held_out = (open_videos(tmp_path, "sav", part, 0.25) for part in ("train", "held_out"))  # type: ignore[arg-type]
    assert isinstance(train, SavSource) and len(train.keys) + len(held_out.keys) == 40
    assert not set(train.keys) & set(held_out.keys) and 4 <= len(held_out.keys) <= 16
    (tmp_path / "sav_000040.mp4").touch()
    (tmp_path / "sav_000040_auto.json").touch()
    assert set(train.keys) <= set(open_videos(tmp_path, "sav", "train", 0.25).keys)
    few = open_videos(tmp_path, "sav", "train", 0.25, fraction=0.3).keys
    assert set(few) < set(train.keys) | {"sav_000040"} and 3 <= len(few) <= 18
    assert len(open_videos(tmp_path, "sav", "train", 0).keys) == 41
    (tmp_path / "val.txt").write_text("sav_000003\nsav_000011\n")
    assert open_videos(tmp_path, "sav", "held_out", 1, ids=tmp_path / "val.txt").keys == ["sav_000003", "sav_000011"]
    with pytest.raises(UserError, match=r"2 videos with data.held_out_fraction=0 leave none for held_out"):
        open_videos(tmp_path, "sav", "held_out", 0, ids=tmp_path / "val.txt")
    (tmp_path / "val.txt").write_text("sav_7\n")
    with pytest.raises(UserError, match=r"val\.txt: 1 of 1 ids are not in the data set: sav_7"):
        open_videos(tmp_path, "sav", "train", ids=tmp_path / "val.txt")


def test_a_root_without_videos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.root: .*nowhere is not a folder"):
        open_videos(tmp_path / "nowhere", "sav", "train")
    with pytest.raises(UserError, match=r"no video data set kind is called 'sab'; did you mean 'sav'\?"):
        open_videos(tmp_path, "sab", "train")
    (tmp_path / "a_auto.json").touch()
    with pytest.raises(UserError, match=r"no video for data.kind=sav; 1 inputs were unusable, first a_auto: .*a\.mp4"):
        open_videos(tmp_path, "sav", "train")


def test_errors_survive_a_process(tmp_path: Path) -> None:
    import pickle

    error = pickle.loads(pickle.dumps(BadVideo("v", "spoilt")))
    assert isinstance(error, BadVideo) and isinstance(error, UserError) and str(error) == "v: spoilt"
    assert error.bad == BadInput("v", "spoilt") and {"sav"} <= set(VIDEOS)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads where the system lists them")
def test_reading_leaves_no_thread_behind(tmp_path: Path, write_video: Callable) -> None:
    """A worker forked from a process that read a video would wait for ever for threads that it did not inherit."""
    script = """
import os, sys
from pathlib import Path
from samdistill.data.videos import read_frames, scan_video
found = scan_video(Path(sys.argv[1]))
frames = [pixels for _, pixels in read_frames(found, range(len(found)))]
print(len(frames), len(os.listdir("/proc/self/task")))
"""
    path = tmp_path / "a.mp4"
    write_video(path, count=6)
    run = subprocess.run(
        [sys.executable, "-c", script, path], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert run.stdout.split() == ["6", "1"], run.stderr
