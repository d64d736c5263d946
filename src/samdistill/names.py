"""Names out of a data set: which of them can be keys, and how a key becomes the name of a file."""

from __future__ import annotations

import re

from .errors import UserError

MOST_BYTES = 255
"""Of one part of a path: what file systems take."""
_PIECE = 200  # bytes of one part of a written path; the rest is room for suffixes and temporary names
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)", re.IGNORECASE)
_UNSAFE = re.compile(r"[%<>:\"|?*\x00-\x1f\x7f]|^[ .]|[ .]$")


def key_problem(key: str) -> str | None:
    """Why a name that a data set gives cannot be a key, or None.

    A key is a relative path with forward slashes below its data set's folder. It is printed, kept one a line as UTF-8,
    and joined with folders, so it must not lead out of one: no absolute path, no ``.`` or ``..``, no backslash.
    """
    try:
        parts = [part.encode() for part in key.split("/")]
    except UnicodeEncodeError:
        return "its name is not valid UTF-8"
    if re.search(r"[\x00-\x1f\x7f]", key):
        return "its name holds a line break or another control character"
    if "\\" in key:
        return "its name holds a backslash; write forward slashes"
    if key.startswith("/") or re.match(r"[A-Za-z]:", key):
        return "its name is an absolute path; names are relative to the data set's folder"
    if any(part in (b"", b".", b"..") for part in parts):
        return "its name is empty or has an empty part, '.' or '..'; names stay inside the data set's folder"
    if any(len(part) > MOST_BYTES for part in parts):
        return f"its name has a part of more than {MOST_BYTES} bytes"
    return None


def file_name(key: str) -> str:
    """The relative path, with forward slashes, of what is written about ``key``; it never leaves its folder.

    Usual names stay as they are. Characters that some file system does not take, hidden and reserved names are
    percent-encoded, ``%`` included, and a part of more than 200 bytes is continued in a folder of its own, whose name
    ends in ``%``. So two keys never share a file, and ``urllib.parse.unquote(name.replace("%/", ""))`` is the key.
    Raises ``UserError`` for what cannot be a key.
    """
    if reason := key_problem(key):
        raise UserError(f"{key!r}: {reason}")
    return "/".join(_written(part) for part in key.split("/"))


def _written(part: str) -> str:
    safe = _UNSAFE.sub(lambda match: f"%{ord(match[0]):02X}", part)
    if _RESERVED.match(safe):
        safe = f"%{ord(safe[0]):02X}{safe[1:]}"
    pieces = [""]
    for character in re.findall(r"%..|.", safe, re.DOTALL):
        if len((pieces[-1] + character).encode()) > _PIECE:
            pieces.append("")
        pieces[-1] += character
    return "%/".join(pieces)
