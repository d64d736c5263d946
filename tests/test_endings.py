"""How a command ends: standard output that cannot be written, signals, and outputs that would destroy an input."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from PIL import Image

from samdistill import cli
from samdistill.cli import main


def started(*argv: str, **options: object) -> subprocess.Popen[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-P", "-m", "samdistill", *argv], env=env, text=True, **options)  # type: ignore[call-overload]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("argv", [["--help"], ["models"], ["models", "--json"]])
def test_a_full_disk_under_standard_output_is_one_line(argv: list[str]) -> None:
    with open("/dev/full", "w") as full:
        process = started(*argv, stdout=full, stderr=subprocess.PIPE)
        said = process.communicate(timeout=600)[1]
    assert process.returncode == 2
    assert said.splitlines() == [
        f"samdistill{' models' * ('models' in argv)}: standard output: No space left on device"
    ]


@pytest.mark.parametrize("argv", [["--help"], ["models"], ["models", "--json"]])
def test_a_reader_that_left_ends_it_quietly(argv: list[str]) -> None:
    read, write = os.pipe()
    os.close(read)
    process = started(*argv, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert process.communicate(timeout=600)[1] == "" and process.returncode == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["models"], "samdistill models: interrupted; the same command starts over\n"),
        (["export", "sandbox-mobile", "--out", "x"], "samdistill export: interrupted; the same command starts over\n"),
        (["train", "encoder/es_rv_m"],
         "samdistill train: interrupted; what was finished is kept, the same command goes on\n"),
    ],
)  # fmt: skip
def test_sigterm_ends_a_command_as_ctrl_c_does(
    argv: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def waits(*_: object) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        return 0

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(cli, "_dispatch", waits)
    assert main(argv) == 130
    assert capsys.readouterr().err == said
    assert signal.getsignal(signal.SIGTERM) is before


def test_off_the_main_thread_no_signal_is_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_dispatch", lambda _: 7)
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(main(["models"])))
    thread.start()
    thread.join()
    assert codes == [7]


@pytest.fixture()
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (60, 40), (200, 30, 30)).save(path)
    return path


@pytest.mark.parametrize("way", ["itself", "relative", "hard link", "link", "link to the input"])
def test_predict_does_not_overwrite_its_input(
    way: str, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, given, out = photo.read_bytes(), photo, tmp_path / "out.png"
    if way == "itself":
        out = photo
    elif way == "relative":
        monkeypatch.chdir(tmp_path)
        out = Path("..") / tmp_path.name / "photo.png"
    elif way == "hard link":
        out.hardlink_to(photo)
    elif way == "link":
        out.symlink_to(photo)
    else:
        given, out = tmp_path / "given.png", photo
        given.symlink_to(photo)
    # refused before the model, which does not exist, is looked for
    assert main(["predict", str(given), str(tmp_path / "none"), "--point", "3,3", "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and ("is the input" in said or "symbolic link" in said), said
    assert photo.read_bytes() == before


def test_a_full_disk_under_predict_keeps_the_picture_that_was_there(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "good.png"
    out.write_bytes(photo.read_bytes())
    argv = ["predict", str(photo), "sandbox-sam", "--point", "3,3", "--out", str(out)]
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limit[1]))
    try:
        assert main(argv) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    said = capsys.readouterr().err
    assert said.startswith(f"samdistill predict: {out}: cannot be written: File too large") and said.count("\n") == 1
    assert out.read_bytes() == photo.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["good.png", "photo.png"]
    assert main(argv) == 0 and out.read_bytes() != photo.read_bytes()


@pytest.mark.parametrize("error", ["ConnectionResetError(104, 'by peer')", "EOFError()", "ValueError('a fault')"])
def test_a_loader_worker_whose_main_process_is_gone_says_nothing(error: str) -> None:
    """multiprocessing hands what its thread that shares memory meets to ``sys.excepthook``."""
    lines = [
        "import sys", "from samdistill.processes import outlive_signals", "outlive_signals(0)", f"error = {error}",
        "sys.excepthook(type(error), error, None)",
    ]  # fmt: skip
    said = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True).stderr
    assert ("a fault" in said) == error.startswith("ValueError") and ("Error" in said) == ("a fault" in said)
