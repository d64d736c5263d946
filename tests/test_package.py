"""The face of the package: quick to import, complete, and known to transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import samdistill
from samdistill.students import StudentTrunk, StudentTrunkConfig


def run(code: str, *argv: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_it_imports_nothing_but_the_standard_library() -> None:
    code = """
import json, sys
before = set(sys.modules)
import samdistill
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""
    assert set(json.loads(run(code))) - sys.stdlib_module_names == {"samdistill"}


def test_help_does_not_wait_for_the_model_libraries() -> None:
    code = """
import sys
from samdistill.cli import main
try:
    main(["--help"])
except SystemExit as leave:
    assert leave.code == 0
assert not {"transformers", "timm", "accelerate"} & set(sys.modules)
"""
    assert "VERB" in run(code)


def test_the_engine_does_not_wait_for_transformers() -> None:
    """A launcher and its ranks import it before anything else; a task imports what its models need."""
    run("import sys, samdistill.engine; assert not {'transformers', 'timm'} & set(sys.modules)")


@pytest.mark.parametrize("name", samdistill.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(samdistill, name) is not None


def test_no_public_name_is_also_a_room() -> None:
    """Importing a room binds its name in the package: a verb of that name would turn into the module."""
    root = Path(samdistill.__file__).parent
    rooms = {path.stem for path in root.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file()}
    assert {"evaluation", "store", "config"} <= rooms
    assert not rooms & set(samdistill.__all__)


def test_the_package_stays_small_enough_to_install_with_pip() -> None:
    """docs/development.md states the size of the wheel, which compresses little: most of it is weights."""
    files = [path for path in Path(samdistill.__file__).parent.rglob("*") if "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files if path.is_file()) < 40e6


def test_every_verb_is_a_function_and_other_names_are_refused() -> None:
    verbs = {"demo", "list_models", "run", "plan", "check", "cache", "train", "merge", "inspect", "evaluate"}
    assert verbs | {"prepare_sa1b", "render_sandbox"} <= set(samdistill.__all__)
    assert all(callable(getattr(samdistill, verb)) for verb in verbs)
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = samdistill.distil


@pytest.mark.parametrize("first", ["samdistill", "transformers"])
def test_transformers_opens_a_student_in_a_fresh_process(first: str, tmp_path: Path) -> None:
    """Whichever of the two is imported first."""
    torch.manual_seed(0)
    student = StudentTrunk(StudentTrunkConfig(backbone="es_ev_s", hidden_size=16, image_size=56)).eval()
    student.save_pretrained(tmp_path / "student")
    pixels = torch.rand(1, 3, 56, 56)
    torch.save(pixels, tmp_path / "pixels.pt")
    second = {"samdistill": "transformers", "transformers": "samdistill"}[first]
    code = f"""
import sys
import {first}
{"assert 'torch' not in sys.modules" if first == "samdistill" else "transformers.AutoModel"}
import {second}
import torch
from transformers import AutoConfig, AutoModel
model, found = AutoModel.from_pretrained(sys.argv[1] + "/student", output_loading_info=True)
assert not any(found.values()), found
assert type(model).__name__ == "StudentTrunk" and not model.training
print(AutoConfig.from_pretrained(sys.argv[1] + "/student").backbone)
torch.set_num_threads({torch.get_num_threads()})
with torch.no_grad():
    torch.save(model(pixel_values=torch.load(sys.argv[1] + "/pixels.pt")).last_hidden_state, sys.argv[1] + "/out.pt")
"""
    assert run(code, str(tmp_path)).strip() == student.config.backbone
    with torch.no_grad():
        expected = student(pixel_values=pixels).last_hidden_state
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected)
