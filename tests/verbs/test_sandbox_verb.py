"""``sandbox train-teacher``: each teacher's own defaults, and what is printed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from samdistill.cli import main
from samdistill.sandbox.training import TrainedTeacher
from samdistill.verbs import sandbox


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["tracker"], (Path("runs/teacher"), 5000, 8, 1e-3, False, None)),
        (["detector"], (Path("runs/teacher"), 5000, 10, 5e-4, False, None)),
        (
            [
                "detector",
                "--out",
                "a",
                "--steps",
                "7",
                "--batch-size",
                "2",
                "--lr",
                "0.1",
                "--resume",
                "--weights",
                "b",
            ],
            (Path("a"), 7, 2, 0.1, True, Path("b")),
        ),
    ],
)
def test_each_teacher_has_its_own_defaults(
    argv: list[str], expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    def train(*given: Any) -> TrainedTeacher:
        asked.append(given)
        return TrainedTeacher(Path("a/weights"), 250, 3.2, {"cgf1": 0.51234, "box_pmf1": 0.7})

    monkeypatch.setitem(sandbox.TEACHERS, argv[0], replace(sandbox.TEACHERS[argv[0]], train=train))
    assert main(["sandbox", "train-teacher", *argv]) == 0
    assert asked == [expected]
    assert capsys.readouterr().out == "a/weights: 250 steps in 3 s; held out: cgf1 0.5123, box_pmf1 0.7000\n"
