"""Progress where there is no terminal: a line at the end, and no noise."""

from __future__ import annotations

import pytest

from samdistill.progress import Progress


def test_a_log_gets_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("caching", 5, "images") as bar:
        bar.advance(2)
        bar.advance()
        bar.at(5)
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("caching: 5/5 images, ") and said.err.count("\n") == 1


@pytest.mark.parametrize(("enabled", "steps"), [(False, 3), (True, 0)])
def test_nothing_is_said_when_it_is_off_or_nothing_was_done(
    enabled: bool, steps: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("caching", 3, "images", enabled) as bar:
        for _ in range(steps):
            bar.advance()
    assert capsys.readouterr() == ("", "")
