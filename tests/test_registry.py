"""The name table: what it holds, and what it says about a name that it does not hold."""

from __future__ import annotations

import pytest

from samdistill.registry import Registry, TermTable, did_you_mean
from samdistill.types import UserError


@pytest.fixture
def shapes() -> Registry[type]:
    registry: Registry[type] = Registry("shape")
    for name in ("square", "circle"):
        registry.register(name)(type(name, (), {}))
    return registry


def test_registered_things_come_back_unchanged_and_sorted(shapes: Registry[type]) -> None:
    class Star:
        pass

    assert shapes.register("star")(Star) is Star  # a decorator that leaves its class alone
    assert shapes.get("star") is Star
    assert shapes.names() == list(shapes) == ["circle", "square", "star"]
    assert len(shapes) == 3 and "star" in shapes and "Star" not in shapes


def test_a_second_registration_is_refused_and_the_first_stays(shapes: Registry[type]) -> None:
    first = shapes.get("circle")
    with pytest.raises(ValueError, match="shape 'circle' is registered twice"):
        shapes.register("circle")
    assert shapes.get("circle") is first


def test_a_typo_gets_a_suggestion_and_nonsense_the_list(shapes: Registry[type]) -> None:
    with pytest.raises(UserError, match=r"^no shape is called 'circel'; did you mean 'circle'\?$"):
        shapes.get("circel")
    with pytest.raises(UserError, match=r"^no shape is called 'zzz'; there is: circle, square$"):
        shapes.get("zzz")


def test_nothing_is_suggested_from_nothing() -> None:
    assert did_you_mean("anything", []) == ""
    assert did_you_mean("b", ["y", "x"]) == "; there is: x, y"


def test_optional_terms_have_a_published_weight_and_no_default() -> None:
    table = TermTable("term")
    table.term("on", 2.0)(abs)
    table.optional("off", 3.0)(abs)
    assert (table.weights, table.published, table.names()) == ({"on": 2.0}, {"off": 3.0}, ["off", "on"])
    with pytest.raises(ValueError, match="registered twice"):
        table.optional("off", 1.0)
