"""The block ``loss`` of a job: weights of its terms by name."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, create_model, model_validator

from ..registry import TermTable
from .parts import Strict, Weight


class UnknownTerm(ValueError):
    """A key of a ``loss`` block that is not a term. ``known`` lists the valid names."""

    def __init__(self, name: str, known: list[str]) -> None:
        super().__init__(f"unknown key {name!r}")
        self.name, self.known = name, known


class LossConfig(Strict):
    """Weights of loss terms by name. ``loss_block`` creates the class of a job.

    A term that is registered in one of ``TABLES`` without a default weight may be named too.
    """

    model_config = ConfigDict(extra="allow")
    TABLES: ClassVar[tuple[TermTable, ...]] = ()
    KIND: ClassVar[Any] = Weight

    @model_validator(mode="before")
    @classmethod
    def _known_terms(cls, given: Any) -> Any:
        for name, value in given.items() if isinstance(given, dict) else ():
            if name in cls.model_fields:
                continue
            if name not in cls.term_names():
                raise UnknownTerm(str(name), list(dict.fromkeys([*cls.model_fields, *cls.term_names()])))
            TypeAdapter(cls.KIND).validate_python(value)
        return given

    @classmethod
    def term_names(cls) -> tuple[str, ...]:
        """Return the names of all terms. Those with a default weight come first."""
        declared = [name for table in cls.TABLES for name in table.weights]
        return tuple(dict.fromkeys([*declared, *(name for table in cls.TABLES for name in table.names())]))

    def weight(self, name: str) -> Any:
        """Return the weight of a term, or 0 for a term that the config does not name."""
        return getattr(self, name, 0.0)

    @property
    def named(self) -> tuple[str, ...]:
        """The terms that this run uses."""
        return tuple(name for name in self.term_names() if hasattr(self, name))


def loss_block(
    name: str, text: str, tables: tuple[TermTable, ...], kind: Any = Weight, **settings: Any
) -> type[LossConfig]:
    """Create the class of a job's ``loss`` block, with a weight per term of ``tables`` that has a default.

    Args:
        name: Name of the class.
        text: Docstring of the class.
        tables: Tables of the job's terms.
        kind: Type of the weights.
        settings: Further fields, as (type, default) by name.
    """
    weights: dict[str, Any] = {term: (kind, weight) for table in tables for term, weight in table.weights.items()}
    made = create_model(name, __base__=LossConfig, __doc__=text, **weights, **settings)
    made.TABLES, made.KIND = tables, kind
    return made
