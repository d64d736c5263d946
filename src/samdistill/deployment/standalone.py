"""The ``predict.py`` of an export: the modules of ``runtime`` joined to one file that needs no other."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.resources import files

MODULES = (
    "ops/sights", "ops/pixels", "deployment/runtime/files", "deployment/runtime/phrases", "deployment/runtime/images",
    "deployment/runtime/video", "deployment/runtime/model", "deployment/runtime/command",
)  # fmt: skip
"""The joined modules, each after those whose names it uses at import. The last one is the command."""


def standalone() -> str:
    """Return the source of ``predict.py``.

    Example:
        >>> standalone().startswith("#!/usr/bin/env python3")
        True
    """
    package = files("samdistill")
    return joined([package.joinpath(f"{name}.py").read_text(encoding="utf-8") for name in MODULES])


def joined(sources: Sequence[str]) -> str:
    """Join modules to one: the imports from outside first, then the bodies.

    Relative imports and ``if TYPE_CHECKING`` are left out. A definition that an earlier module has too is left out.

    Args:
        sources: Sources of the modules. The docstring of the last one becomes that of the result; the others become
            comments above the bodies.

    Raises:
        ValueError: Two modules define a name differently, or a relative import renames something.

    Example:
        >>> numbers = '"Numbers."\\nimport math\\nA = math.pi\\n'
        >>> print(joined([numbers, '"Prints."\\nfrom .numbers import A\\nprint(A)\\n']))
        #!/usr/bin/env python3
        "Prints."
        <BLANKLINE>
        from __future__ import annotations
        <BLANKLINE>
        import math
        <BLANKLINE>
        # Numbers.
        <BLANKLINE>
        A = math.pi
        <BLANKLINE>
        # Prints.
        <BLANKLINE>
        print(A)
        <BLANKLINE>
    """
    trees = [ast.parse(source) for source in sources]
    defined: dict[str, str] = {}
    bodies = []
    for source, tree in zip(sources, trees, strict=True):
        title = (ast.get_docstring(tree) or "").partition("\n")[0]
        bodies.append(f"# {title}\n\n{_body(source, tree, defined)}\n")
    about = ast.get_source_segment(sources[-1], trees[-1].body[0])
    head = f"#!/usr/bin/env python3\n{about}\n\nfrom __future__ import annotations\n"
    return "\n".join([head, *_imports(trees), "", *bodies])


def _imports(trees: Sequence[ast.Module]) -> Iterator[str]:
    """Return the imports from outside, those of the standard library first and without those for types alone."""
    whole, names = set[str](), defaultdict[str, set[str]](set)
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.Import):
            whole.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module not in (None, "__future__"):
            names[str(node.module)].update(ast.unparse(one) for one in node.names)
    names["typing"].discard("TYPE_CHECKING")
    lines = sorted(whole) + [f"from {module} import {', '.join(sorted(found))}" for module, found in names.items()]
    foreign = [line for line in lines if line.split()[1].partition(".")[0] in ("numpy", "PIL")]
    yield from sorted((line for line in lines if line not in foreign), key=lambda line: (line[0] == "f", line))
    yield ""
    yield from foreign


def _body(source: str, tree: ast.Module, defined: dict[str, str]) -> str:
    """Return a module without its docstring and imports, with the comments between its definitions."""
    lines, kept = source.splitlines(), []
    end = tree.body[0].end_lineno or 0
    again = False
    for node in tree.body[1:]:
        start, end = end, node.end_lineno or end
        if isinstance(node, ast.ImportFrom) and node.level and any(one.asname for one in node.names):
            raise ValueError(f"{ast.unparse(node)}: a joined module cannot rename an import from another")
        if isinstance(node, ast.Import | ast.ImportFrom) or (isinstance(node, ast.If) and _for_types(node)):
            continue
        if not (again and isinstance(node, ast.Expr)):  # the docstring of a constant goes with it
            again = _again(node, defined)
        if not again:
            kept.append("\n".join(lines[start:end]))
    return "\n".join(kept).strip("\n")


def _for_types(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _again(node: ast.stmt, defined: dict[str, str]) -> bool:
    """Return whether an earlier module has the same definition."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        names = [node.name]
    else:
        stored = (one for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store))
        names = [one.id for one in stored] if isinstance(node, ast.Assign | ast.AnnAssign) else []
    found = ast.dump(node)
    if different := [name for name in names if defined.get(name, found) != found]:
        raise ValueError(f"{different[0]} has two definitions in the modules that are joined")
    again = bool(names) and all(name in defined for name in names)
    defined.update(dict.fromkeys(names, found))
    return again
