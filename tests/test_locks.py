"""One process at a time writes a folder, and a death releases it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from samdistill.locks import NAME, locked
from samdistill.types import UserError

HOLD = """
import sys, time, multiprocessing
from pathlib import Path
from samdistill.locks import locked
with locked(Path(sys.argv[1]), "train"):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))  # as a loader worker
    child.start()
    print(child.pid, flush=True)
    time.sleep(60)
"""


def test_a_second_process_is_told_who_holds_it_and_a_kill_releases_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    try:
        with pytest.raises(UserError) as error, locked(run, "train"):
            pass
        assert str(error.value).startswith(f"{run}: samdistill train (process {process.pid} on ")
        assert "use another folder" in str(error.value) and "\n" not in str(error.value)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        with locked(run, "train"):  # although the forked child is alive
            os.kill(child, 0)
    finally:
        process.kill()
        os.kill(child, signal.SIGKILL)
        process.stdout.close()
    assert run.is_dir() and not list(run.iterdir())


def test_it_may_be_held_again_inside_and_not_by_another_thread(tmp_path: Path) -> None:
    said: list[str] = []

    def other() -> None:
        try:
            with locked(tmp_path, "train"):
                said.append("held")
        except UserError as error:
            said.append(str(error))

    with locked(tmp_path, "run"), locked(tmp_path / "." / ".." / tmp_path.name, "train"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert len(said) == 1 and "another thread" in said[0]
    other()
    assert said[1] == "held" and not (tmp_path / NAME).exists()


def test_a_folder_that_stayed_empty_is_not_left_behind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no cache"), locked(tmp_path / "a" / "b", "train"):
        raise UserError("no cache")
    assert not (tmp_path / "a").exists()
    with locked(tmp_path / "a" / "b", "train"):
        (tmp_path / "a" / "b" / "kept").touch()
    assert (tmp_path / "a" / "b" / "kept").exists()


def test_a_folder_that_cannot_be_made_or_a_link_for_a_lock_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file"), locked(tmp_path / "file", "train"):
        pass
    (tmp_path / NAME).symlink_to(tmp_path / "file")
    with pytest.raises(UserError, match="symbolic link"), locked(tmp_path, "train"):
        pass
