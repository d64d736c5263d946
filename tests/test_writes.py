"""``io.py`` alone opens files for writing: every other file is read for calls that do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "samdistill"
METHODS = {"write_text", "write_bytes", "rename", "touch", "unlink", "rmdir", "mkdir", "symlink_to", "hardlink_to"}
"""Of paths."""
FUNCTIONS = {
    "os.replace", "os.rename", "os.renames", "os.remove", "os.unlink", "os.mkdir", "os.makedirs", "os.truncate",
    "os.symlink", "os.fdopen", "os.open", "shutil.copy", "shutil.copy2", "shutil.copyfile", "shutil.copytree",
    "shutil.move", "shutil.rmtree", "tempfile.NamedTemporaryFile", "tempfile.TemporaryFile", "tempfile.mkstemp",
    "tempfile.mkdtemp", "tempfile.TemporaryDirectory", "NamedTemporaryFile", "TemporaryDirectory", "mkstemp",
    "logging.FileHandler", "FileHandler", "np.memmap",
}  # fmt: skip
LIBRARIES = {"save_pretrained", "save_file", "torch.save", "np.save", "np.savez", "np.savez_compressed", "av.open"}
"""Calls of libraries that write a file: only inside a ``with`` of one of ``STAGES``, or into memory."""
STAGES = {"replacing", "adding", "writing"}
ALLOWED = {
    ("output.py", "os.open"): "the null device, in the place of a standard output that cannot be written",
    ("locks.py", "rmdir"): "a folder that was made for a lock and stayed empty",
    ("locks.py", "mkdir"): "the folder that is locked",
    ("locks.py", "unlink"): "the lock file",
    ("store/reader.py", "np.memmap"): "opened for reading",
    ("jobs/prompt/cache.py", "np.save"): "into memory",
    ("ops/images.py", "save"): "into memory",
    ("deployment/coreml.py", "TemporaryDirectory"): "Core ML writes a folder, which is packed into the file",
    ("deployment/openvino.py", "TemporaryDirectory"): "the ONNX file that OpenVINO reads",
    ("deployment/executorch.py", "write_bytes"): "in the new folder that ``export`` puts into place",
    ("deployment/precision.py", "unlink"): "an intermediate file in the new folder",
    ("deployment/runtime/command.py", "mkdir"): "runs without the package",
}


def writes(text: str, file: str) -> list[str]:
    """Lines of the calls in ``text`` that write a file, or could."""
    found = []
    for call, staged in _calls(ast.parse(text), False):
        name = ast.unparse(call.func)
        method = name.rpartition(".")[2]
        if name in ("open", "io.open") or method == "open":
            modes = [*call.args[1:], *call.args[:1], *(k.value for k in call.keywords if k.arg == "mode")]
            texts = [a.value for a in modes if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            writing = any(set(mode) <= set("rwaxbt+") and set(mode) & set("wax+") for mode in texts)
            bad = writing and not (name == "av.open" and staged)
        elif name in LIBRARIES or method in LIBRARIES or (method == "save" and _of_pillow(call)):
            bad = not staged
        else:
            bad = name in FUNCTIONS or (method in METHODS and "." in name)
        if bad and not any(known in (name, method) and file == where for where, known in ALLOWED):
            found.append(f"{file}:{call.lineno}: {name}")
    return found


def _of_pillow(call: ast.Call) -> bool:
    """``Image.save`` has a format as second argument or as keyword; the ``save`` of our own classes has neither."""
    return any(k.arg in ("format", "quality") for k in call.keywords) or (
        len(call.args) > 1 and isinstance(call.args[1], ast.Constant) and str(call.args[1].value).isupper()
    )


def _calls(node: ast.AST, staged: bool) -> Iterator[tuple[ast.Call, bool]]:
    """Every call, and whether it is inside a ``with`` that puts its file into place."""
    if isinstance(node, ast.With):
        names = {ast.unparse(i.context_expr.func).rpartition(".")[2] for i in node.items
                 if isinstance(i.context_expr, ast.Call)}  # fmt: skip
        staged = staged or bool(names & STAGES)
    if isinstance(node, ast.Call):
        yield node, staged
    for child in ast.iter_child_nodes(node):
        yield from _calls(child, staged)


def test_no_other_file_opens_one_for_writing() -> None:
    files = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "io.py"]
    assert len(files) > 100
    assert [line for path in files for line in writes(path.read_text(), str(path.relative_to(PACKAGE)))] == []


@pytest.mark.parametrize("file", sorted({file for file, _ in ALLOWED}))
def test_every_exception_is_still_one(file: str) -> None:
    text = (PACKAGE / file).read_text()
    for where, call in ALLOWED:
        assert where != file or f"{call.rpartition('.')[2]}" in text, call


@pytest.mark.parametrize(
    "line",
    [
        "open(path, 'w')", "path.open('ab')", "open(path, mode='r+')", "path.write_text('x')", "os.replace(a, b)",
        "path.rename(b)", "shutil.copyfile(a, b)", "with NamedTemporaryFile() as f: pass", "torch.save(x, path)",
        "model.save_pretrained(folder)", "save_file(t, path)", "image.save(path, 'PNG')", "np.save(path, a)",
        "av.open(path, 'w', format='mp4')", "path.mkdir()", "logging.FileHandler(path)", "path.unlink()",
        "image.save(path, quality=3)", "io.open(path, 'x')",
    ],
)  # fmt: skip
def test_a_write_is_found(line: str) -> None:
    assert len(writes(line, "jobs/a.py")) == 1


@pytest.mark.parametrize(
    "line",
    [
        "open(path)", "open(path, 'rb')", "path.open('rb')", "Image.open(path)", "av.open(str(path))",
        "x.replace('a', 'b')",
        "with replacing(path) as new:\n    save_file(t, new)", "with adding(f) as new: t.save_pretrained(new)",
        "with writing(path) as file:\n    torch.save(x, file)", "write_text(path, 'x')", "words.save(folder)",
        "with io.replacing(p) as new, av.open(str(new), 'w') as c: pass", "replace(self, a=1)",
        "open_source(data, 'train')",
    ],
)  # fmt: skip
def test_what_writes_nothing_is_not(line: str) -> None:
    assert writes(line, "jobs/a.py") == []
