"""Write files safely. No other module opens a file for writing.

Files and folders are written under a temporary name in the same folder and renamed when they are complete, so readers
find either the old or the new content, also after a kill or with a full disk. Only ``Appender`` and ``open_records``
write in place. Files have the permissions 0644 and folders 0755, less the umask. A symbolic link at the destination is
refused, so that its target is not overwritten. Operating-system errors become a ``UserError`` with the file and the
reason.
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
"""Suffix of incomplete files and folders. Their names begin with a dot."""
FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}
"""Error codes of a file system without space."""
_HIDDEN_IN_OTHERS = FULL | {errno.EIO, errno.EROFS}
"""Error codes that only disks have, and so identify disk errors inside the exceptions of libraries."""
_NO_DISK = (ConnectionError, ChildProcessError, ProcessLookupError, TimeoutError, InterruptedError)
"""Subclasses of ``OSError`` that are not disk errors."""
_FILE, _FOLDER = 0o644, 0o755


def as_path(value: str | os.PathLike[str]) -> Path:
    """Convert a user's path, and expand ``~``.

    Raises:
        UserError: The value is not a path, is empty, has a null character, or names an unknown user.
    """
    if not isinstance(value, str | os.PathLike):
        raise UserError(f"{value!r} is not a path: give a string or a pathlib.Path")
    if not os.fspath(value):  # which would be the current folder
        raise UserError("'' is not a path: it is empty")
    if "\0" in os.fspath(value):
        raise UserError(f"{os.fspath(value)!r}: a path cannot contain a null character")
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # ~user without such a user
        raise UserError(f"{os.fspath(value)}: {error}") from None


def reason(error: BaseException) -> str | None:
    """Return the operating system's reason for an error, or None for other errors.

    Libraries convert disk errors to exceptions of their own. Therefore the causes of ``error`` are searched for error
    codes that only disks have.
    """
    if isinstance(error, OSError) and error.errno is not None and not isinstance(error, _NO_DISK):
        return error.strerror or os.strerror(error.errno)
    if isinstance(error, UserError):
        return None
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno in _HIDDEN_IN_OTHERS:
            return inner.strerror or os.strerror(inner.errno)
        if type(inner).__name__ == "SafetensorError" and "os error" in str(inner):  # importing it would be slow
            return str(inner)
        inner = inner.__cause__ or inner.__context__
    return None


@contextmanager
def disk_errors(path: Path, hint: str = "") -> Iterator[None]:
    """Convert operating-system errors in the body to a ``UserError``.

    Args:
        path: Path for the message, unless the error names a file elsewhere.
        hint: Added to the message: what is kept, and what to do.

    Raises:
        UserError: The body raised an operating-system error.
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
    """Check before work starts that an output file can be written and is not an input.

    Args:
        path: The output file.
        inputs: Files and folders that are read. Names that are not local paths are ignored.

    Raises:
        UserError: The folder does not exist or is not writable, or ``path`` is a link, a folder or an input.
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


def make_folder(folder: Path, hint: str = "") -> None:
    """Create a folder and its parents if they do not exist."""
    with disk_errors(folder, hint):
        folder.mkdir(parents=True, exist_ok=True)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with its content, if it exists."""
    with disk_errors(path):
        _remove(path)


def sweep(folder: Path) -> None:
    """Remove incomplete files that killed processes left in ``folder``. The caller must hold the folder's lock."""
    for left in list(folder.glob(f".*{PARTIAL}")):
        remove(left)


@contextmanager
def replacing(path: Path, *, sync: bool = False, hint: str = "") -> Iterator[Path]:
    """Yield a temporary path for a file or folder that replaces ``path`` at the end.

    The temporary path does not exist yet and is in the same folder. If the body fails, it is removed and ``path`` is
    unchanged.

    Args:
        path: Destination.
        sync: Synchronise to disk (fsync) before renaming, so that the file survives a power failure.
        hint: As for ``disk_errors``.

    Raises:
        UserError: The destination is a link or a device, or the disk fails.

    Example:
        >>> with replacing(Path("weights.bin")) as new:  # doctest: +SKIP
        ...     library.save(new)
    """
    new = _aside(path)
    try:
        with disk_errors(path, hint):  # inside ``try``: the message has the free space before the new file is removed
            _refuse_link(path)
            yield new
            _settle(new, sync)
            _move(new, path)
    except BaseException as error:
        with suppress(OSError):
            _remove(new)
        if isinstance(error, UserError) and str(new) in str(error):  # the error names a file inside the folder
            raise UserError(str(error).replace(str(new), str(path))) from error
        raise
    if sync:
        sync_folder(path.parent)


