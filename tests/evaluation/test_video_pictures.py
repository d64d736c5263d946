"""Videos in a report: which frames are shown, what is drawn on them, and what the table says of single frames."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
import pytest
from drawn_videos import SIZE, Drawn, boxes

from samdistill.evaluation.clip_scores import ClipAnswer, ClipScores
from samdistill.evaluation.pictures import GROUND_TRUTH, SIDE
from samdistill.evaluation.video_pictures import PAST, Answers, film_picture, frame_pictures, shown_frames
from samdistill.evaluation.video_result import STUDENT, WITHOUT, VideoResult, VideoRow
from samdistill.inference.drawing import COLOURS

LEFT, RIGHT = (4, 4, 20, 28), (40, 4, 60, 28)


def answer(key: str, frame: int, number: int, *groups: str, j: float = 0.5) -> ClipAnswer:
    return ClipAnswer(key, frame, number, "circle", j, j / 2, groups)


def scores(*answers: ClipAnswer) -> ClipScores:
    return ClipScores("own", answers, ())


def test_look_alikes_come_first_one_frame_of_each_video() -> None:
    found = shown_frames(
        scores(
            answer("a", 4, 1, "unique"), answer("a", 8, 1, "unique"), answer("a", 8, 2, "unique"),
            answer("b", 4, 1, "lookalikes"), answer("b", 4, 2, "lookalikes"), answer("b", 4, 3, "unique"),
            answer("b", 8, 3, "unique"),
            answer("c", 4, 1, "lookalikes"), answer("c", 12, 1, "lookalikes"), answer("c", 12, 2, "lookalikes"),
        ),
        3,
    )  # fmt: skip
    shown = [(questions[0].key, questions[0].frame, [q.object_id for q in questions]) for questions in found]
    assert shown == [("b", 4, [1, 2]), ("c", 12, [1, 2]), ("a", 8, [1, 2])]
    assert len(shown_frames(scores(answer("a", 4, 1)), 3)) == 1 and shown_frames(scores(), 3) == []
    crowd = scores(*(answer("a", 4, number) for number in range(20)))
    assert len(shown_frames(crowd, 1)[0]) == 8


def colour_at(image: np.ndarray, box: tuple[int, int, int, int]) -> int | None:
    """Which object's colour the middle of a box has, in a grey video."""
    scale = SIDE / SIZE[1]
    x, y = round((box[0] + box[2]) / 2 * scale), round((box[1] + box[3]) / 2 * scale)
    pixel = image[y, x].astype(int)
    if np.ptp(pixel) < 10:
        return None
    return int(np.argmin([np.abs(np.array(c) * 0.55 - pixel).sum() for c in COLOURS]))


def test_a_picture_shows_the_past_the_truth_and_every_answer_in_each_objects_colour() -> None:
    source = Drawn()
    source.add("v", boxes((LEFT, RIGHT), (LEFT, None), (RIGHT, LEFT)), concepts=[("circle",), ("circle",)])
    asked = [answer("v", 8, 10, "lookalikes", j=0.25), answer("v", 8, 11, "lookalikes", j=0.75)]
    truth, own, none = source.masks("v", 8), Answers(), Answers()
    for one, mask in zip(asked, truth, strict=True):
        own(one, mask)
        none(one, truth[1])  # both questions are answered with the second object
    by_row = {
        WITHOUT: scores(*(dataclasses.replace(a, j=0.125) for a in asked), answer("v", 4, 10, j=0.9)),
        STUDENT: scores(*asked),
    }
    (picture,) = frame_pictures(source, by_row, {WITHOUT: none, STUDENT: own})
    assert (picture.key, picture.prompt, picture.against) == ("v, frame 8", "circle", GROUND_TRUTH)
    assert [panel.title for panel in picture.panels] == [PAST, GROUND_TRUTH, WITHOUT, STUDENT]
    assert [panel.iou for panel in picture.panels] == [None, None, 0.125, 0.5]
    assert all(panel.image.shape == (SIDE // 2, SIDE, 3) for panel in picture.panels)
    seen = [[colour_at(panel.image, box) for box in (LEFT, RIGHT)] for panel in picture.panels]
    # before, the second object is away and the first on the left; then they have changed places
    assert seen[0] == [0, None] and seen[1] == seen[3] == [1, 0] and seen[2][1] is None


def test_frames_of_a_film_are_spread_over_it(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"crf": "4"})
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv444p"
        for number in range(13):
            grey = np.full((32, 64, 3), 15 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    found = film_picture(path, "v", "red circle", 4)
    assert (found.key, found.prompt) == ("v, tracked", "red circle")
    assert [panel.title for panel in found.panels] == ["frame 0", "frame 3", "frame 6", "frame 9"]
    means = [float(panel.image.mean()) for panel in found.panels]
    assert means == pytest.approx([0, 45, 90, 135], abs=4) and found.panels[0].image.shape == (SIDE // 2, SIDE, 3)


def result(clips: dict[str, ClipScores]) -> VideoResult:
    rows = tuple(VideoRow(name, jf, jf, jf, 5, 50, 0.2, 0.1, 10.0) for name, jf in ((WITHOUT, 0.4), (STUDENT, 0.6)))
    return VideoResult(rows, None, "sav", 3, 2_000_000, None, (), {}, clips=clips)


def test_single_frames_are_lines_of_the_same_table() -> None:
    def own(values: Sequence[float], *groups: str) -> ClipScores:
        return scores(*(answer("a", 4, number, *groups, j=j) for number, j in enumerate(values)))

    found = result({WITHOUT: own((0.2, 0.4), "lookalikes"), STUDENT: own((0.6, 1.0), "lookalikes")})
    lines = {measure.name: measure.cells for measure in found.measures() if measure.group == "single frames"}
    # J is 0.3 and 0.8, F half of that
    assert lines == {"J&F": ["0.225", "0.600"], "J&F, look-alikes": ["0.225", "0.600"]}
    assert "look-alikes in single frames its J&F is 0.600; without its memory, 0.225." in found.headline(
        STUDENT, WITHOUT
    )
    tiles = {tile.label: tile for tile in found.tiles(STUDENT, WITHOUT)}
    assert len(tiles) <= 6 and tiles["J&F of look-alikes, single frames"].note == "without memory 0.225"
    assert "2 questions about 1 video" in found.caption() and "look-alikes" in found.note
    assert found.to_dict()["clips"][STUDENT]["groups"]["lookalikes"]["count"] == 2
    plain = result({})
    assert all(measure.group != "single frames" for measure in plain.measures()) and plain.to_dict()["clips"] == {}
    assert "look-alikes" not in plain.headline(STUDENT, None) + plain.caption() + plain.note
