"""Every file this package writes, and every lock it holds. No other module opens a file for writing.

A file or folder is written under a temporary name beside its place and moved there when it is whole: a reader, a kill
or a full disk meets the old content or the new one. Files get the permissions 0644, folders 0755, less the umask. A
symbolic link at the destination is refused, so its target is never overwritten. An operating-system error becomes one
``UserError`` that names the file and the reason.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from .errors import UserError

PARTIAL = ".partial"
"""How the names of files and folders end that are not whole; they begin with a dot."""
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""What a file system without room says."""
_HIDDEN_IN_OTHERS = FULL | {errno.EIO, errno.EROFS}
_NO_DISK = (ConnectionError, ChildProcessError, ProcessLookupError, TimeoutError, InterruptedError)
_FILE, _FOLDER = 0o644, 0o755


def as_path(value: str | os.PathLike[str]) -> Path:
    """A path as a user writes it, ``~`` expanded. Raises ``UserError`` for what no file can be called."""
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{value!r} is not a path: give a string or a pathlib.Path")
    if "\0" in os.fspath(value):
        raise UserError(f"{os.fspath(value)!r}: a path cannot contain a null character")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # ~user without such a user
        raise UserError(f"{os.fspath(value)}: {error}") from None


def reason(error: BaseException) -> str | None:
    """What the operating system said, or None for an error that is not its.

    Libraries wrap a full disk in errors of their own: those that were handled before ``error`` are looked at too, for
    reasons that only a disk has.
    """
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _NO_DISK):
        return error.strerror or os.strerror(error.errno)
    if isinstance(error, UserError):
        return None
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno in _HIDDEN_IN_OTHERS:
            return inner.strerror or os.strerror(inner.errno)
        if type(inner).__name__ == "SafetensorError" and "os error" in str(inner):  # not imported: nothing heavy here
            return str(inner)
        inner = inner.__cause__ or inner.__context__
    return None


@contextmanager
def disk_errors(path: Path, hint: str = "") -> Iterator[None]:
    """Turn an operating-system error into a ``UserError`` that names ``path``, or the file that the error names.

    hint: what is kept and what to do, appended to the message.
    """
    try:
        yield
    except Exception as error:
        found = reason(error)
        if found is None:
            raise
        named = getattr(error, "filename", None)
        elsewhere = isinstance(named, str | Path) and PARTIAL not in str(named) and not Path(named).is_relative_to(path)
        where, verb = (named, "") if elsewhere else (path, "cannot be written: ")
        free = f" ({_free(path)} bytes free)" if getattr(error, "errno", None) in FULL else ""
        raise UserError(f"{where}: {verb}{found}{free}{'; ' + hint if hint else ''}") from error


def check_output(path: Path, *inputs: str | Path) -> None:
    """Refuse a place for a file that could not be written, or that would destroy an input, before work is spent on it.

    inputs: files and folders that are read; names that are no local path are left out. Raises ``UserError``.
    """
    if not path.parent.is_dir():
        raise UserError(f"--out: there is no folder {path.parent}")
    with disk_errors(path):
        _refuse_link(path)
        if path.is_dir():
            raise UserError(f"--out: {path} is a folder; give a file")
        for given in inputs:
            if path.exists() and os.path.exists(given) and path.samefile(given):
                raise UserError(f"--out: {path} is the input {given} itself; give another file")
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--out: the folder {path.parent} cannot be written to")


def make_folder(folder: Path) -> None:
    """The folder and those above it, where they are missing."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """A file, a link or a whole folder, if it is there."""
    with disk_errors(path):
        _remove(path)


def sweep(folder: Path) -> None:
    """Remove what writes that were killed left in ``folder``. Only for the process that holds the folder's lock."""
    for left in list(folder.glob(f".*{PARTIAL}")):
        remove(left)


@contextmanager
def replacing(path: Path, *, sync: bool = False, hint: str = "") -> Iterator[Path]:
    """A place beside ``path``, where nothing is yet, for a file or a folder that a library writes.

    It is moved to ``path`` at the end and takes the place of what is there; on any failure it is removed and ``path``
    stays as it was. sync: force it to the disk first, so that it survives a power cut. hint: see ``disk_errors``.
    Raises ``UserError`` for a destination that is a link or a device, and where the disk fails.
    """
    new = _aside(path)
    try:
        with disk_errors(path, hint):  # inside, so that it counts what is free while the new one is still there
            _refuse_link(path)
            yield new
            _settle(new, sync)
            _move(new, path)
    except BaseException as error:
        with suppress(OSError):
            _remove(new)
        if isinstance(error, UserError) and str(new) in str(error):  # of a file inside a folder
            raise UserError(str(error).replace(str(new), str(path))) from error
        raise
    if sync:
        sync_folder(path.parent)


