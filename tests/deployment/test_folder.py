"""The exported folder: what it holds, what is refused, and that nothing is delivered before it passed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
import torch
from parts_toy import Toy, eager_target, toy_part
from transformers import AutoProcessor, Sam3ImageProcessor

import samdistill as sd
from samdistill.checkpoints.files import locate
from samdistill.checkpoints.promptable import load_promptable
from samdistill.cli import main
from samdistill.deployment import folder as module
from samdistill.deployment.companions import write_companions
from samdistill.deployment.targets import TARGETS
from samdistill.errors import UserError
from samdistill.students import ConceptProcessor


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> dict[str, type]:
    """Two toy parts in place of the model's, and a target that runs them eagerly. The second can be damaged."""
    parts = [toy_part(name="first"), toy_part(Toy(1), name="second")]
    runs = {"first": parts[0].module, "second": parts[1].module}
    made = eager_target(lambda *given: runs["first"](*given))

    class ByName(made):
        @classmethod
        def open(cls, path: Path):
            name = path.name.removeprefix(".").partition(".")[0]
            return lambda *given: [one.detach().numpy() for one in runs[name](*map(torch.from_numpy, given))]

    monkeypatch.setattr(module, "parts_of", lambda *_: parts)
    monkeypatch.setitem(TARGETS._entries, "toy", ByName)
    return runs


def damage(runs: dict) -> None:
    """The file of the second part computes something else than the model."""
    other = Toy(1)
    with torch.no_grad():
        other.score.bias += 1
    runs["second"] = other


def test_the_folder_has_everything_and_every_checksum(toy, tmp_path: Path) -> None:
    found = sd.export("sandbox-mobile", tmp_path / "out", to="toy", progress=False)
    out = tmp_path / "out"
    names = {"README.md", "config.json", "export.json", "predict.py", "toy"}
    names |= {"preprocessor_config.json", "processor_config.json"}
    assert found.passed and {path.name for path in out.iterdir()} == names
    assert {path.name for path in (out / "toy").iterdir()} == {"first.json", "second.json"}
    record = json.loads((out / "export.json").read_text())
    assert record["format"] == 1 and record["kind"] == "promptable" and record["static"] is False
    listed = {**{row["path"]: row["sha256"] for row in record["files"]}, **record["others"]}
    there = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()} - {"export.json"}
    assert set(listed) == there
    assert all(hashlib.sha256((out / name).read_bytes()).hexdigest() == digest for name, digest in listed.items())
    assert record["canvas"] == {
        "image_size": 126, "geometry": "longest_side", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225],
        "zero_padding": True,
    }  # fmt: skip
    assert record["files"][0]["gate"]["difference"] == 0 and "torch" in record["versions"]
    assert "passed" in (out / "README.md").read_text() and found.table().row_count == 2
    assert json.loads((out / "config.json").read_text())["model_type"] == "sam"


def test_an_earlier_export_is_replaced_as_a_whole(toy, tmp_path: Path) -> None:
    sd.export("sandbox-mobile", tmp_path / "out", to="toy", progress=False)
    (tmp_path / "out" / "toy" / "old.json").write_text("{}")
    sd.export("sandbox-mobile", tmp_path / "out", to="toy", progress=False)
    assert not (tmp_path / "out" / "toy" / "old.json").exists()


