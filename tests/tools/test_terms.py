"""The tables of loss terms in the documentation: current, complete, and from terms that describe themselves."""

from __future__ import annotations

import re
from typing import Any

import pytest

import pages
import terms
from samdistill.jobs.detection.config import DetectionLossConfig
from samdistill.jobs.encoder.config import EncoderLossConfig
from samdistill.jobs.prompt.config import DistillationConfig, PromptLossConfig
from samdistill.jobs.text.config import TextLossConfig
from samdistill.jobs.video.config import VideoLossConfig
from samdistill.registry import TermTable

BLOCKS = {
    "encoder": EncoderLossConfig, "detection": DetectionLossConfig, "prompt, task": PromptLossConfig,
    "video": VideoLossConfig, "text": TextLossConfig,
}  # fmt: skip


def test_the_pages_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert terms.main(["--check"]) == 0, "run python tools/terms.py"
    assert "current" in capsys.readouterr().out


def shown() -> dict[str, dict[str, float]]:
    """Term and weight of every row, by the name of its table."""
    text = "\n".join(path.read_text() for path in sorted((pages.ROOT / "docs").glob("*.md")))
    tables = re.findall(r"^<!-- terms of ([^:]+): [^\n]+ -->\n(.*?)^<!-- end of terms -->", text, re.M | re.S)
    assert len(tables) == len(terms.TABLES)
    return {
        name: {t: float(w) for t, w in re.findall(r"^\| `(\w+)` \|.+\| (\S+) \|$", rows, re.M)} for name, rows in tables
    }


def test_the_pages_show_the_defaults_of_the_configuration() -> None:
    found = shown()
    for name, block in BLOCKS.items():
        weights: Any = block().model_dump()
        assert found[name] == {term: weights[term] for table in block.TABLES for term in table.weights}
    signals = ("encoder_patch", "prompt_embed", "decoder_mask_token", "dense_mask_logits")
    assert found["prompt, distillation"] == {name: getattr(DistillationConfig(), name).weight for name in signals}


def test_a_table_is_written_from_the_docstring_and_other_text_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    table = TermTable("term")

    @table.term("area", 0.25)
    def area(ours: float, theirs: float) -> float:
        """Areas of two
        masks: ``p`` - t.

        More.
        """
        return ours - theirs

    monkeypatch.setitem(terms.TABLES, "areas", (table,))
    text = "before\n<!-- terms of areas: written by tools/terms.py -->\nold\n<!-- end of terms -->\nafter\n"
    found = terms.page(text)
    assert "| `area` | Areas of two masks | `p` - t | 0.25 |\n<!-- end of terms -->\nafter\n" in found
    assert found.startswith("before\n") and "old" not in found and terms.page(found) == found
    with pytest.raises(SystemExit, match="are not there"):
        terms.page(text.replace("end of", "end"))
    area.__doc__ = "Areas."
    with pytest.raises(SystemExit, match="area: its docstring has to begin with"):
        terms.page(text)
