"""Objects followed through videos: what is given when, figures that are known beforehand, and what is skipped."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from drawn_videos import SIZE, Drawn, Plain, boxes
from rich.console import Console

from samdistill.data.sav import SavSource
from samdistill.data.videos import BadVideo, VideoSource
from samdistill.evaluation import videos as module
from samdistill.evaluation.video_result import STUDENT, TEACHER, WITHOUT
from samdistill.evaluation.videos import evaluate_videos_with
from samdistill.metrics.video import boundary_f, region_similarity
from samdistill.metrics.video_frames import DAVIS_2017, SAV
from samdistill.sandbox.videos import VideoStyle
from samdistill.sandbox.write_videos import write_sav
from samdistill.types import UserError

Answer = Callable[["Session"], dict[int, np.ndarray]]


class Session:
    """Stands in for ``VideoSession``: notes what it is given and answers as ``answer`` says."""

    made: ClassVar[list[Session]] = []
    answer: ClassVar[Answer]

    def __init__(self, student: object, *, context: int | None, stride: int | None, geometry: str) -> None:
        self.context, self.stride = context, stride
        self.frames: list[bytes] = []
        self.given: list[tuple[int, int, str | None, np.ndarray]] = []
        self.remembered: list[torch.Tensor | None] = []
        self.made.append(self)

    def add_mask(self, mask: np.ndarray, text: str | None = None, object_id: int | None = None) -> int:
        assert object_id is not None and object_id not in self.ids and len(self.ids) < 20
        self.given.append((len(self.frames), object_id, text, mask.copy()))
        return object_id

    @property
    def ids(self) -> list[int]:
        return [number for _, number, _, _ in self.given]

    def push(self, frame: np.ndarray, remembered: torch.Tensor | None = None) -> tuple[SimpleNamespace, ...]:
        self.frames.append(frame.tobytes())
        self.remembered.append(remembered)
        found = type(self).answer(self)
        return tuple(SimpleNamespace(object_id=i, mask=found[i]) for i in self.ids if i in found)


def first_mask(session: Session) -> dict[int, np.ndarray]:
    return {number: mask for _, number, _, mask in session.given}


def nothing(session: Session) -> dict[int, np.ndarray]:
    return {}


def truth_of(source: VideoSource) -> Answer:
    """Knows every frame by its pixels, and says nothing about those without annotation."""
    where = {}
    for key in source.keys:
        indices = source.record(key).annotated
        where |= {f.tobytes(): (key, i) for f, i in zip(source.frames(key, indices), indices, strict=True)}

    def answer(session: Session) -> dict[int, np.ndarray]:
        key, index = where.get(session.frames[-1], ("", 0))
        return dict(zip(source.record(key).objects, source.masks(key, index), strict=True)) if key else {}

    return answer


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Answer], list[Session]]:
    """stub(answer): sessions answer so from now on; gives the list of those that will be made."""
    monkeypatch.setattr(module, "VideoSession", Session)

    def use(answer: Answer) -> list[Session]:
        Session.answer, Session.made = staticmethod(answer), []
        return Session.made

    return use


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sandbox videos, in which objects come late, hide and return. Read only."""
    folder = tmp_path_factory.mktemp("videos")
    style = VideoStyle(frames=72, min_objects=3, max_objects=4, hides=1.0, leaves=1.0)
    write_sav(folder, 4, (40, 56), seed=2, split="val", style=style)
    return folder / "val"


@pytest.fixture(scope="module")
def source(root: Path) -> SavSource:
    return SavSource(root)


