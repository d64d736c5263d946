"""Read untrusted files: JSON with schemas, YAML with limits, and library errors as one-line ``UserError``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Field, TypeAdapter, ValidationError

from .errors import UserError

T = TypeVar("T")
Whole = Annotated[int, Field(strict=True, ge=-(2**53), le=2**53)]
"""An integer that is written as one: not a text or a boolean, and exactly representable in float64."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number that is written as one."""
Table = dict[str, Any]
"""A JSON object with any content."""
MOST_DEPTH, MOST_VALUES = 100, 1_000_000
"""Largest depth of a YAML document, and largest number of values after expansion of its aliases."""
_BOM = b"\xef\xbb\xbf"


def one_line(error: BaseException, most: int = 300) -> str:
    """Return the message of an error in one line of at most ``most`` characters, or its type if there is no message."""
    text = " ".join(printable(str(error)).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str) -> str:
    """Escape characters that cannot be encoded as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(value: object) -> str:
    """Return the representation of a value for an error message, in one line of at most 120 characters."""
    return one_line(ValueError(repr(value)), 120)


@contextmanager
def foreign(where: object, what: str) -> Iterator[None]:
    """Convert every exception that a library raises for an external file to a one-line ``UserError``.

    A library may raise any exception for damaged data, so all are converted, except ``UserError``. The body should
    contain the library's call only.

    Args:
        where: The file or folder.
        what: Description of the fault, such as ``not a readable configuration``.

    Raises:
        UserError: The body raised an exception.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{printable(str(where))}: {what}: {one_line(error)}") from error


@contextmanager
def running(model: Any) -> Iterator[None]:
    """Convert exceptions of a model that was read from files while it runs, as ``foreign`` does.

    The configuration in the files may describe a model that cannot run.
    """
    where = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    with foreign(where, "this model cannot run; its configuration may not fit it"):
        yield


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def problem(error: ValidationError) -> str:
    """Return the first fault that a validation found, with its place, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    return one_line(ValueError(f"{place}: {reason}" if place else reason))


def fits(value: Any, schema: type[T]) -> T:
    """Validate a value with a schema and return it.

    Raises:
        ValueError: The value does not fit. The message is one line.
    """
    try:
        return _adapter(schema).validate_python(value)
    except ValidationError as error:
        raise ValueError(problem(error)) from None


def misfit(value: Any, schema: Any) -> str | None:
    """Return why a value does not fit a schema, or None if it fits."""
    try:
        fits(value, schema)
    except ValueError as error:
        return str(error)
    return None


def parse_json(content: bytes | str, schema: type[T]) -> T:
    """Parse JSON and validate it with a schema.

    Args:
        content: UTF-8, with or without a byte order mark, at most 200 levels deep, without lone surrogates.
        schema: A type that pydantic can validate.

    Raises:
        ValueError: The content is not valid. The message is one line.
    """
    try:
        return _adapter(schema).validate_json(content.removeprefix(_BOM) if isinstance(content, bytes) else content)
    except ValidationError as error:
        raise ValueError(problem(error)) from None


def read_json(path: Path, schema: type[T], what: str = "not readable as JSON") -> T:
    """Read a JSON file and validate it with a schema.

    Args:
        path: The file.
        schema: A type that pydantic can validate.
        what: Description of the fault for the error message.

    Raises:
        UserError: The file cannot be read or is not valid. The message has the file, ``what`` and the reason.
    """
    try:
        return parse_json(path.read_bytes(), schema)
    except OSError as error:
        raise UserError(f"{printable(str(path))}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{printable(str(path))}: {what}: {error}") from None


def read_json_lines(path: Path, schema: type[T], what: str, *, torn: bool = False) -> list[T]:
    """Read a JSON Lines file and validate each line with a schema. Empty lines are ignored.

    Args:
        path: The file.
        schema: A type that pydantic can validate.
        what: Description of the fault for the error message.
        torn: Ignore a last line without a line end, which a killed process can leave in a log.

    Raises:
        UserError: The file cannot be read or a line is not valid. The message has the file, the number of the line,
            ``what`` and the reason.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{printable(str(path))}: {error.strerror or error}") from None
    found = list[T]()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1 if torn else None].split(b"\n"), 1):
        try:
            found += [parse_json(line, schema)] if line.strip() else []
        except ValueError as error:
            raise UserError(f"{printable(str(path))}, line {number}: {what}: {error}") from None
    return found


def check_plain(value: Any) -> None:
    """Check that a parsed YAML value has limited depth and size and no cycles.

    A short document can represent a huge value: nine levels of nine aliases each have almost 400 million values.

    Raises:
        ValueError: The value is nested too deeply, too large or cyclic.
    """
    _count(value, {}, 0)


def _count(value: Any, known: dict[int, int], depth: int) -> int:
    """Count the values of a nested value, with aliases expanded.

    ``known`` has the count of each container by identity, and -1 while it is being counted.
    """
    if not isinstance(value, dict | list):
        return 1
    if depth > MOST_DEPTH:
        raise ValueError(f"nests deeper than {MOST_DEPTH}")
    if (found := known.get(id(value))) is not None:
        if found < 0:
            raise ValueError("an alias refers to a value that contains it")
        return found
    known[id(value)] = -1
    inside = value.values() if isinstance(value, dict) else value
    total = 1 + sum(_count(item, known, depth + 1) for item in inside)
    if total > MOST_VALUES:
        raise ValueError(f"has more than {MOST_VALUES} values with its aliases expanded")
    known[id(value)] = total
    return total
