"""``tools/sandbox/train.py``: each teacher's own defaults, what is printed, and errors in one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import train
from prompt_training import TrainedTeacher


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["tracker"], (Path("runs/teacher"), 5000, 8, 1e-3, None)),
        (["detector"], (Path("runs/teacher"), 5000, 10, 5e-4, None)),
        (
            ["detector", "--out", "a", "--steps", "7", "--batch-size", "2", "--lr", "0.1", "--weights", "b"],
            (Path("a"), 7, 2, 0.1, Path("b")),
        ),
    ],
)
def test_each_teacher_has_its_own_defaults(
    argv: list[str], expected: tuple[Any, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    asked = []

    def trained(*given: Any) -> TrainedTeacher:
        asked.append(given)
        return TrainedTeacher(Path("a/weights"), 250, 3.2, {"cgf1": 0.51234, "box_pmf1": 0.7})

    monkeypatch.chdir(tmp_path)  # the lock makes the run folder
    monkeypatch.setitem(train.TEACHERS, argv[0], replace(train.TEACHERS[argv[0]], train=trained))
    assert train.main(argv) == 0
    assert asked == [expected]
    assert capsys.readouterr().out == "a/weights: 250 steps in 3 s; held out: cgf1 0.5123, box_pmf1 0.7000\n"


def test_an_error_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["traker"]) == 2
    out, error = capsys.readouterr()
    assert out == "" and error == "train.py: no sandbox teacher is called 'traker'; did you mean 'tracker'?\n"