def by_hand(source: VideoSource, flag: str | None = None) -> tuple[float, float, int, int]:
    """J, F, objects and frames of a model that keeps an object's first mask for ever, by SA-V's rules."""
    means = []
    for key in source.keys:
        record = source.record(key)
        said = json.loads(source.path(key).with_name(f"{key}_manual.json").read_text())
        for column in range(len(record.objects)):
            masks = np.stack([source.masks(key, index)[column] for index in record.annotated])
            seen = masks.any((1, 2))
            start = int(np.argmax(seen))
            shares = [row[column] for row in said["masklet_visible_share"]]
            flags = {"occluded": [s and share < 0.75 for s, share in zip(seen, shares, strict=True)]}
            returned, flags["reappeared"] = None, []
            for row, visible in enumerate(seen):
                if visible and row > start and not seen[row - 1]:
                    returned = row
                back = visible and returned is not None and 4 * (row - returned) <= 12  # half a second of 24 frames
                flags["reappeared"].append(back)
            rows = range(start + 1, len(masks) - 1)
            if not seen[start + 1 : -1].any():
                continue
            counted = [row for row in rows if flag is None or flags[flag][row]]
            scores = [(region_similarity(masks[start], masks[row]), boundary_f(masks[start], masks[row]))
                      for row in counted]  # fmt: skip
            if scores:
                means.append((*np.mean(scores, 0), len(scores)))
    j, f, frames = np.array(means).T
    return float(j.mean()), float(f.mean()), len(means), int(frames.sum())


def test_the_truth_is_right_everywhere(source: SavSource, stub: Callable[[Answer], list[Session]]) -> None:
    stub(truth_of(source))
    result = evaluate_videos_with(Plain(), source, source.keys, convention=SAV)
    for row in result.rows:
        assert (row.jf, row.j, row.f, row.reappeared, row.occluded) == (1, 1, 1, 1, 1) and row.kept is None
    assert result.names == [WITHOUT, STUDENT] and result.teacher is None and result.videos == 4
    _, _, objects, frames = by_hand(source)
    assert result.rows[0].objects == objects
    # an object that is away just after it was given, and not seen there either, starts to count when it is back
    away = 0
    for key in source.keys:
        for seen in source.record(key).visible.T:
            after = seen[int(np.argmax(seen)) + 1 : -1]
            away += int(np.argmax(after))
    assert result.rows[0].frames == frames - away and away > 0
    assert result.skipped == () and result.convention == "sav" and result.parameters == 20


def test_the_first_mask_for_ever_scores_as_worked_out_by_hand(
    source: SavSource, stub: Callable[[Answer], list[Session]]
) -> None:
    stub(first_mask)
    progress: list[int] = []
    result = evaluate_videos_with(Plain(), source, source.keys, convention=SAV, progress=progress.append)
    row, (j, f, objects, frames) = result.row(STUDENT), by_hand(source)
    assert (row.j, row.f, row.jf) == pytest.approx((j, f, (j + f) / 2)) and 0.05 < row.j < 0.9
    assert (row.objects, row.frames) == (objects, frames) and progress == [1] * 4
    for flag, figure in (("reappeared", row.reappeared), ("occluded", row.occluded)):
        j, f, objects, _ = by_hand(source, flag)
        assert figure == pytest.approx((j + f) / 2) and objects > 0


def test_the_score_without_a_video_is_that_of_the_other_videos(
    source: SavSource, stub: Callable[[Answer], list[Session]]
) -> None:
    stub(first_mask)
    whole = evaluate_videos_with(Plain(), source, source.keys, convention=SAV)
    score = whole.score(STUDENT)
    assert score.value == whole.row(STUDENT).jf and score.without.keys() == set(source.keys)
    for left in source.keys:
        rest = [key for key in source.keys if key != left]
        alone = evaluate_videos_with(Plain(), source, rest, convention=SAV).row(STUDENT)
        assert score.without[left] == pytest.approx(alone.jf)
    assert score.measured_on == f"{whole.row(STUDENT).objects} objects in 4 videos"


