"""One small rendered world and what was made of it, for every test that needs images, a teacher and a cache."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import pytest

from samdistill.jobs.encoder.config import EncoderRunConfig
from samdistill.jobs.loading import load_config

sys.path.insert(0, str(Path(__file__).parent / "jobs"))  # for the small runs of every job, which many tests share
sys.path.insert(0, str(Path(__file__).parent / "checkpoints"))  # for original_names and small_sams

from tiny_detection import detection, detector, hosted, lite, scenes, tracker, words_run  # noqa: F401
from tiny_jobs import tiny_job  # noqa: F401
from tiny_prompt import prompted, sams  # noqa: F401
from tiny_text import text  # noqa: F401
from tiny_video import films, image_student, video  # noqa: F401

if TYPE_CHECKING:
    from torch import Tensor

Recipe = Callable[..., EncoderRunConfig]
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)

MAY_SKIP = (
    r"(openvino|executorch|coremltools|litert_torch) is not installed$",  # too large for the tests' environment
    r"no real .* sample at ",  # ../shared/data is not part of the repository; the same code is tested on drawn data
    r"no mount namespace|no tmpfs here",  # a disk that is really full; an error of the system call is tested anywhere
    r"such names cannot exist on Windows",
    r"counts threads where the system lists them|looks at /proc|no /dev/full here",  # of Linux
)
"""All reasons for which a test may skip. None of them leaves a path of the package untested."""


def unlisted_skips_fail(report: Report) -> Report:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if not any(re.search(listed, reason) for listed in MAY_SKIP):
            report.outcome = "failed"
            report.longrepr = f"{reason}: not among the reasons to skip that tests/conftest.py lists"
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return unlisted_skips_fail((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return unlisted_skips_fail((yield))


@pytest.fixture(scope="session", autouse=True)
def sigint_is_heeded() -> Iterator[None]:
    """Tests and the processes they start get SIGINT, also where the suite itself was started to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def near() -> Callable[[Tensor, Tensor], None]:
    """near(found, wanted) asserts that they differ by at most 1e-5 of the largest value wanted.

    For one computation by two instances of a model. One read from a file has its weights at other addresses, and
    vectorised kernels may then sum in another order: the last bits differ, on some processors alone.
    """
    from torch.testing import assert_close

    def check(found: Tensor, wanted: Tensor) -> None:
        assert wanted.abs().max() > 0, "nothing to compare"
        assert_close(found, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())

    return check


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 8 held-out scenes as an SA-1B tree. Read only: copy it before you change it."""
    from samdistill.sandbox.render import render_sandbox

    root = tmp_path_factory.mktemp("world")
    render_sandbox(root, train=24, val=8, size=140, progress=False)
    return root


@pytest.fixture(scope="session")
def recipe(world: Path) -> Recipe:
    """recipe(output, *overrides): ``encoder/sandbox`` on the world, small."""

    def make(output: Path, *overrides: str) -> EncoderRunConfig:
        small = [
            f"output={output}", f"data.root={world}", "data.workers=0", "cache.batch_size=4", "train.batch_size=8",
            "train.epochs=2", "evaluate.images=8",
        ]  # fmt: skip
        return load_config("encoder/sandbox", [*small, *overrides])

    return make


@pytest.fixture(scope="session")
def cached(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> EncoderRunConfig:
    """A run whose cache is complete: 24 records as fp16. Read only."""
    from samdistill.pipeline import cache

    config = recipe(tmp_path_factory.mktemp("cached"))
    cache(config, device="cpu", progress=False)
    return config
