"""A part of the campaign that ``benchmarks/reliability.py`` runs: damaged input ends in success or in one line."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import material
from campaign import Campaign, Outcome
from mutations import Canary
from targets import TARGETS

CASES = 3 * (len(TARGETS) + 2)
"""Each kind of input three times. A number of cases and no time limit: a busy machine tries as much as an idle one."""
SEED = 7


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> Campaign:
    root = tmp_path_factory.mktemp("fuzz")
    (root / "material").mkdir()
    material.make(root / "material")
    return Campaign(root / "material", root / "work", SEED)


def outcomes(campaign: Campaign) -> Iterator[Outcome]:
    for number in range(CASES):
        yield campaign.case(number)


def test_damaged_input_ends_in_success_or_one_line(campaign: Campaign) -> None:
    found = list(outcomes(campaign))
    assert {outcome.number: (outcome.command, outcome.fault) for outcome in found if outcome.fault} == {}
    refused = sum(outcome.status == 2 for outcome in found)
    assert CASES // 4 < refused < CASES  # damage is met, and not everything is refused


def test_the_campaign_sees_what_it_looks_for(campaign: Campaign, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that fails in each of the ways that count is found out."""
    import pickle
    import subprocess
    import time

    def escaping(words: list[str]) -> int:
        Path("../../../outside/escaped").touch()
        return 0

    def executing(words: list[str]) -> int:
        pickle.loads(pickle.dumps(Canary(campaign.canary.path)))
        return 0

    def starting(words: list[str]) -> int:
        return subprocess.run(["true"]).returncode

    def silent(words: list[str]) -> int:
        return 2

    def failing(words: list[str]) -> int:
        raise KeyError("x")

    def hanging(words: list[str]) -> int:
        try:
            time.sleep(60)
        except Exception:
            return 0
        return 0

    expected = {
        escaping: "writes outside", executing: "executes code", starting: "starts a process",
        silent: "without its line", failing: "traceback", hanging: "hang",
    }  # fmt: skip
    monkeypatch.setattr("campaign.LIMIT_S", 1.0)
    for command, words in expected.items():
        monkeypatch.setattr("campaign.main", command)
        assert words in (campaign.case(0).fault or ""), words