def test_what_is_given_and_when(source: SavSource, stub: Callable[[Answer], list[Session]]) -> None:
    made, late = stub(nothing), 0
    evaluate_videos_with(Plain(), source, source.keys, convention=SAV)
    assert [(s.context, s.stride) for s in made] == [(0, 1), (None, 1)] * 4  # annotated every 4 frames, as in training
    for pair, key in zip(zip(made[::2], made[1::2], strict=True), source.keys, strict=True):
        record = source.record(key)
        starts = [int(np.argmax(seen)) for seen in record.visible.T]
        first = min(starts)
        for session in pair:
            assert session.frames == [f.tobytes() for f in source.frames(key, record.annotated[first:])]
            assert sorted(session.ids) == sorted(record.objects)
            for pushed, number, text, mask in session.given:
                column = record.objects.index(number)
                assert pushed == starts[column] - first and text == record.concepts[column][-1]
                assert " " in text  # colour and shape
                assert np.array_equal(mask, source.masks(key, record.annotated[starts[column]])[column])
        late += sum(start > first for start in starts)
    assert late > 0


def test_every_frame_is_pushed_where_that_is_asked_for(
    source: SavSource, stub: Callable[[Answer], list[Session]]
) -> None:
    made = stub(truth_of(source))
    result = evaluate_videos_with(Plain(), source, source.keys[:1], convention=SAV, context=3, every_frame=True)
    record = source.record(source.keys[0])
    first = int(record.visible.argmax(0).min())
    wanted = range(record.annotated[first], record.annotated[-1] + 1)
    assert [(s.context, s.stride) for s in made] == [(0, 4), (3, 4)]
    assert all(s.frames == [f.tobytes() for f in source.frames(record.key, wanted)] for s in made)
    assert result.row(STUDENT).jf == 1 and result.conditions.repeats == len(wanted) - 2


BOX, OTHER = (4, 4, 20, 20), (30, 10, 50, 30)


def two_objects() -> Drawn:
    """Annotated in every frame: one object from the first on, one from row 2 on, and away in row 4."""
    source = Drawn()
    rows = [(BOX, None), (BOX, None), (BOX, OTHER), (BOX, OTHER), (BOX, None), (BOX, OTHER), (BOX, OTHER)]
    source.add("dense", boxes(*rows), stride=1)
    return source


def test_an_object_that_comes_later_starts_later_and_counts_where_the_rules_say_so(
    stub: Callable[[Answer], list[Session]],
) -> None:
    source = two_objects()
    made = stub(first_mask)
    result = evaluate_videos_with(Plain(), source, ["dense"], convention=SAV)
    assert {s.stride for s in made} == {4}  # a frame in four is remembered, as in training
    assert [(pushed, number, text) for pushed, number, text, _ in made[0].given] == [(0, 10, None), (2, 11, None)]
    (video,) = result.scores[STUDENT].videos
    assert [one.frames for one in video.objects] == [(1, 2, 3, 4, 5), (3, 4, 5)]
    assert [one.j for one in video.objects] == [(1,) * 5, (1, 0, 1)]  # it was away in the middle


def test_davis_gives_what_the_first_frame_shows_and_counts_the_ids_up_to_its_greatest(
    stub: Callable[[Answer], list[Session]],
) -> None:
    rows = [(BOX, None), (BOX, None), (BOX, OTHER), (BOX, OTHER), (BOX, None), (BOX, OTHER), (BOX, OTHER)]
    # ids of what is there from the start and of what comes in row 2; the figures of each object that counts
    for ids, expected in {(1, 2): {1: (1, 1)}, (3, 1): {1: (2 / 5, 2 / 5), 2: (1, 1), 3: (1, 1)}}.items():
        source, made = Drawn(), stub(first_mask)
        source.add("dense", boxes(*rows), stride=1, ids=ids)
        result = evaluate_videos_with(Plain(), source, ["dense"], convention=DAVIS_2017)
        assert [(pushed, number) for pushed, number, _, _ in made[0].given] == [(0, ids[0])]
        (video,) = result.scores[STUDENT].videos
        found = {one.object_id: (one.summary()["j"], one.summary()["f"]) for one in video.objects}
        # one that comes later is not given and so not found: right in rows 1 and 4, where it is not there
        assert found == expected and {one.frames for one in video.objects} == {(1, 2, 3, 4, 5)}
        assert result.row(STUDENT).objects == len(expected) and result.convention == "davis_2017"
    assert any("J recall" in measure.name for measure in result.measures())
    source.add("late", boxes((None,), (BOX,), (BOX,), (BOX,)), stride=1)
    skipped = evaluate_videos_with(Plain(), source, ["dense", "late"], convention=DAVIS_2017).skipped
    assert [(bad.key, bad.reason) for bad in skipped] == [
        ("late", "no object in its first annotated frame, and davis_2017 counts no other")
    ]


