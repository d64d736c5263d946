"""Single answers with the true past to remember: what the memory is told, what is asked, and which groups it is of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from drawn_videos import SIZE, WORDS, Drawn, boxes, settings
from PIL import Image
from transformers.models.sam3_lite_text.modeling_sam3_lite_text import Sam3LiteTextVisionEncoderOutput

from samdistill.data.objects import LEAST_PIXELS
from samdistill.data.sav import SavSource
from samdistill.data.transforms import Geometry
from samdistill.data.videos import BadVideo, VideoSource
from samdistill.evaluation.clip_scores import ClipScores
from samdistill.evaluation.clips import evaluate_clips
from samdistill.inference.concepts import StudentDetector, detections
from samdistill.metrics.video import boundary_f, region_similarity
from samdistill.sandbox.concepts import VOCABULARY
from samdistill.sandbox.videos import VideoStyle
from samdistill.sandbox.write_videos import write_sav
from samdistill.students import EfficientSam3Model, EfficientSam3Output, efficient_sam3_config
from samdistill.teachers import Frame, Maps
from samdistill.types import ConceptPrompts, ImageBatch, UserError

CANVAS, GRID = 64, 4


class Fake(torch.nn.Module):
    """Its maps are the mean grey of a frame; it answers with ``masks``, one after the other, in its second query."""

    device = torch.device("cpu")

    def __init__(self, **changes: object) -> None:
        super().__init__()
        self.config = settings(**changes)
        self.encoded: list[int] = []
        self.calls: list[dict[str, torch.Tensor]] = []
        self.frames: list[int] = []
        self.masks: list[np.ndarray] | None = None

    def get_vision_features(self, pixels: torch.Tensor) -> Sam3LiteTextVisionEncoderOutput:
        assert not self.training and pixels.shape[1:] == (3, CANVAS, CANVAS)
        grey = ((pixels * 0.5 + 0.5) * 255).mean((1, 2, 3)).round()
        self.encoded += grey.int().tolist()
        maps = [grey.view(-1, 1, 1, 1).expand(-1, 2, side, side) + level / 10
                for level, side in enumerate((32, 16, 8, GRID))]  # fmt: skip
        return Sam3LiteTextVisionEncoderOutput(
            fpn_hidden_states=tuple(maps), fpn_position_encoding=tuple(torch.zeros_like(m[:1]) for m in maps)
        )

    def forward_video(
        self, vision_embeds: Sam3LiteTextVisionEncoderOutput, prompt_images: torch.Tensor, input_ids: torch.Tensor,
        attention_mask: torch.Tensor, **memory: torch.Tensor,
    ) -> EfficientSam3Output:  # fmt: skip
        count = len(input_ids)
        self.calls.append({"input_ids": input_ids, **memory})
        self.frames.append(round(float(vision_embeds.fpn_hidden_states[0][0, 0, 0, 0])))
        assert len(vision_embeds.fpn_hidden_states[0]) == 1 and prompt_images.tolist() == [0] * count
        masks = torch.ones(count, 3, CANVAS, CANVAS)
        if self.masks is not None:
            for row in range(count):  # twice as high as the frame, and so exact on the way back
                answer = torch.from_numpy(self.masks.pop(0)).repeat_interleave(CANVAS // SIZE[0], 0)
                masks[row, 1] = answer.float() * 2 - 1
        logits = torch.tensor([[0.1, 30.0, 20.0]]).expand(count, -1)  # as probabilities the last two are the same
        flat = torch.zeros(count, 1, 1, 1)
        return EfficientSam3Output(
            masks, torch.zeros(count, 3, 4), logits, torch.zeros(count, 1), flat, vision_embeds.fpn_hidden_states[:3],
            flat,
        )  # fmt: skip


class Student:
    """A ``StudentDetector`` around the fake."""

    image_size, words, pixels = CANVAS, WORDS, StudentDetector.pixels

    def __init__(self, **changes: object) -> None:
        self.model = Fake(**changes).eval()


class Cached:
    """The teacher's maps, on another grid: 100 more than the number of the frame."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def read(self, asked: Sequence[Frame]) -> Maps:
        self.asked += asked
        return (torch.tensor([100.0 + frame for _, frame in asked]).view(-1, 1, 1, 1).expand(-1, 2, 5, 5),)

    def answer(self, asked: Sequence[Frame], read: Maps) -> Maps:
        return read


