"""What is left out: each input once, on the console, in the run's list and in its log, wherever it was found."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from samdistill.data import BadInput, leave_out, reporting
from samdistill.data.skipped import SHOWN, read_skipped


@pytest.fixture
def console(caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.WARNING, "samdistill")
    return lambda: [record.getMessage() for record in caplog.records]


def inputs(count: int) -> list[BadInput]:
    return [BadInput(f"k{number}", f"reason {number}") for number in range(count)]


def keys(folder: Path, name: str = "skipped.jsonl") -> list[tuple[str, str]]:
    return [(line["stage"], line["key"]) for line in read_skipped(folder / name)]


def test_each_input_is_named_listed_and_logged_once(tmp_path: Path, console) -> None:
    run = tmp_path / "new" / "run"
    with reporting("cache", run):
        leave_out(inputs(2))
        leave_out(inputs(3))
    assert console() == [
        *(f"left out: k{n}: reason {n}" for n in range(3)),
        f"cache: 3 inputs are left out; all are listed in {run / 'skipped.jsonl'}",
    ]
    assert read_skipped(run / "skipped.jsonl")[2] == {"stage": "cache", "key": "k2", "reason": "reason 2"}
    lines = (run / "log_rank0.txt").read_text().splitlines()
    assert [line.partition("WARNING ")[2] for line in lines] == [f"cache: left out: k{n}: reason {n}" for n in range(3)]


def test_many_are_counted_on_the_console_and_all_listed(tmp_path: Path, console) -> None:
    with reporting("train", tmp_path):
        leave_out(inputs(SHOWN + 30))
    assert len(console()) == SHOWN + 1 and console()[-1].startswith(f"train: {SHOWN + 30} inputs are left out")
    assert len(keys(tmp_path)) == SHOWN + 30
    assert len((tmp_path / "log_rank0.txt").read_text().splitlines()) == SHOWN + 30


def test_a_verb_replaces_its_own_list_and_a_resumed_one_goes_on(tmp_path: Path, console) -> None:
    a, b, c = inputs(3)
    with reporting("cache", tmp_path):
        leave_out([a])
    with reporting("train", tmp_path):
        leave_out([b])
    with reporting("train", tmp_path, resume=True):
        leave_out([c])
    assert keys(tmp_path) == [("cache", "k0"), ("train", "k1"), ("train", "k2")]
    with pytest.raises(ValueError), reporting("cache", tmp_path):
        raise ValueError("refused at once")
    assert ("cache", "k0") in keys(tmp_path)
    with reporting("cache", tmp_path):  # mended since
        pass
    assert keys(tmp_path) == [("train", "k1"), ("train", "k2")]


def test_a_verb_inside_another_one_reports_to_it(tmp_path: Path, console) -> None:
    with reporting("check") as outer:
        with reporting("cache", tmp_path):
            leave_out(inputs(1))
        assert list(outer.found) == inputs(1)
    assert list(tmp_path.iterdir()) == [] and console() == ["left out: k0: reason 0"]


def test_of_several_processes_the_first_names_what_all_find(tmp_path: Path, console, monkeypatch) -> None:
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        with reporting("train", tmp_path, rank):
            leave_out(inputs(1), seen_by_all=True)
            leave_out([BadInput(f"own{rank}", "torn")])
    assert keys(tmp_path) == [("train", "k0"), ("train", "own0")]
    assert keys(tmp_path, "skipped-rank1.jsonl") == [("train", "own1")]


def test_without_a_verb_it_is_a_warning(console) -> None:
    leave_out(inputs(1))
    assert console() == ["left out: k0: reason 0"]


def test_a_torn_line_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "skipped.jsonl").write_bytes(b'{"stage": "cache", "key": "a", "reason": "b"}\n[1]\n{"stage": "ca')
    assert keys(tmp_path) == [("cache", "a")]