def test_frames_in_which_nobody_looked_do_not_count(stub: Callable[[Answer], list[Session]]) -> None:
    source, labelled = Drawn(), np.ones((6, 1), bool)
    labelled[3] = False
    source.add("a", boxes(*[(BOX,)] * 3, (None,), *[(BOX,)] * 2), labelled=labelled)
    stub(first_mask)
    result = evaluate_videos_with(Plain(), source, ["a"], convention=SAV)
    (one,) = result.scores[STUDENT].videos[0].objects
    assert one.frames == (4, 8, 16) and one.j == (1, 1, 1) and result.row(STUDENT).reappeared is None
    assert result.row(STUDENT).occluded is None  # nothing but a rendered video tells


def test_more_objects_than_a_session_takes_are_shared_out(stub: Callable[[Answer], list[Session]]) -> None:
    source, made = Drawn(), stub(first_mask)
    row = [(2 * k, 0, 2 * k + 2, 6) for k in range(25)]
    source.add("crowd", boxes(row, row, row))
    result = evaluate_videos_with(Plain(), source, ["crowd"], convention=SAV)
    assert [len(session.ids) for session in made] == [20, 5] * 2
    assert result.row(STUDENT).objects == 25 and result.row(STUDENT).jf == 1


def test_a_phrase_that_cannot_be_read_gives_way_to_a_shorter_one(stub: Callable[[Answer], list[Session]]) -> None:
    source, made = Drawn(), stub(first_mask)
    long = "red red red red red red circle"
    source.add("a", boxes(*[(BOX, OTHER)] * 3), concepts=[("circle", "red circle", long), (long,)])
    evaluate_videos_with(Plain(), source, ["a"], convention=SAV)
    assert [text for _, _, text, _ in made[0].given] == ["red circle", None]


def test_a_broken_video_among_three_is_skipped_and_named(
    root: Path, tmp_path: Path, stub: Callable[[Answer], list[Session]]
) -> None:
    for path in sorted(root.glob("*"))[:6]:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    names = sorted(path.stem for path in tmp_path.glob("*.mp4"))
    broken = tmp_path / f"{names[1]}.mp4"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 2])
    source, progress = SavSource(tmp_path), list[int]()
    stub(first_mask)
    result = evaluate_videos_with(Plain(), source, names, convention=SAV, progress=progress.append)
    assert result.videos == 2 and [bad.key for bad in result.skipped] == [names[1]] and len(progress) == 3
    assert "not a readable video" in result.skipped[0].reason and "1 input skipped" in result.caption()
    with pytest.raises(UserError, match=rf"no video could be evaluated, 1 skipped, first {names[1]}: "):
        evaluate_videos_with(Plain(), source, names[1:2], convention=SAV)


def test_damage_in_the_middle_and_videos_without_anything_to_follow(stub: Callable[[Answer], list[Session]]) -> None:
    source = two_objects()
    source.add("damaged", boxes(*[(BOX,)] * 4))
    source.add("empty", np.zeros((4, 0, *SIZE), bool))
    source.records["gone"] = BadVideo("gone", "its file is missing")
    source.broken.add(("damaged", 8))
    stub(first_mask)
    result = evaluate_videos_with(Plain(), source, [*source.keys, "gone"], convention=SAV)
    assert result.videos == 1 and {bad.key: bad.reason for bad in result.skipped} == {
        "damaged": "frame 8 is damaged", "empty": "no object to track", "gone": "its file is missing",
    }  # fmt: skip
    source.add("short", boxes((BOX,), (BOX,)))
    with pytest.raises(UserError, match="no object counts by the rules of sav"):
        evaluate_videos_with(Plain(), source, ["short"], convention=SAV)


