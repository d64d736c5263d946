"""A test skips for a listed reason or fails."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Any:
    """The conftest's own function: pytest imports that file under a name of its choice."""
    return next(p for p in request.config.pluginmanager.get_plugins() if hasattr(p, "MAY_SKIP")).unlisted_skips_fail


def skipped(kind: type, reason: str) -> Any:
    where = {"nodeid": "a", "outcome": "skipped", "longrepr": ("a.py", 1, f"Skipped: {reason}")}
    return kind(**where, result=[]) if kind is pytest.CollectReport else kind(
        **where, location=("a.py", 1, "a"), keywords={}, when="call"
    )  # fmt: skip


@pytest.mark.parametrize("kind", [pytest.TestReport, pytest.CollectReport])
@pytest.mark.parametrize(("reason", "outcome"), [("no real SA-V sample at /a", "skipped"), ("no GPU", "failed")])
def test_an_unlisted_reason_fails(judge: Any, kind: type, reason: str, outcome: str) -> None:
    report = judge(skipped(kind, reason))
    assert report.outcome == outcome and ("not among the reasons" in str(report.longrepr)) is (outcome == "failed")
    passed = skipped(kind, reason)
    passed.outcome = "passed"
    assert judge(passed).outcome == "passed"
