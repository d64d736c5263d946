"""What may come in, and that whatever is wrong with it is said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from samdistill.errors import UserError
from samdistill.reading import Number, Table, Whole, check_plain, fits, foreign, one_line, parse_json, read_json


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "EOF"), (b'{"a": ', "EOF"), (b"{}x", "trailing"), (b"[]", "object"), (b'{"a":"\xff"}', "unicode"),
        (b'{"a": "\\ud800"}', "hex escape"), (b'{"a":' + b"[" * 100_000, "recursion"),
        (b'{"a":' + b"9" * 5000 + b"}", "range"),
    ],
)  # fmt: skip
def test_what_is_no_json_is_said_in_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: broken: .*{reason}") as error:
        read_json(path, Table, "broken")
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500


def test_a_missing_file_and_a_folder_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_json(tmp_path / "a.json", Table)
    with pytest.raises(UserError, match="directory"):
        read_json(tmp_path, Table)


def test_json_is_read_as_json_has_it() -> None:
    assert parse_json(b'\xef\xbb\xbf{"a": [1, 2.5, null, "\\u00e4"]}', Table) == {"a": [1, 2.5, None, "ä"]}
    assert parse_json('{"a": 1}', dict[str, int]) == {"a": 1}


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        (Whole, [0, -3, 2**53], ["1", True, 1.5, None, [1], 2**53 + 1, 10**400]),
        (Number, [0, 1.5, -1e300], ["1", True, float("nan"), float("inf"), None, {}]),
    ],
)
def test_numbers_are_what_they_say(schema: Any, good: list[Any], bad: list[Any]) -> None:
    for value in good:
        assert fits(value, schema) == value
    for value in bad:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            fits(value, schema)


def test_whatever_a_library_raises_names_the_file() -> None:
    class Odd(BaseException):
        pass

    for error in (KeyError("x"), RecursionError(), OverflowError("too\nlarge"), AssertionError(), MemoryError()):
        with pytest.raises(UserError, match=r"^here: not readable: [^\n]+$"), foreign("here", "not readable"):
            raise error
    with pytest.raises(UserError, match=r"^mine$"), foreign("here", "not readable"):
        raise UserError("mine")
    with pytest.raises(Odd), foreign("here", "not readable"):
        raise Odd


def test_a_line_is_one_line_that_can_be_printed() -> None:
    assert one_line(ValueError("a\n  b\ud800")) == "a b\\ud800"
    assert one_line(ValueError()) == "ValueError"
    assert len(one_line(ValueError("x" * 10_000))) == 300


def test_yaml_is_bounded_once_its_aliases_are_followed() -> None:
    check_plain({"a": [1, {"b": None}], "c": "text"})
    shared = yaml.safe_load("a: &x {lr: 1}\nb: *x\nc: *x")
    check_plain(shared)
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 9)
    )
    with pytest.raises(ValueError, match="more than 1000000 values"):
        check_plain(yaml.safe_load(bomb))
    with pytest.raises(ValueError, match="refers to a value that contains it"):
        check_plain(yaml.safe_load("a: &a [*a]"))
    with pytest.raises(ValueError, match="deeper than 100"):
        check_plain(yaml.safe_load("[" * 150 + "]" * 150))