def test_workers_change_no_figure(source: SavSource, stub: Callable[[Answer], list[Session]]) -> None:
    stub(first_mask)
    one, two = (
        evaluate_videos_with(Plain(), source, source.keys, convention=SAV, workers=workers) for workers in (1, 2)
    )
    assert one.scores == two.scores and one.scores[WITHOUT] == one.scores[STUDENT]


class Teacher:
    """Its map of a frame is the frame's grey level."""

    image_size = 28

    def __init__(self) -> None:
        self.asked: list[int] = []

    def pyramid(self, images: object) -> tuple[torch.Tensor, ...]:
        assert images.images.shape == (1, 3, 28, 28)
        self.asked.append(int(images.images[0, 0, 0, 0]))
        return tuple(torch.full((1, 2, 4, 4), 10.0 * level + self.asked[-1]) for level in range(4))


def test_a_teacher_is_remembered_in_a_row_of_its_own(stub: Callable[[Answer], list[Session]]) -> None:
    source, teacher = two_objects(), Teacher()
    best = truth_of(source)
    made = stub(lambda session: best(session) if session is made[2] else first_mask(session))
    result = evaluate_videos_with(Plain(memory_level=2), source, ["dense"], convention=SAV, teacher=teacher)
    assert teacher.asked == [0, 2, 4]  # every 4th frame is remembered, and the one in which an object comes
    own, theirs = made[1].remembered, made[2].remembered
    assert own == [None] * 7 and [None if m is None else float(m[0, 0, 0]) for m in theirs] == [
        20, None, 22, None, 24, None, None
    ]  # fmt: skip
    assert theirs[0].shape == (2, 4, 4) and result.names == [WITHOUT, STUDENT, TEACHER] and result.teacher == TEACHER
    without, student, best = result.rows
    assert best.jf == 1 and best.kept is None is without.kept and student.kept == student.jf < 1


def test_it_is_said_in_a_table_and_as_plain_data(source: SavSource, stub: Callable[[Answer], list[Session]]) -> None:
    stub(first_mask)
    result = evaluate_videos_with(Plain(), source, source.keys, convention=SAV)
    said = json.loads(json.dumps(result.to_dict()))
    assert [row["name"] for row in said["models"]] == [WITHOUT, STUDENT] and said["convention"] == "sav"
    assert said["scores"][STUDENT]["overall"]["jf"] == said["models"][1]["jf"] and said["parameters"] == 20
    assert said["models"][1]["latency_ms"] > 0 and said["timing"]["image_size"] == 64
    console = Console(width=80)
    with console.capture() as shown:
        console.print(result.table())
    lines = shown.get().splitlines()
    assert max(map(len, lines)) <= 80 and any("J&F, occluded" in line for line in lines)
    assert f"{result.row(STUDENT).jf:.3f}" in next(line for line in lines if " J&F  " in line)
    assert f"J&F of {result.row(STUDENT).jf:.3f}; without its memory" in result.headline(STUDENT, WITHOUT)
    assert [tile.label for tile in result.tiles(STUDENT, None)][:2] == ["J&F", "J&F, reappeared"]


def test_training_goes_on_as_it_was(stub: Callable[[Answer], list[Session]]) -> None:
    model = Plain()
    model.model.memory = torch.nn.Linear(1, 1)
    model.model.eval().memory.train()  # a frozen model whose memory trains

    def answer(session: Session) -> dict[int, np.ndarray]:
        assert not model.model.memory.training
        return first_mask(session)

    stub(answer)
    evaluate_videos_with(model, two_objects(), ["dense"], convention=SAV)
    assert model.model.memory.training and not model.model.training
    with pytest.raises(ValueError, match="the row without memory is always included"):
        evaluate_videos_with(model, two_objects(), ["dense"], convention=SAV, context=0)
