"""Reading of configurations: YAML files with ``extends``, packaged recipes by name, and ``key=value`` overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import UserError
from ..reading import MOST_DEPTH, check_plain, foreign, shown
from ..registry import did_you_mean
from .losses import UnknownTerm
from .parts import ONE_SCHEDULE

AnyConfig = TypeVar("AnyConfig", bound=BaseModel)
_SAID = {
    "tuple_type": "must be a list, such as [a, b]",
    "too_short": "too few entries in the list; give at least {min_length}",
    "too_long": "too many entries in the list; give at most {max_length}",
    "model_type": "must be a mapping of keys to values",
    "dict_type": "must be a mapping of keys to values",
    "path_type": "must be a path",
}
"""What is said in the place of those messages of pydantic that name a Python type, by the type of the error."""
_BRANCH = re.compile(r".*[\[(].*|bool|int|float|str|none")
"""Parts of pydantic's places that name a branch of a type such as ``bool | Path``, not a key."""


class _Loader(yaml.SafeLoader):
    """YAML loader that reads ``1e-4`` as a float and refuses duplicate keys.

    PyYAML reads ``1e-4`` as a string (YAML 1.1 requires ``1.0e-4``) and silently drops the first value of a duplicate
    key.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key, _ in node.value:  # merge keys (`<<`) are not expanded yet, since their values may be overridden
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.value in lines:
                twice = f"key {key.value!r} is given twice, in line {lines[key.value]} and in line {line}; keep one"
                raise yaml.constructor.ConstructorError(None, None, twice)
            lines[str(key.value)] = line
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)


def packaged() -> list[str]:
    """Return the names of the recipes in the package, such as ``encoder/es_rv_m``."""
    root = files("samdistill") / "configs"
    return sorted(f"{job.name}/{f.name[:-5]}" for job in root.iterdir() if job.is_dir()
                  for f in job.iterdir() if f.name.endswith(".yaml") and not f.name.startswith("_"))  # fmt: skip


def _find(name: str, beside: Path | None = None) -> Path:
    home = os.path.expanduser(name)
    candidates = [Path(home)] if beside is None else [beside / home, beside / f"{home}.yaml"]
    candidates.append(Path(str(files("samdistill") / "configs")) / f"{name}.yaml")
    for path in candidates:
        if path.is_file():
            return path
    raise UserError(f"no config {name!r}, neither a file nor a packaged recipe{did_you_mean(name, packaged())}")


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge a config over the one that it extends. New phases replace the parent's single schedule."""
    train, new = base.get("train"), over.get("train")
    if isinstance(train, dict) and isinstance(new, dict) and new.get("phases") is not None:
        base = {**base, "train": {key: value for key, value in train.items() if key not in ONE_SCHEDULE}}
    return _merge(base, over)


def _read(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: 'extends' is circular")
    with foreign(path, "not readable as YAML"):
        raw = _parse(path.read_text(encoding="utf-8")) or {}
    if not isinstance(raw, dict) or not all(isinstance(key, str) for key in raw):
        raise UserError(f"{path}: a config must be a mapping of keys to values")
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    if not isinstance(parent, str):
        raise UserError(f"{path}: 'extends' must be the name of one config, got {shown(parent)}")
    return _overlay(_read(_find(parent, path.parent), (*seen, path.resolve())), raw)


def _parse(text: str) -> Any:
    """Parse YAML and check its depth and size.

    PyYAML raises errors of any type, for example for an invalid date.
    """
    found = yaml.load(text, _Loader)
    check_plain(found)
    return found


def _override(raw: dict[str, Any], text: str) -> dict[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"override {text!r}: write key=value, such as train.lr=3e-4")
    if text.count(".", 0, len(key)) > MOST_DEPTH:
        raise UserError(f"override {shown(text)}: nests deeper than {MOST_DEPTH}")
    with foreign(f"override {shown(text)}", "not readable as YAML"):
        nested: Any = _parse(value)
    for part in reversed(key.split(".")):
        nested = {part: nested}
    return _merge(raw, nested)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    """Yield the blocks inside a field's type at any depth, such as the one in ``tuple[PhaseConfig, ...] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models(inner)


def _field_names(kind: type[BaseModel], path: Sequence[int | str]) -> list[str]:
    """Return the valid keys at the place of an unknown one."""
    model = kind
    for part in path:
        if isinstance(part, int):
            continue
        inside = next(_models(model.model_fields[part].annotation), None)
        if inside is None:
            return []
        model = inside
    return list(model.model_fields)


def check_against(kind: type[AnyConfig], raw: dict[str, Any], origin: str) -> AnyConfig:
    """Validate ``raw`` as a config of class ``kind``.

    Args:
        kind: Class of the config.
        raw: Settings of ``read_config``.
        origin: Name of the config in error messages.

    Raises:
        UserError: The settings are invalid. The message has one line per problem.
    """
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        raise UserError("\n".join(_problems(kind, error, origin))) from None


def _problems(kind: type[BaseModel], error: ValidationError, origin: str) -> Iterator[str]:
    """Yield one line per problem: origin, key, problem and suggestion."""
    problems = error.errors()
    inside = {problem["loc"][:depth] for problem in problems for depth in range(len(problem["loc"]))}
    values: dict[str, list[Any]] = {}  # of a key whose type has branches, one per branch
    for problem in problems:
        if problem["type"] == "too_short" and problem["loc"] in inside:
            continue  # pydantic does not count invalid entries, whose own problems are reported
        where = ".".join(part for part in map(str, problem["loc"]) if not _BRANCH.fullmatch(part))
        if problem["type"] == "extra_forbidden":
            *parents, last = problem["loc"]
            yield f"{origin}: unknown key {where!r}{did_you_mean(str(last), _field_names(kind, parents))}"
        elif isinstance(unknown := problem.get("ctx", {}).get("error"), UnknownTerm):
            yield f"{origin}: unknown key {f'{where}.{unknown.name}'!r}{did_you_mean(unknown.name, unknown.known)}"
        elif problem["loc"] == ("train", "phases") and problem["type"] == "too_short":
            yield f"{origin}: train.phases is empty: give each phase its epochs, or leave the key out"
        else:
            values.setdefault(where, []).append(problem)
    for where, found in values.items():
        says_it = found[0]["type"] in ("missing", "value_error")
        given = "" if says_it else f" (given: {shown(found[0]['input'])})"
        yield f"{origin}: {where or 'config'}: {', or '.join(map(_said, found))}{given}"


def _said(problem: Any) -> str:
    """Return what is wrong, in the words of a configuration: it has lists and mappings, no tuples and classes."""
    if problem["type"] == "missing" and isinstance(problem["loc"][-1], int):
        return "too few entries in the list; this one is missing"
    own = _SAID.get(problem["type"])
    return problem["msg"].removeprefix("Value error, ") if own is None else own.format_map(problem.get("ctx", {}))


def read_config(name: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read the settings of a config, merge them over those that it extends, and apply the overrides.

    Args:
        name: A path or the name of a packaged recipe.
        overrides: Settings of the form ``key=value``, with dotted keys and YAML values.

    Returns:
        The settings, not validated. ``check_against`` validates them.

    Raises:
        UserError: A config does not exist, cannot be read or extends itself, or an override is invalid.

    Example:
        >>> read_config("encoder/es_rv_m", ["train.lr=3e-4"])["train"]["lr"]
        0.0003
    """
    path = _find(str(name))
    given: dict[str, Any] = {}
    for text in overrides:
        given = _override(given, text)
    return _overlay(_read(path), given)
