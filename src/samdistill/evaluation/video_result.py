"""Results of tracking objects through videos, with one row per memory."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ..data.skipped import BadInput
from ..metrics.video import VideoSetScores
from ..metrics.video_frames import DAVIS_2017, VideoConvention
from ..types import UserError
from .clip_scores import ClipScores
from .result import DASH, Conditions, Evaluation, Measure, Picture, count
from .result_story import Tile
from .verdict import Score, means_without

WITHOUT, STUDENT, TEACHER = "without memory", "student", "teacher memory"
"""Rows: the student without memory of earlier frames, with its own memory, and with its teacher's feature maps as
memory.
"""
PREDICTIONS = "predictions"
"""The only row of a result of predicted masks."""
VIDEO_NOTE = (
    "Every object is given once, by its true mask, and then tracked. J: IoU of the later masks. F: agreement of their "
    "outlines. J&F: the mean of both. All are means over objects. Reappeared: visible again for half a second at most. "
    "Occluded: less than three quarters visible."
)
CLIP_NOTE = (
    "Single frames: no tracking; the memory is built from earlier frames and their true masks. There, look-alikes: "
    "another object in the frame has the same names; occluded: less than half visible; reappeared: not visible in the "
    "annotated frame before."
)
SINGLE = {
    "J&F": "all", "J&F, look-alikes": "lookalikes", "J&F, unlike all others": "unique", "J&F, occluded": "occluded",
    "J&F, reappeared": "reappeared",
}  # fmt: skip
"""Lines of the table on single frames, and their groups of ``ClipScores``."""


@dataclass(frozen=True)
class VideoRow:
    """Figures of one memory. They are in 0..1 and are means over objects of means over frames, unless noted.

    Attributes:
        name: Name of the memory.
        jf: J&F, the mean of ``j`` and ``f``.
        j: Region similarity.
        f: Boundary F-measure.
        objects: Number of objects that count.
        frames: Number of frames of objects that count.
        reappeared: J&F on frames just after an object has reappeared. None if no frame is known to be one.
        occluded: J&F on frames in which the object is partly covered. None if no frame is known to be one.
        latency_ms: Median milliseconds of a frame with all its objects. None if no video was long enough to be timed.
        kept: ``jf`` divided by that with the teacher's memory, for the row ``STUDENT`` only.
    """

    name: str
    jf: float
    j: float
    f: float
    objects: int
    frames: int
    reappeared: float | None = None
    occluded: float | None = None
    latency_ms: float | None = None
    kept: float | None = None


def video_rows(
    scores: Mapping[str, VideoSetScores], seconds: Mapping[str, list[float]], convention: VideoConvention,
    skipped: Sequence[BadInput],
) -> tuple[VideoRow, ...]:  # fmt: skip
    """Compute the rows.

    Args:
        scores: Scores by name of the row.
        seconds: Seconds of each timed frame, by name of the row.
        convention: Selects the frames and objects that count.
        skipped: Inputs that could not be used, for the error message.

    Raises:
        UserError: No video could be used, or no object counts.
    """
    figures = {name: each.summary() for name, each in scores.items()}
    if not any(each.videos for each in scores.values()):
        first = f", first {': '.join(skipped[0])}" if skipped else ""
        raise UserError(f"no video could be evaluated, {len(skipped)} skipped{first}")
    if not all(figures.values()):
        where = "in a video's first annotated frame" if convention.from_first_frame else "on a frame that counts"
        raise UserError(f"no object counts by the rules of {convention.name}: none is visible {where}")
    best = figures[TEACHER]["jf"] if TEACHER in figures else 0.0
    return tuple(
        VideoRow(
            name,
            figure["jf"],
            figure["j"],
            figure["f"],
            int(figure["objects"]),
            int(figure["frames"]),
            reappeared=scores[name].summary("reappeared").get("jf"),
            occluded=scores[name].summary("occluded").get("jf"),
            latency_ms=1e3 * statistics.median(seconds[name]) if name in seconds else None,
            kept=figure["jf"] / best if best > 0 and name == STUDENT else None,
        )
        for name, figure in figures.items()
    )


@dataclass(frozen=True)
class VideoResult(Evaluation[VideoRow]):
    """Results of one student with each memory, or of predicted masks.

    Attributes:
        rows: One row per memory.
        teacher: Name of the row with the teacher's memory, or None.
        convention: Name of the convention that selects frames and objects.
        videos: Number of videos.
        parameters: Parameters of the whole student. None for predicted masks.
        conditions: Conditions of the latency measurement, or None.
        skipped: Inputs that could not be used, with the reason.
        scores: Scores by row, per video, object and frame.
        pictures: Pictures for the report.
        clips: Scores of single-frame questions by row; may be empty.
    """

    rows: tuple[VideoRow, ...]
    teacher: str | None
    convention: str
    videos: int
    parameters: int | None
    conditions: Conditions | None
    skipped: tuple[BadInput, ...]
    scores: Mapping[str, VideoSetScores]
    pictures: tuple[Picture, ...] = ()
    clips: Mapping[str, ClipScores] = field(default_factory=dict)
    pictures_note = (
        "One frame per video, from the first videos; they were not selected by result. Videos with look-alikes come "
        "first, and only their look-alikes are drawn. Each object has the same colour in all panels. At the end, a "
        "whole video tracked from a phrase alone."
    )

    def to_dict(self) -> dict[str, Any]:
        """Convert to numbers, strings, lists and dicts. Pictures and the figures of single frames are not included."""
        return {
            "teacher": self.teacher,
            "convention": self.convention,
            "videos": self.videos,
            "parameters": self.parameters,
            "models": [asdict(row) for row in self.rows],
            "timing": None if self.conditions is None else asdict(self.conditions),
            "skipped": [{"key": bad.key, "reason": bad.reason} for bad in self.skipped],
            "scores": {name: scores.to_dict() for name, scores in self.scores.items()},
            "clips": {name: scores.to_dict() for name, scores in self.clips.items()},
        }

    def measures(self) -> list[Measure]:
        """Return the lines of the table in order. Lines without any value are omitted."""

        def line(group: str, name: str, field: str, form: str, scale: float = 1.0, unit: str = "") -> Measure:
            values = [getattr(row, field) for row in self.rows]
            return Measure(group, name, [DASH if v is None else format(v * scale, form) + unit for v in values])

        found = [
            line("objects followed", "J&F", "jf", ".3f"),
            line("objects followed", "J", "j", ".3f"),
            *self._statistics("j"),
            line("objects followed", "F", "f", ".3f"),
            *self._statistics("f"),
            line("objects followed", "J&F, reappeared", "reappeared", ".3f"),
            line("objects followed", "J&F, occluded", "occluded", ".3f"),
            line("objects followed", "share of teacher memory", "kept", ".1f", 100.0, " %"),
            line("counted", "objects", "objects", "d", 1),
            line("counted", "frames", "frames", "d", 1),
            *(Measure("single frames", name, self._single(group)) for name, group in SINGLE.items()),
            line("cost", "time per frame", "latency_ms", ".3g", 1.0, " ms"),
        ]
        return [measure for measure in found if any(cell != DASH for cell in measure.cells)]

    def _statistics(self, name: str) -> list[Measure]:
        """Return recall and decay, which DAVIS's evaluator reports and SA-V's does not."""
        if self.convention != DAVIS_2017.name:
            return []
        each = [self.scores[row].statistics() for row in self.names if row in self.scores]
        kinds = ("recall", "decay") if len(each) == len(self.rows) else ()
        return [
            Measure("objects followed", f"{name.upper()} {kind}", [f"{found[f'{name}_{kind}']:.3f}" for found in each])
            for kind in kinds
        ]

    def _single(self, group: str) -> list[str]:
        """Return J&F of each row on one group of single-frame questions."""
        figures = [self.clips[name].summary(group) if name in self.clips else {} for name in self.names]
        return [format(figure["jf"], ".3f") if figure else DASH for figure in figures]

    def caption(self) -> str:
        """Return one sentence that describes what the rows were measured on."""
        text = f"{count(self.videos, 'video')}, rules of {self.convention}"
        if self.parameters is not None:
            text += f"; {self.parameters / 1e6:.2f} M parameters"
        if self.clips:
            answers = next(iter(self.clips.values())).answers
            asked = len({answer.key for answer in answers})
            text += f"; single frames: {count(len(answers), 'question')} about {count(asked, 'video')}"
        if self.skipped:
            text += f"; {count(len(self.skipped), 'input')} skipped"
        if self.conditions is not None:
            on = self.conditions
            text += (
                f"; time: all objects of a frame, {on.device}, {count(on.threads, 'thread')}, "
                f"median of {count(on.repeats, 'frame')}"
            )
        return text + "."

    @property
    def note(self) -> str:
        return f"{VIDEO_NOTE} {CLIP_NOTE}" if self.clips else VIDEO_NOTE

    def score(self, name: str) -> Score:
        row = self.row(name)
        objects = {
            video.name: [(found["j"] + found["f"]) / 2 for scores in video.objects if (found := scores.summary())]
            for video in (self.scores[name].videos if name in self.scores else ())
        }
        asked = f"{count(row.objects, 'object')} in {count(self.videos, 'video')}"
        return Score("J&F", row.jf, asked, means_without(objects))

    def headline(self, student: str, start: str | None) -> str:
        """Describe the result, including the gain from the memory, which is what the job trains."""
        own, others = self.row(student), {row.name: row for row in self.rows if row.name != student}
        said = f"The student follows objects with a J&F of {own.jf:.3f}"
        if WITHOUT in others:
            said += f"; without its memory, {others[WITHOUT].jf:.3f}"
        if TEACHER in others:
            said += f"; with the teacher's feature maps as memory, {others[TEACHER].jf:.3f}"
        alike = self._alike(student)
        if alike is not None:
            before = self._alike(WITHOUT)
            said += f". On look-alikes in single frames its J&F is {alike:.3f}"
            said += "" if before is None or student == WITHOUT else f"; without its memory, {before:.3f}"
        cost = "" if own.latency_ms is None else f" A frame takes {own.latency_ms:.3g} ms."
        return f"{said}.{cost}"

    def _alike(self, name: str) -> float | None:
        """Return J&F of a row on look-alikes in single frames, or None."""
        return self.clips[name].summary("lookalikes").get("jf") if name in self.clips else None

    def tiles(self, student: str, start: str | None) -> list[Tile]:
        """Return tiles of J&F, the teacher's share, look-alikes, hard frames, parameters and time: six at most."""
        own, others = self.row(student), {row.name: row for row in self.rows if row.name != student}
        without = others.get(WITHOUT)

        def figure(label: str, field: str) -> list[Tile]:
            value, before = getattr(own, field), without and getattr(without, field)
            said = "" if before is None else f"{WITHOUT} {before:.3f}"
            return [] if value is None else [Tile(label, f"{value:.3f}", said)]

        found = figure("J&F", "jf")
        if own.kept is not None:
            said = f"{TEACHER} {others[TEACHER].jf:.3f}" if TEACHER in others else ""
            found.append(Tile("of the J&F with the teacher's memory", f"{own.kept:.1%}", said))
        alike, plain = self._alike(student), self._alike(WITHOUT)
        if alike is not None:
            said = "" if plain is None else f"{WITHOUT} {plain:.3f}"
            found.append(Tile("J&F of look-alikes, single frames", f"{alike:.3f}", said))
        found += figure("J&F, reappeared", "reappeared")
        if alike is None:  # otherwise there would be more than six tiles
            found += figure("J&F, occluded", "occluded")
        if self.parameters is not None:
            found.append(Tile("parameters", f"{self.parameters / 1e6:.2f} M", ""))
        if own.latency_ms is not None:
            found.append(Tile("time per frame", f"{own.latency_ms:.3g} ms", ""))
        return found