def test_what_fails_the_gate_is_not_delivered(toy, tmp_path: Path) -> None:
    damage(toy)
    with pytest.raises(UserError, match=r"toy/second.json did not pass the parity gate .* differ by"):
        sd.export("sandbox-mobile", tmp_path / "out", to="toy", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_file_that_is_kept_says_so_in_its_name(toy, tmp_path: Path, capsys) -> None:
    damage(toy)
    assert main(["export", "sandbox-mobile", "--to", "toy", "--out", str(tmp_path / "out"), "--keep-failed"]) == 1
    assert {path.name for path in (tmp_path / "out" / "toy").iterdir()} == {"first.json", "second.failed.json"}
    rows = json.loads((tmp_path / "out" / "export.json").read_text())["files"]
    assert [row["passed"] for row in rows] == [True, False]
    assert "failed" in capsys.readouterr().out


def test_a_detector_with_a_vocabulary_has_its_list_and_no_tokenizer(toy, tmp_path: Path) -> None:
    sd.export("sandbox-student", tmp_path / "out", to="toy", vocabulary="red circle,star", progress=False)
    words = json.loads((tmp_path / "out" / "vocabulary.json").read_text())
    assert words == {"phrases": ["red circle", "star"], "hidden": ["visual"]}
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert type(AutoProcessor.from_pretrained(tmp_path / "out")) is Sam3ImageProcessor
    sd.export("sandbox-student", tmp_path / "words", to="toy", progress=False)
    assert (tmp_path / "words" / "tokenizer.json").is_file() and not (tmp_path / "words" / "vocabulary.json").exists()
    assert type(AutoProcessor.from_pretrained(tmp_path / "words")) is ConceptProcessor


@pytest.mark.parametrize(("name", "theirs"), [("sandbox-mobile", "SamProcessor"), ("sandbox", "Sam2Processor")])
def test_both_libraries_find_the_processor_of_the_model(name: str, theirs: str, tmp_path: Path) -> None:
    """transformers reads one file, transformers.js the other one, where a tracker has the processor of SAM 2."""
    out = tmp_path / "out"
    out.mkdir()
    write_companions(out, load_promptable(name), None)
    found, source = AutoProcessor.from_pretrained(out), AutoProcessor.from_pretrained(locate(name))
    assert type(found) is type(source) and found.to_dict() == source.to_dict()
    plain = json.loads((out / "preprocessor_config.json").read_text())
    assert plain["processor_class"] == theirs
    assert plain["size"] == ({"longest_edge": 126} if theirs == "SamProcessor" else {"height": 126, "width": 126})


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["none"], "none: "),
        (["sandbox-mobile", "--to", "onxx"], "no export target is called 'onxx'; did you mean 'onnx'?"),
        (["sandbox-mobile", "--vocabulary", "star"], "a promptable model takes points and boxes"),
        (["sandbox-student", "--vocabulary", ""], "--vocabulary: no phrase given"),
        (["sandbox-student", "--vocabulary", "star,star"], "'star' is given twice"),
        (["sandbox-mobile", "--image-size", "-1"], "--image-size -1: give a side of 1 to 16384 px"),
        (["sandbox", "--image-size", "0"], "--image-size 0: give a side of 1 to 16384 px"),
        (["sandbox-student", "--image-size", "16385"], "leave it out for the model's own"),
        (["sandbox-mobile", "--image-size", "127"], "image_size 127 is not a multiple of patch_size 14"),
        (["sandbox-sam", "--image-size", "140"], "cannot read images of 140 px"),
        (["sandbox-mobile", "--precision", "int8"], "give --calibrate"),
        (["sandbox-mobile", "--precision", "int4"], "'int4' is unknown"),
        (["sandbox-mobile", "--calibrate", "."], "only --precision int8 has a use for it"),
        (["sandbox-mobile", "--precision", "int8", "--calibrate", "EMPTY"], "no images"),
        (["sandbox-mobile", "--out", "FULL"], "holds something else than an export"),
        (["sandbox-mobile", "--out", "FILE"], "is a file; give a folder"),
        (["EXPORTED"], "is an exported folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments: list[str], complaint: str, tmp_path: Path, capsys) -> None:
    for name in ("FULL", "EMPTY", "EXPORTED"):
        (tmp_path / name).mkdir()
    for name in ("FILE", "FULL/notes.txt", "EXPORTED/export.json"):
        (tmp_path / name).write_text("{}")
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    given = [str(tmp_path / a) if a.isupper() and (tmp_path / a).exists() else a for a in arguments]
    assert main(["export", *given, *out]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and complaint in error
    assert not (tmp_path / "out").exists() and len(list((tmp_path / "FULL").iterdir())) == 1


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(TARGETS.get("onnx"), "needs", ("onnx", "not_there"))
    with pytest.raises(UserError, match=r"needs not_there, .* pip install 'samdistill\[onnx\]'"):
        sd.export("sandbox-mobile", tmp_path / "out", progress=False)


def test_a_part_says_its_dynamic_axes() -> None:
    part = toy_part()
    assert part.axes == ("batch", "prompts")
    assert dataclasses.replace(part, inputs=part.inputs[:1]).axes == ("batch",)
