"""The report page: self-contained, escaped, complete, and silent about what was not measured."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from samdistill.data.skipped import BadInput
from samdistill.engine.check import TermReport
from samdistill.evaluation.concept_result import ConceptResult
from samdistill.evaluation.pictures import GROUND_TRUTH, picture
from samdistill.evaluation.result import Conditions, EvaluationResult, Panel, Picture
from samdistill.evaluation.rows import ConceptRow, ModelRow
from samdistill.inference.drawing import draw_instances
from samdistill.inference.prompting import Targets
from samdistill.ops.masks import masks_to_boxes
from samdistill.report import CacheFacts, MergeGroup, ReportData, describe_machine, headline, tiles, write_report
from samdistill.report_figures import curves
from samdistill.sandbox.scenes import render_scenes

HOSTILE = "<script>alert('x')</script> & $x_1$ \"q\""


def fake_pictures(count: int):
    """Rendered scenes whose "models" answer with shifted ground truth."""
    if not count:
        return
    scenes = render_scenes(range(count), 126, seed=5)
    targets = Targets.of(scenes.masks, scenes.valid)
    for index in range(count):
        one = targets.one_image(index, 8)
        found = {n: one.masks.roll(s, -1) for n, s in (("teacher", 2), ("untrained", 40), ("distilled", 3))}
        kind = ("box", "point", "refine")[index % 3]
        yield picture(f"sa_{index}", scenes.images[index], (126, 126), kind, one, found, None)


def fake_evaluation(labelled: bool = True, pictures: int = 3) -> EvaluationResult:
    teacher = ModelRow("teacher", 2_798_016, 4_249_505, 0.4785, 24.99,
                       miou={"box": 0.752, "point": 0.621, "refine": 0.699} if labelled else {})  # fmt: skip
    distilled = ModelRow(
        "distilled", 931_000, 2_382_489, 0.1242, 8.113, "trunk", 0.9312, 0.0871,
        {"box": 0.711, "point": 0.571, "refine": 0.652} if labelled else {},
        {"box": 0.861, "point": 0.802, "refine": 0.811},
        {"box": 0.711 / 0.752, "point": 0.571 / 0.621, "refine": 0.652 / 0.699} if labelled else {},
    )  # fmt: skip
    untrained = dataclasses.replace(
        distilled, name="untrained", cosine=0.0121, mse=1.92, agreement={"box": 0.12, "point": 0.11, "refine": 0.13},
        miou={"box": 0.121, "point": 0.10, "refine": 0.11} if labelled else {},
        kept={"box": 0.121 / 0.752, "point": 0.1 / 0.621, "refine": 0.11 / 0.699} if labelled else {},
    )  # fmt: skip
    return EvaluationResult(
        (teacher, untrained, distilled), "teacher", ("box", "point", "refine"), labelled, 64, 211, 3,
        Conditions("cpu", 2, 9, 126), (BadInput("sa_17", "not a readable image: truncated"),),
        tuple(fake_pictures(pictures)),
    )  # fmt: skip


def fake_answers(phrase: str = "red ring"):
    """A question for what is there, which the untrained student does not find, and one for what is not."""
    scene = render_scenes(range(1), 126, seed=5)
    image, masks = scene.images[0].permute(1, 2, 0).numpy(), scene.masks[0][scene.valid[0]][:2]
    drawn = draw_instances(image, masks, masks_to_boxes(masks), ["0.93", "0.71"])
    there = {GROUND_TRUTH: 2, "teacher": 2, "untrained": 0, "distilled": 2}
    absent = {GROUND_TRUTH: 0, "teacher": 0, "untrained": 2, "distilled": 0}
    for text, counts in ((phrase, there), ("wooden chair", absent)):
        panels = [Panel(name, drawn if n else image, found=n) for name, n in counts.items()]
        yield Picture("images/7.jpg", text, GROUND_TRUTH, (Panel("image", image), *panels))


def fake_concepts(**changes) -> ConceptResult:
    teacher = ConceptRow("teacher", 0.602, 0.68, 0.885, 0.79, 0.7, 0.55, 9_840_000, 164.0)
    untrained = ConceptRow("untrained", -0.004, 0.02, -0.2, 0.03, 0.01, 0.001, 2_400_000, 82.0, -0.004 / 0.602)
    distilled = ConceptRow("distilled", 0.561, 0.649, 0.864, 0.76, 0.66, 0.512, 2_400_000, 82.0, 0.561 / 0.602)
    result = ConceptResult(
        (teacher, untrained, distilled), "teacher", 0.5, 40, 160, 110, Conditions("cpu", 1, 9, 126),
        (BadInput("images/9.jpg", "not a readable image: truncated"),), tuple(fake_answers()), {}, {},
    )  # fmt: skip
    return dataclasses.replace(result, **changes)


def fake_phases(steps: int = 200) -> list[dict]:
    """Two phases of a detector: "features" trains in the first alone. Validated after every fourth."""
    rng, lines = np.random.default_rng(0), []
    for step in range(1, steps + 1):
        fall = math.exp(-step / 60)
        terms = {"mask": 0.1 + fall, "logit": 0.02 + 0.3 * fall} | (
            {"features": 0.5 * fall} if 2 * step <= steps else {}
        )
        terms = {name: value * (1 + 0.1 * rng.standard_normal()) for name, value in terms.items()}
        weights = {name: 20.0 if name == "mask" else 1.0 for name in terms}
        total = sum(terms[name] * weights[name] for name in terms)
        lines.append({"step": step, "epoch": 1, "terms": terms, "weights": weights, "total": total, "lr": 1e-4 * fall})
        if step % (steps // 4) == 0:
            kept = {name: 1.1 * value for name, value in terms.items()}
            lines.append({"step": step, "epoch": 1, "validate": {**kept, "total": 1.1 * total}})
    return lines


def fake_history(steps: int = 400) -> list[dict]:
    rng, lines = np.random.default_rng(0), []
    for step in range(1, steps, 2):
        fall = math.exp(-step / 90)
        noise = 1 + 0.08 * rng.standard_normal(2)
        terms = {"mse": (5 + 190 * fall) * noise[0], "cosine": (0.07 + 0.9 * fall) * noise[1]}
        line = {"step": step, "epoch": 1 + step // 40, "terms": terms, "weights": {"mse": 1.0, "cosine": 1.0}}
        lines.append(line | {"total": sum(terms.values()), "lr": 1e-3 * min(step / 40, (steps - step) / steps)})
    return lines


def fake_data(**changes) -> ReportData:
    data = ReportData(
        title="es_ev_s distilled from the sandbox teacher",
        student="distilled",
        start="untrained",
        evaluation=fake_evaluation(),
        history=fake_history(),
        check=(TermReport("mse", 182.3, 1.0, 41.7), TermReport("cosine", 0.991, 1.0, 0.213)),
        cache=CacheFacts(2000, "pca64-int8", 5700, 31108, 41.2),
        merge=(MergeGroup("kept", 212, 1_451_489), MergeGroup("replaced", 190, 931_000),
               MergeGroup("removed", 98, 2_798_016)),
        merged="runs/demo/merged",
        skipped={"cache": (BadInput("sa_3", "no image beside sa_3.json"),), "train": ()},
        seconds={"render": 9.1, "cache": 41.2, "train": 151.0, "merge": 0.8, "evaluate": 22.5},
        config="job: encoder\nteacher:\n  kind: sam3\n  path: sandbox\nstudent:\n  backbone: es_ev_s\n",
        machine=describe_machine(),
        date="2026-11-21 08:00",
    )  # fmt: skip
    return dataclasses.replace(data, **changes)


class Page(HTMLParser):
    """Balanced tags, visible text, and every attribute that could load something."""

    VOID = ("meta", "img", "br", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "data", "action")]

    def handle_startendtag(self, tag, attrs) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text += data


def write(tmp_path: Path, data: ReportData) -> tuple[str, Page]:
    text = write_report(tmp_path / "deep" / "report.html", data).read_text()
    return text, Page(text)


def test_loads_nothing_from_elsewhere(tmp_path):
    text, page = write(tmp_path, fake_data())
    assert page.links
    assert all(link.startswith(("data:image/jpeg;base64,", "#")) for link in page.links)
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    assert not {"script", "link", "iframe"} & set(page.tags)


def test_shows_every_part(tmp_path):
    _, page = write(tmp_path, fake_data())
    words = (
        "keeps 94.5% of the teacher's mIoU", "3.0 times smaller", "3.1 times faster", "0.9312", "mse", "learning rate",
        "41.7", "pca64-int8", "1/5.5 of fp16", "5,700 bytes", "212 keys", "2.80 M", "sa_3: no image", "sa_17: not a",
        "backbone: es_ev_s", "2 min 31 s", version("torch"), "2026-11-21", "ground truth", "9 runs", "2 threads",
    )  # fmt: skip
    assert [word for word in words if word not in page.text] == []
    assert page.tags.count("svg") == 3
    assert page.tags.count("img") == 3 * 5


def test_escapes_what_users_name(tmp_path):
    plain = fake_evaluation(pictures=1)
    rows = tuple(dataclasses.replace(row, name=HOSTILE + row.name) for row in plain.rows)
    shown = tuple(
        dataclasses.replace(p, key=HOSTILE, panels=tuple(dataclasses.replace(q, title=HOSTILE) for q in p.panels))
        for p in plain.pictures
    )
    history = [line | {"terms": {HOSTILE: line["terms"]["mse"]}} for line in fake_history(60)]
    data = fake_data(
        title=HOSTILE, student=HOSTILE + "distilled", config=HOSTILE, history=history, machine={HOSTILE: HOSTILE},
        date=HOSTILE, check=(TermReport(HOSTILE, 1.0, 1.0, 1.0),), merge=(MergeGroup(HOSTILE, 1, 1),), merged=HOSTILE,
        skipped={HOSTILE: (BadInput(HOSTILE, HOSTILE),)}, seconds={HOSTILE: 1.0},
        evaluation=dataclasses.replace(plain, rows=rows, pictures=shown, teacher=HOSTILE + "teacher"),
    )  # fmt: skip
    text, page = write(tmp_path, data)
    assert "script" not in page.tags and "<script" not in text
    assert page.text.count(HOSTILE) > 12


def test_leaves_out_what_was_not_measured(tmp_path):
    text, page = write(tmp_path, ReportData("bare", "distilled"))
    assert "h2" not in page.tags and "None" not in text and "nan" not in page.text
    _, unlabelled = write(tmp_path, fake_data(evaluation=fake_evaluation(labelled=False, pictures=0)))
    assert "ground truth" not in unlabelled.text
    assert "agree with the teacher's at an IoU of 0.861 with a box prompt; untrained, at 0.120" in unlabelled.text
    assert "Masks side by side" not in unlabelled.text


def test_says_so_when_the_student_is_larger_and_slower():
    base = fake_evaluation(pictures=0)
    rows = (*base.rows[:2], dataclasses.replace(base.rows[2], trunk_parameters=2 * 2_798_016, latency_ms=24.99))
    said = headline(fake_data(evaluation=dataclasses.replace(base, rows=rows)))
    assert "Its trunk is 2.0 times larger and its vision encoder as fast as the teacher's." in said


def test_tiles_hold_the_student_and_what_it_is_compared_with():
    shown = {tile.label: tile for tile in tiles(fake_data())}
    assert shown["of the teacher's mIoU, point"].value == f"{0.571 / 0.621:.1%}"
    assert shown["of the teacher's mIoU, point"].note == f"untrained {0.1 / 0.621:.1%}"
    assert shown["encoder latency"] == ("encoder latency", "8.11 ms", "teacher 25 ms")


def test_a_page_of_concepts_speaks_its_own_words(tmp_path):
    phrase = HOSTILE + " on the left" * 40
    data = fake_data(evaluation=fake_concepts(pictures=tuple(fake_answers(phrase))), cache=None)
    _, page = write(tmp_path, data)
    words = (
        "keeps 93.2% of the teacher's cgF1 (0.561 of 0.602)", "4.1 times fewer parameters", "2.0 times faster",
        "160 questions about 40 images", "IL_MCC", "F1 at IoU 0.75", "images/9.jpg: not a", f"prompt: {phrase}",
        "ground truth: 2 there", "distilled: 2 found", "ground truth: nothing there", "distilled: nothing found",
    )  # fmt: skip
    assert [word for word in words if word not in page.text] == []
    assert page.text.count("nothing found") == 3 and page.text.count("nothing there") == 1
    assert "script" not in page.tags
    assert [word for word in ("mIoU", "one click", "trunk", "IoU against", "same prompts") if word in page.text] == []


def test_the_check_is_told_by_phase_where_there_are_phases(tmp_path):
    rows = [(name, phase) for phase in ("align", "finish") for name in ("mask", "logit")]
    check = tuple(TermReport(name, 1.0, 1.0, 2.0, phase) for name, phase in rows)
    _, page = write(tmp_path, ReportData("phases", "distilled", check=check))
    assert page.text.split().count("align") == page.text.split().count("finish") == 1
    assert page.text.index("align") < page.text.index("mask") < page.text.index("finish") < page.text.rindex("mask")
    assert "of each phase" in page.text
    plain, _ = write(tmp_path, fake_data())
    assert "of each phase" not in plain and plain.count('class="group"') == len(
        {measure.group for measure in fake_evaluation().measures()}
    )


def line_of(svg: str) -> np.ndarray:
    """The points of a chart's own line, its thickest."""
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke-width: 1\.8', svg)
    return np.array(re.findall(r"[ML] ([\d.-]+) ([\d.-]+)", path), dtype=float)


