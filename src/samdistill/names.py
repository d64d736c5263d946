"""Names from data sets: which of them are valid keys, and the file name of a key."""

from __future__ import annotations

import re

from .errors import UserError

MOST_BYTES = 255
"""Largest number of bytes of one path component, a limit of common file systems."""
_PIECE = 200  # bytes of one component of a written path; the remainder is for suffixes and temporary names
_RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(?=\.|$)", re.IGNORECASE)
_UNSAFE = re.compile(r"[%<>:\"|?*\x00-\x1f\x7f]|^[ .]|[ .]$")


def key_problem(key: str) -> str | None:
    """Return why a name from a data set cannot be a key, or None if it can.

    A key is a relative path with forward slashes, below the folder of its data set. Keys are printed, stored one per
    line as UTF-8, and joined with folders. A key must not lead out of a folder, so absolute paths, ``.``, ``..`` and
    backslashes are not allowed.
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
    """Return the relative path, with forward slashes, of a file that is written for ``key``.

    Common names are unchanged. Percent-encoded are ``%``, characters that some file systems do not allow, leading and
    trailing dots and spaces, and the first character of reserved names. A component of more than 200 bytes is continued
    in a sub-folder, and the name of the folder ends in ``%``. Two keys never share a file:
    ``urllib.parse.unquote(name.replace("%/", ""))`` is the key. The path never leaves its folder.

    Raises:
        UserError: ``key`` is not a valid key.

    Example:
        >>> file_name("a/b?.jpg")
        'a/b%3F.jpg'
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