@contextmanager
def adding(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder whose files are moved into ``folder`` at the end.

    They replace files of the same name, one after the other.
    """
    with disk_errors(folder):
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
    """Yield an open binary file that replaces ``path`` at the end, as ``replacing``."""
    with replacing(path, sync=sync, hint=hint) as new, open(new, "xb") as file:
        yield file


def write_bytes(path: Path, content: bytes, *, sync: bool = False, hint: str = "") -> None:
    """Write a file atomically."""
    with writing(path, sync=sync, hint=hint) as file:
        file.write(content)


def write_text(path: Path, text: str, *, sync: bool = False, hint: str = "") -> None:
    """Write a UTF-8 file atomically.

    Lone surrogates, which Python uses for file names that are not UTF-8, are escaped.
    """
    write_bytes(path, text.encode("utf-8", "backslashreplace"), sync=sync, hint=hint)


def write_json(path: Path, value: Any, *, indent: int | None = None, sync: bool = False) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=indent) + "\n", sync=sync)


def write_lines(path: Path, values: Iterable[Any], *, hint: str = "") -> None:
    """Write a JSON Lines file atomically, one value per line."""
    write_text(path, "".join(json.dumps(value) + "\n" for value in values), hint=hint)


def copy_file(source: Path, target: Path) -> None:
    """Copy the content of a file, not its permissions."""
    with open(source, "rb") as given, writing(target) as file:
        shutil.copyfileobj(given, file)


@contextmanager
def scratch() -> Iterator[Path]:
    """Yield a temporary folder of the system, which is removed afterwards."""
    with disk_errors(Path("the folder for temporary files"), "set TMPDIR to one with room"):
        folder = tempfile.TemporaryDirectory(prefix="samdistill_", ignore_cleanup_errors=True)
    with folder:
        yield Path(folder.name)


class Appender:
    """Appends to a log file. Use it as a context manager.

    After an error, nothing of the failed call remains in the file. Only one process may write at a time;
    ``samdistill.locks`` ensures this.

    Args:
        path: The file. It is created if it does not exist.
        hint: As for ``disk_errors``.
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
        """Synchronise the file to disk (fsync)."""
        with disk_errors(self.path, self.hint):
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file. A second call has no effect."""
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
    """Open a file for unbuffered writing at any position. It is created if it does not exist."""
    _refuse_link(path)
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | _NO_FOLLOW, _FILE), "r+b", buffering=0)


def sync_folder(folder: Path) -> None:
    """Synchronise the names in ``folder`` to disk (fsync), so that new files survive a power failure."""
    with disk_errors(folder):
        _sync(folder)


_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0)


def _refuse_link(path: Path) -> None:
    """Refuse a link, whose target would be affected, and a device or pipe, which would be replaced."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISLNK(mode):
        raise UserError(f"{path}: is a symbolic link to {os.readlink(path)}; give another path, or remove the link")
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise UserError(f"{path}: is neither a file nor a folder; give another path")


def _aside(path: Path) -> Path:
    """Return a random temporary path beside ``path``."""
    return path.parent / f".{path.name[:40]}.{secrets.token_hex(4)}{PARTIAL}"


def _settle(new: Path, sync: bool) -> None:
    """Set permissions of what a library wrote, and synchronise it to disk if ``sync``."""
    umask = os.umask(0o077)  # the umask can only be read by setting it
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
    """Return the free bytes of the file system of ``path``."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free


def _permit(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:
        with suppress(PermissionError):  # file systems without permissions refuse to set them
            path.chmod(mode)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open folders and journals names itself
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``.

    A file is replaced atomically. A folder is first moved aside, and moved back if renaming fails.
    """
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