@contextmanager
def adding(folder: Path, *, hint: str = "") -> Iterator[Path]:
    """A temporary folder whose files are moved into ``folder`` one by one at the end, over those of the same name."""
    with disk_errors(folder, hint):
        aside = _aside(folder / "new")
        aside.mkdir()
        try:
            yield aside
            for new in sorted(aside.iterdir()):
                _refuse_link(folder / new.name)
                _settle(new, False)
                os.replace(new, folder / new.name)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def writing(path: Path, *, sync: bool = False, hint: str = "") -> Iterator[BinaryIO]:
    """``replacing`` for what is written to an open binary file."""
    with replacing(path, sync=sync, hint=hint) as new, open(new, "xb") as file:
        yield file


def write_bytes(path: Path, content: bytes, *, sync: bool = False, hint: str = "") -> None:
    with writing(path, sync=sync, hint=hint) as file:
        file.write(content)


def write_text(path: Path, text: str, *, sync: bool = False, hint: str = "") -> None:
    """UTF-8. Names of files that are not, which Python keeps as lone surrogates, are escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"), sync=sync, hint=hint)


def write_json(path: Path, value: Any, *, indent: int | None = None, sync: bool = False, hint: str = "") -> None:
    write_text(path, json.dumps(value, indent=indent) + "\n", sync=sync, hint=hint)


def write_lines(path: Path, values: Iterable[Any], *, hint: str = "") -> None:
    """JSON Lines: one value a line."""
    write_text(path, "".join(json.dumps(value) + "\n" for value in values), hint=hint)


def copy_file(source: Path, target: Path) -> None:
    """The content alone, not the permissions."""
    with open(source, "rb") as given, writing(target) as file:
        shutil.copyfileobj(given, file)


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for temporary files, where the system keeps those; removed afterwards."""
    with disk_errors(Path("the folder for temporary files"), "set TMPDIR to one with room"):
        folder = tempfile.TemporaryDirectory(prefix="samdistill_", ignore_cleanup_errors=True)
    with folder:
        yield Path(folder.name)


class Appender:
    """Appends to a log; a context manager. What is appended in one call is there whole or, after an error, not at all.

    The file is made where it is missing. One process at a time writes: that is what ``samdistill.locks`` is for.
    """

    def __init__(self, path: Path, hint: str = "") -> None:
        self.path, self.hint = path, hint
        with disk_errors(path, hint):
            _refuse_link(path)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | _NO_FOLLOW, _FILE)

    def write(self, content: str | bytes) -> None:
        data = content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace")
        with disk_errors(self.path, self.hint):
            before, rest = os.fstat(self._descriptor).st_size, memoryview(data)
            try:
                while rest:
                    rest = rest[os.write(self._descriptor, rest) :]
            except BaseException:
                os.ftruncate(self._descriptor, before)
                raise

    def sync(self) -> None:
        """Force it to the disk."""
        with disk_errors(self.path, self.hint):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """A second call does nothing."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            with disk_errors(self.path, self.hint):
                os.close(descriptor)

    def __enter__(self) -> Appender:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_records(path: Path) -> BinaryIO:
    """A file whose bytes are written in place, unbuffered; made where it is missing, kept where it is not."""
    _refuse_link(path)
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, _FILE), "r+b", buffering=0)


def sync_folder(folder: Path) -> None:
    """Make new names in ``folder`` survive a power cut."""
    with disk_errors(folder):
        _sync(folder)


_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


def _refuse_link(path: Path) -> None:
    """Neither a link, whose target would be meant, nor a device or pipe, which a file would take the place of."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise UserError(f"{path}: is a symbolic link to {os.readlink(path)}; give another path, or remove the link")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: is neither a file nor a folder; give another path")


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}{PARTIAL}"


def _settle(new: Path, sync: bool) -> None:
    """Permissions of what a library wrote, and, if wanted, its bytes on the disk."""
    umask = os.umask(0o077)  # it can only be read by setting it
    os.umask(umask)
    files = [new]
    if new.is_dir():
        files = []
        for folder, _, names in os.walk(new):
            _permit(Path(folder), _FOLDER & ~umask)
            files += [Path(folder, name) for name in names]
    for file in files:
        _permit(file, _FILE & ~umask)
        if sync:
            _sync(file)


def _free(path: Path) -> int:
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _permit(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(PermissionError):  # file systems without permissions refuse to set them
            path.chmod(mode)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders and journals names itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(new: Path, path: Path) -> None:
    """A file takes another's place at once; a folder that is in the way is moved out first, and back on failure."""
    _refuse_link(path)
    if not (new.is_dir() and path.is_dir()):
        os.replace(new, path)
        return
    old = _aside(path)
    os.replace(path, old)
    try:
        os.replace(new, path)
    except BaseException:
        os.replace(old, path)
        raise
    _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