LEFT, RIGHT, LOW, DOT = (2, 2, 18, 18), (30, 2, 50, 14), (20, 18, 60, 30), (40, 0, 41, 1)
ROWS = (
    (LEFT, RIGHT, None, None),
    (LEFT, RIGHT, LOW, None),
    (LEFT, None, LOW, DOT),
    (LEFT, RIGHT, None, DOT),
    (LEFT, None, LOW, None),
    (LEFT, RIGHT, None, None),
)
"""The second is away in rows 2 and 4, the third comes in row 1 and is away in rows 3 and 5, the last is too small."""
NAMES = [("circle", "red", "red circle"), ("circle", "red", "red circle"), ("star", "red", "red star"), ("star",)]


def drawn() -> Drawn:
    source = Drawn()
    source.add("v", boxes(*ROWS), concepts=NAMES)
    return source


def asked(context: int, queries: Sequence[int]) -> list[tuple[int, int]]:
    """Row and column of each question: in the query and in one of the frames before."""
    return [
        (query, column)
        for query in queries
        for column in range(3)
        if ROWS[query][column] and any(ROWS[row][column] for row in range(max(0, query - context), query))
    ]


def shares(row: int, column: int) -> torch.Tensor:
    """Of cells of 8 x 16 pixels of the frame, counted pixel by pixel."""
    found = torch.zeros(GRID, GRID)
    if ROWS[row][column] is not None:
        left, top, right, bottom = ROWS[row][column]
        for y in range(top, bottom):
            for x in range(left, right):
                found[y // 8, x // 16] += 1 / 128
    return found


@pytest.mark.parametrize("memory", ["own", "teacher"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_what_the_memory_is_told(memory: str, batch_size: int) -> None:
    source, student, levels = drawn(), Student(), Cached() if memory == "teacher" else None
    student.model.masks = [source.truth["v"][row, column] for row, column in asked(2, range(1, 6))]
    scores = evaluate_clips(
        student, source, ["v"], context=2, queries_per_video=9, memory=memory, levels=levels, batch_size=batch_size
    )  # type: ignore[arg-type]
    assert scores.summary() == {"jf": 1, "j": 1, "f": 1, "count": 10} and student.model.masks == []
    assert [(a.frame // 4, a.object_id - 10) for a in scores.answers] == asked(2, range(1, 6))
    assert student.model.frames == [4, 8, 12, 16, 20]
    assert student.model.encoded == ([0, 4, 8, 12, 16, 20] if memory == "own" else [4, 8, 12, 16, 20])  # once each
    for query, call in zip(range(1, 6), student.model.calls, strict=True):
        rows = [row for row in (query - 2, query - 1) if row >= 0]
        assert call["memory_ages"].tolist() == [[float(query - row) for row in rows]]
        maps = [4 * row + (0.3 if memory == "own" else 100) for row in rows]
        torch.testing.assert_close(call["memory_features"][0, :, 0, 0, 0], torch.tensor(maps, dtype=torch.float32))
        assert call["memory_features"].shape == (1, len(rows), 2, GRID, GRID)
        columns = [column for at, column in asked(2, range(1, 6)) if at == query]
        wanted = [torch.stack([shares(row, column) for row in rows]) for column in columns]
        torch.testing.assert_close(call["memory_masks"], torch.stack(wanted))
        phrases = [NAMES[column][-1] for column in columns]
        assert torch.equal(call["input_ids"], WORDS.encode(phrases)[0])
    assert levels is None or levels.asked == [("v", frame) for frame in (0, 4, 8, 12, 16)]


def test_nothing_is_remembered_or_marked_where_that_is_asked_for() -> None:
    said = {}
    for name, changes, given in (
        ("none", {}, {"memory": "none"}), ("unmarked", {}, {"marks": False}),
        ("trained so", {"memory_marks": False}, {}), ("marked", {"memory_marks": False}, {"marks": True}),
    ):  # fmt: skip
        student, source = Student(**changes), drawn()
        scores = evaluate_clips(student, source, ["v"], context=2, **given)
        said[name] = {part for call in student.model.calls for part in call if part.startswith("memory")}
        assert [(a.frame, a.object_id) for a in scores.answers] == [
            (4 * row, 10 + column) for row, column in asked(2, (1, 2, 3, 4))
        ]  # the same questions, whatever is remembered
        assert {index for _, index in source.read} == {4, 8, 12, 16} | ({0} if name != "none" else set())
    both = {"memory_features", "memory_ages"}
    assert said == {
        "none": set(), "unmarked": both, "trained so": both, "marked": both | {"memory_masks"}
    }  # fmt: skip


def test_queries_are_spread_and_the_figures_are_those_of_the_answers() -> None:
    student, source = Student(), drawn()
    scores = evaluate_clips(student, source, ["v"], context=3, queries_per_video=2)
    assert student.model.frames == [4, 12]  # the 1st and the 3rd of rows 1 to 5
    everything = np.ones(SIZE, bool)  # what the fake answers left to itself
    for answer in scores.answers:
        truth = source.truth["v"][answer.frame // 4, answer.object_id - 10]
        assert answer.j == region_similarity(everything, truth) and answer.f == boundary_f(everything, truth)
    j, f = np.mean([(a.j, a.f) for a in scores.answers], 0)
    assert scores.summary() == pytest.approx({"j": j, "f": f, "jf": (j + f) / 2, "count": len(scores.answers)})


def test_groups_by_hand() -> None:
    scores = evaluate_clips(Student(), drawn(), ["v"], context=2, queries_per_video=5)
    groups = {(a.frame // 4, a.object_id - 10): set(a.groups) for a in scores.answers}
    # the second is the first's look-alike where both are seen; the star has none, the dot being too small
    assert groups == {
        (1, 0): {"lookalikes"}, (1, 1): {"lookalikes"}, (2, 0): {"unique"}, (2, 2): {"unique"},
        (3, 0): {"lookalikes"}, (3, 1): {"lookalikes", "reappeared"}, (4, 0): {"unique"},
        (4, 2): {"unique", "reappeared"}, (5, 0): {"lookalikes"}, (5, 1): {"lookalikes", "reappeared"},
    }  # fmt: skip


def by_hand(source: VideoSource, context: int, queries: int) -> dict[str, int]:
    counts = dict.fromkeys(("all", "lookalikes", "unique", "occluded", "reappeared"), 0)
    for key in source.keys:
        record = source.record(key)
        said = json.loads(source.path(key).with_name(f"{key}_manual.json").read_text())
        last = len(record.annotated) - 1
        masks = np.stack([source.masks(key, index) for index in record.annotated])
        large = masks.sum((2, 3)) >= LEAST_PIXELS
        for query in [1 + i * last // queries for i in range(queries)]:
            for k, names in enumerate(record.concepts):
                past = large[max(0, query - context) : query, k]
                if not large[query, k] or not past.any():
                    continue
                counts["all"] += 1
                twins = [o for o, other in enumerate(record.concepts) if o != k and other == names and large[query, o]]
                counts["lookalikes" if twins else "unique"] += 1
                counts["occluded"] += said["masklet_visible_share"][query][k] < 0.5
                counts["reappeared"] += not past[-1]
    return counts


def test_groups_of_rendered_videos(tmp_path: Path) -> None:
    style = VideoStyle(frames=60, hides=1.0, leaves=1.0, lookalikes=0.7)
    write_sav(tmp_path, 4, (CANVAS, CANVAS), seed=5, style=style)
    source = SavSource(tmp_path / "train")
    scores = evaluate_clips(Student(), source, source.keys, context=4, queries_per_video=8)
    said = json.loads(json.dumps(scores.to_dict()))
    counts = by_hand(source, 4, 8)
    assert {group: int(figures["count"]) for group, figures in said["groups"].items()} == counts
    assert min(counts.values()) > 0 and said["memory"] == "own"


def test_without_names_or_shares_there_are_fewer_groups() -> None:
    source, student = Drawn(), Student()
    source.add("v", boxes(*[(LEFT, RIGHT)] * 3))
    scores = evaluate_clips(student, source, ["v"], context=2)
    assert set(scores.to_dict()["groups"]) == {"all"} and {a.phrase for a in scores.answers} == {"object"}
    assert scores.summary("occluded") == {}


def test_many_objects_are_asked_about_in_pieces() -> None:
    source, student = Drawn(), Student()
    row = [(x, y, x + 2, y + 2) for x in range(0, 60, 3) for y in (0, 10)]
    source.add("v", boxes(row, row))
    student.model.masks = list(source.truth["v"][1])
    scores = evaluate_clips(student, source, ["v"], context=1)
    assert [len(call["input_ids"]) for call in student.model.calls] == [32, 8] and scores.summary()["jf"] == 1


def test_what_cannot_be_used_is_skipped_and_listed() -> None:
    source, progress = drawn(), list[int]()
    source.add("short", boxes(ROWS[0]))
    source.add("broken", boxes(*ROWS))
    source.broken.add(("broken", 8))
    source.records["gone"] = BadVideo("gone", "its file is missing")
    scores = evaluate_clips(Student(), source, [*source.keys, "gone"], context=2, progress=progress.append)
    assert {a.key for a in scores.answers} == {"v"} and progress == [1] * 4
    reasons = {bad.key: bad.reason for bad in scores.skipped}
    assert set(reasons) == {"short", "broken", "gone"} and "one annotated frame" in reasons["short"]
    with pytest.raises(UserError, match="no object to ask about in 2 videos, 2 skipped, first short: one annotated"):
        evaluate_clips(Student(), source, ["short", "broken"], context=2)


@pytest.mark.parametrize("geometry", ["square", "longest_side"])
def test_without_memory_a_student_answers_as_about_a_still_image(
    geometry: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real one, whose answers ``detections`` brings to the frame."""
    ask = EfficientSam3Model.forward_video

    def centred(*args: object, **given: object) -> EfficientSam3Output:
        """Random masks have one sign everywhere."""
        found = ask(*args, **given)  # type: ignore[arg-type]
        found.pred_masks = found.pred_masks.mean((-2, -1), keepdim=True) - found.pred_masks
        return found

    monkeypatch.setattr(EfficientSam3Model, "forward_video", centred)
    text = {"vocab_size": len(VOCABULARY), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
            "num_attention_heads": 2, "projection_dim": 32}  # fmt: skip
    config = efficient_sam3_config("efficientvit_b0", 126, 32, 2, 64, 1, 1, 5, text)
    config.memory_latents = 8
    student = StudentDetector(EfficientSam3Model(config).eval(), WORDS)
    generator = torch.Generator().manual_seed(0)
    for parameter in student.model.parameters():  # heads that start at zero would answer every question alike
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    write_sav(tmp_path, 1, (40, 56), seed=5, style=VideoStyle(frames=24))
    source = SavSource(tmp_path / "train")
    rules = {"context": 2, "queries_per_video": 2, "geometry": geometry}
    scores = evaluate_clips(student, source, source.keys, memory="none", **rules)
    place = Geometry(126, geometry)  # type: ignore[arg-type]
    for answer in scores.answers:
        (frame,) = source.frames(answer.key, [answer.frame])
        canvas, size = place.canvas(Image.fromarray(frame))
        output = student.answer(ImageBatch.full(canvas[None]), ConceptPrompts.words([answer.phrase], [0]))
        best = detections(output, 0, 0.0, size, (126, 126), (40, 56), most=1).masks[0].numpy()
        truth = source.masks(answer.key, answer.frame)[source.record(answer.key).objects.index(answer.object_id)]
        assert answer.j == pytest.approx(region_similarity(best, truth), abs=1e-3)
    assert 0.02 < scores.summary()["j"] < 1
    told = evaluate_clips(student, source, source.keys, memory="own", **rules)
    assert len(told.answers) == len(scores.answers) and told.summary() != scores.summary()


def test_training_goes_on_and_nonsense_is_refused() -> None:
    student, source = Student(), drawn()
    student.model.train()
    assert isinstance(evaluate_clips(student, source, ["v"], context=1, queries_per_video=1), ClipScores)
    assert student.model.training
    with pytest.raises(ValueError, match="levels must be given with memory='teacher'"):
        evaluate_clips(student, source, ["v"], context=1, memory="teacher")
    with pytest.raises(ValueError, match="at least"):
        evaluate_clips(student, source, ["v"], context=0)