def test_charts_of_all_phases_share_their_steps():
    drawn = {curve.name: curve for curve in curves(fake_phases())}
    assert list(drawn) == ["mask (weight 20)", "logit", "features", "total", "learning rate"]
    ticks = {tuple(re.findall(r"<text[^>]*>(\d+)</text>", re.split(r'id="[\w.]*axis_2"', curve.svg)[0]))
             for curve in drawn.values()}  # fmt: skip
    assert len(ticks) == 1
    whole, half = (line_of(drawn[name].svg)[:, 0] for name in ("logit", "features"))
    assert np.ptp(half) / np.ptp(whole) == pytest.approx(0.5, abs=0.03)  # the axes' labels may differ in width


def test_validation_stands_in_the_chart_of_its_term():
    lines = fake_phases()
    drawn = {curve.name: curve for curve in curves(lines)}
    last = next(line["validate"] for line in reversed(lines) if "validate" in line)
    assert drawn["logit"].validated == last["logit"] and drawn["total"].validated == last["total"]
    early = [line["validate"]["features"] for line in lines if "features" in line.get("validate", {})]
    assert drawn["features"].validated == early[-1] and drawn["learning rate"].validated is None
    bare = {curve.name: curve for curve in curves([line for line in lines if "terms" in line])}
    assert "total" not in bare and bare["logit"].validated is None
    assert drawn["logit"].svg.count("<use") == bare["logit"].svg.count("<use") + 4  # a point for each validation


def test_a_term_that_rests_has_a_gap():
    lines = [{"step": s, "terms": {"a": 1.0} | ({} if 40 <= s < 60 else {"b": float(s)})} for s in range(1, 100)]
    b = next(curve for curve in curves(lines) if curve.name == "b")
    (path,) = re.findall(r'<path d="([^"]*)"[^>]*stroke-width: 1\.8', b.svg)
    assert path.count("M") == 2


def test_curves_leave_gaps_for_what_was_not_finite_and_name_weights():
    lines = [{"step": s, "terms": {"mse": None if s == 3 else 2.0}, "weights": {"mse": 0.5}} for s in range(1, 30)]
    (curve,) = curves([*lines, {"step": 29, "validate": {"cosine": 0.5}}])  # one validation is no curve
    assert curve.name == "mse (weight 0.5)" and curve.last == pytest.approx(2.0)
    assert "NaN" not in curve.svg and curve.svg.startswith("<svg")


def test_smoothing_is_a_centred_mean():
    lines = [{"step": s, "terms": {"x": float(s)}} for s in range(1, 121)]
    (curve,) = curves(lines)
    assert curve.last == pytest.approx(np.mean([117, 118, 119, 120]))  # a 40th of 120 values on either side
