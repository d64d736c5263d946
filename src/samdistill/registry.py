"""A name-to-thing table that explains itself: what is registered can be listed, and a typo gets a suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Generic, TypeVar

from .errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """``@REGISTRY.register("name")`` on a class or function; ``REGISTRY.get("name")`` later.

    home: module that registers the package's own entries; it is imported when a name is first looked up.
    """

    def __init__(self, kind: str, home: str | None = None) -> None:
        self.kind, self.home = kind, home
        self._entries: dict[str, T] = {}

    def _known(self) -> dict[str, T]:
        if self.home is not None:
            import_module(self.home)
        return self._entries

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator. A second registration of a name is a programming error: ``ValueError``."""
        if name in self._entries:
            raise ValueError(f"{self.kind} {name!r} is registered twice")

        def add(entry: T) -> T:
            self._entries[name] = entry
            return entry

        return add

    def get(self, name: str) -> T:
        """The entry, or a ``UserError`` that suggests the nearest names and lists all."""
        known = self._known()
        if name in known:
            return known[name]
        raise UserError(f"no {self.kind} is called {name!r}{did_you_mean(name, list(known))}")

    def names(self) -> list[str]:
        return sorted(self._known())

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._known())

    def __contains__(self, name: object) -> bool:
        return name in self._known()


class TermTable(Registry[Callable[..., Any]]):
    """Loss terms, each declared once, beside its function: ``@TABLE.term("mse", 1.0)``.

    The declaration gives the config its key and default weight, the phases their names, and the docs their table. A
    term that is registered without a weight counts where a config names it.
    """

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.weights: dict[str, float] = {}
        """Default weights, in the order of declaration."""

    def term(self, name: str, weight: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Decorator of a term that every run has unless its config says otherwise."""
        self.weights[name] = weight
        return self.register(name)


HEADS: Registry[Any] = Registry("head", "samdistill.students.heads")
"""What brings a trunk's maps to the teacher's embedding, by the names of ``student.head``."""
CODECS: Registry[Any] = Registry("codec", "samdistill.store.codecs")
"""How records are stored, by the names of ``cache.codec``."""
MATCHERS: Registry[Any] = Registry("matcher", "samdistill.ops.matching")
"""How queries are paired, by the names of ``match.method``."""


def did_you_mean(word: str, known: list[str]) -> str:
    """The tail of an error message: ``; did you mean 'x'?`` or the list of what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is: {', '.join(sorted(known))}" if known else ""
