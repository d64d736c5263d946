"""Reading what others wrote: JSON through schemas, YAML within bounds, and any library's error as one ``UserError``."""

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
"""A whole number that is written as one: no text, no boolean, and no more than a float64 holds exactly."""
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
"""A finite number that is written as one."""
Side = Annotated[int, Field(strict=True, ge=1, le=2**20)]
"""Height or width in pixels."""
Table = dict[str, Any]
"""A JSON object of anything."""
MOST_DEPTH, MOST_VALUES = 100, 1_000_000
"""How deep a YAML document may nest, and how many values it may stand for once its aliases are written out."""
_BOM = b"\xef\xbb\xbf"


def one_line(error: BaseException, most: int = 300) -> str:
    """What an error says in one line of at most ``most`` characters, or its name where it says nothing."""
    text = " ".join(printable(str(error)).split()) or type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def printable(text: str) -> str:
    """``text`` with what a terminal or a UTF-8 file cannot take written as an escape."""
    return text.encode("utf-8", "backslashreplace").decode()


def shown(value: object) -> str:
    """A value as an error message quotes it: its representation, in one line and cut where it is long."""
    return one_line(ValueError(repr(value)), 120)


@contextmanager
def foreign(where: object, what: str) -> Iterator[None]:
    """Turn every error that a library raises about a file from outside into one ``UserError``.

    where: the file or folder. what: the fault in words, such as ``not a readable configuration``. A library that reads
    damaged data may raise anything, so nothing is listed here; wrap the library's call and nothing else.
    A ``UserError`` passes as it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{printable(str(where))}: {what}: {one_line(error)}") from error


@contextmanager
def running(model: Any) -> Iterator[None]:
    """``foreign`` for a pass through a model that was opened from files: their settings may build what cannot run."""
    where = getattr(getattr(model, "config", None), "name_or_path", "") or type(model).__name__
    with foreign(where, "this model cannot run; its configuration may not fit it"):
        yield


@cache
def _adapter(schema: Any) -> TypeAdapter[Any]:
    return TypeAdapter(schema)


def problem(error: ValidationError) -> str:
    """The first thing that is wrong, with its place, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(map(str, first["loc"]))
    reason = first["msg"].removeprefix("Value error, ")
    return one_line(ValueError(f"{place}: {reason}" if place else reason))


def fits(value: Any, schema: type[T]) -> T:
    """``value`` as ``schema`` has it. Raises ``ValueError`` with one line for a value that does not fit."""
    try:
        return _adapter(schema).validate_python(value)
    except ValidationError as error:
        raise ValueError(problem(error)) from None


def misfit(value: Any, schema: Any) -> str | None:
    """Why ``value`` is not as ``schema`` has it, or None."""
    try:
        fits(value, schema)
    except ValueError as error:
        return str(error)
    return None


def parse_json(content: bytes | str, schema: type[T]) -> T:
    """JSON (UTF-8, nested 200 deep at most, no lone surrogates) as ``schema`` has it.

    Raises ``ValueError`` with one line for anything else.
    """
    try:
        return _adapter(schema).validate_json(content.removeprefix(_BOM) if isinstance(content, bytes) else content)
    except ValidationError as error:
        raise ValueError(problem(error)) from None


def read_json(path: Path, schema: type[T], what: str = "not readable as JSON") -> T:
    """The content of a JSON file as ``schema`` has it, or a ``UserError`` with the file, ``what`` and the reason."""
    try:
        return parse_json(path.read_bytes(), schema)
    except OSError as error:
        raise UserError(f"{printable(str(path))}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{printable(str(path))}: {what}: {error}") from None


def read_json_lines(path: Path, schema: type[T], what: str, *, torn: bool = False) -> list[T]:
    """Every line of a JSON Lines file as ``schema`` has it. torn: leave out a last line without its end, which a kill
    can leave of a log. Raises ``UserError`` with the file, the number of the line, ``what`` and the reason."""
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
    """Raise ``ValueError`` unless a parsed YAML value can be walked through: of bounded depth and size, no cycles.

    An alias costs nothing to write and everything to follow: nine of nine stand for a billion values.
    """
    _count(value, {}, 0)


def _count(value: Any, known: dict[int, int], depth: int) -> int:
    """Values that ``value`` stands for. known: of containers by identity; -1 for one that is being counted."""
    if not isinstance(value, dict | list):
        return 1
    if depth > MOST_DEPTH:
        raise ValueError(f"nests deeper than {MOST_DEPTH}")
    if (found := known.get(id(value))) is not None:
        if found < 0:
            raise ValueError("an alias refers to what it is in")
        return found
    known[id(value)] = -1
    inside = value.values() if isinstance(value, dict) else value
    total = 1 + sum(_count(item, known, depth + 1) for item in inside)
    if total > MOST_VALUES:
        raise ValueError(f"stands for more than {MOST_VALUES} values")
    known[id(value)] = total
    return total
