"""Tables of named entries, with suggestions for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Generic, TypeVar

from .errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Table of entries by name.

    Args:
        kind: Kind of the entries, for error messages.
        home: Module that registers the package's own entries. It is imported at the first lookup.

    Example:
        >>> @HEADS.register("linear")
        ... class LinearHead(nn.Module): ...
        >>> HEADS.get("linear")
    """

    def __init__(self, kind: str, home: str | None = None) -> None:
        self.kind, self.home = kind, home
        self._entries: dict[str, T] = {}

    def _known(self) -> dict[str, T]:
        if self.home is not None:
            import_module(self.home)
        return self._entries

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that registers a class or function.

        Raises:
            ValueError: The name is already registered.
        """
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")

        def add(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """Return an entry.

        Raises:
            UserError: The name is unknown. The message suggests a similar name or lists all.
        """
        known = self._known()
        if name in known:
            return known[name]
        raise UserError(f"no {self.kind} is called {name!r}{did_you_mean(name, list(known))}")

    def names(self) -> list[str]:
        """Return the sorted names."""
        return sorted(self._known())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._known())

    def __contains__(self, name: object) -> bool:
        return name in self._known()


class TermTable(Registry[Callable[..., Any]]):
    """Table of loss terms. A term is declared once, beside its function: ``@TABLE.term("mse", 1.0)``.

    The declaration defines the config key, its default weight, and the name for phases. A term that is registered
    without a weight is used if a config names it.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.weights: dict[str, float] = {}
        """Default weight of each term, in the order of declaration."""
        self.published: dict[str, float] = {}
        """Weights of terms that are off by default where they were published."""

    def term(self, name: str, weight: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that registers a term with a default weight.

        Every run has the term, with this weight unless its config sets another one.
        """
        self.weights[name] = weight
        return self.register(name)

    def optional(self, name: str, published: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that registers a term without a default weight.

        Args:
            name: Name of the term.
            published: The weight to begin with, for the documentation.
        """
        self.published[name] = published
        return self.register(name)


HEADS: Registry[Any] = Registry("head", "samdistill.students.heads")
"""Heads of trunks by the names of ``student.head``."""
CODECS: Registry[Any] = Registry("codec", "samdistill.store.codecs")
"""Encodings of records by the names of ``cache.codec``."""
MATCHERS: Registry[Any] = Registry("matcher", "samdistill.ops.matching")
"""Algorithms that pair queries by the names of ``match.method``."""


def did_you_mean(word: str, known: list[str]) -> str:
    """Return the end of an error message: ``; did you mean 'x'?``, or the list of known names if none is similar."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is: {', '.join(sorted(known))}" if known else ""
