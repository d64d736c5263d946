"""A name-to-thing table that explains itself: what is registered can be listed, and a typo gets a suggestion."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """``@REGISTRY.register("name")`` on a class or function; ``REGISTRY.get("name")`` later."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

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
        if name in self._entries:
            return self._entries[name]
        raise UserError(f"no {self.kind} is called {name!r}{did_you_mean(name, list(self._entries))}")

    def names(self) -> list[str]:
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries


def did_you_mean(word: str, known: list[str]) -> str:
    """The tail of an error message: ``; did you mean 'x'?`` or the list of what there is."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; there is: {', '.join(sorted(known))}" if known else ""
