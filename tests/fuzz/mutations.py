"""How a file is damaged: seeded operators on bytes, on JSON and YAML, on weight files, and on command-line values."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch

DEEP = "@deep@"
"""Stands for a list nested beyond what any parser follows, until the text is written."""
NAMES = ["", "x", "é" * 3, "../../../outside/escaped", "/etc/passwd", "a\0b", "\ud800", "x" * 5000, "CON", "C:/x",
         "a\\b", "2020-01-01", "nan", "~", "~nobody-here", "-1", "a\nb"]  # fmt: skip
NUMBERS = [
    -1,
    0,
    1,
    2,
    3,
    7,
    1.5,
    -0.5,
    1e-30,
    255,
    2**31,
    2**63,
    10**30,
    10**400,
    float("nan"),
    float("inf"),
    float("-inf"),
]
VALUES: list[Any] = [None, True, False, [], {}, [[]], [1, 2, 3], {"a": {}}, ["x"], DEEP]


class Canary:
    """Code that a damaged file tries to run: it would create ``path``. ``argv`` is what a shell would be given."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.argv = f"touch {path}"

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return __import__("os").system, (self.argv,)

    @property
    def python(self) -> str:
        return f"open({str(self.path)!r}, 'w')\n"


def value(rng: Random) -> Any:
    """Something that is seldom what was expected."""
    return rng.choice(rng.choice([NAMES, NUMBERS, VALUES]))


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in a tree, the root's too."""
    found = [path]
    for key, inner in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        found += places(inner, (*path, key))
    return found


def mutate_tree(tree: Any, rng: Random) -> Any:
    """One to three changes of values, types, keys or lengths, each at a random place."""
    tree = json.loads(json.dumps(tree))
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        *parents, last = rng.choice(places(tree)[1:] or [(0,)])
        node = tree
        for step in parents:
            node = node[step]
        if not isinstance(node, dict | list) or not node:
            return value(rng)
        old = node[last]
        act = rng.randrange(8)
        if act < 3:
            node[last] = value(rng)
        elif act == 3:
            del node[last]
        elif act == 4 and isinstance(node, list):
            node.insert(last, old)
        elif act == 4:
            node[rng.choice(NAMES)] = node.pop(last)
        elif act == 5:
            node[last] = rng.choice([[old], {"a": old}, str(old), [old, old]])
        elif act == 6 and isinstance(old, int | float) and not isinstance(old, bool):
            node[last] = rng.choice([-old, old + 1, old * 1000, old / 3, str(old), old * 10**20])
        else:
            other = node[rng.choice(list(node) if isinstance(node, dict) else range(len(node)))]
            node[last] = other
    return tree


def as_json(tree: Any, rng: Random) -> bytes:
    deep = "[" * 50_000 + ("]" * 50_000 if rng.random() < 0.5 else "")
    return json.dumps(tree).replace(json.dumps(DEEP), deep).encode()


def mutate_bytes(data: bytes, rng: Random) -> bytes:
    """Cut, flipped, doubled, filled, emptied or in another encoding."""
    at = rng.randrange(len(data) + 1)
    end = min(len(data), at + rng.choice([1, 4, 16, 256, 4096]))
    act = rng.randrange(9)
    if act == 0:
        return data[:at]
    if act in (1, 2):
        flipped = bytearray(data)
        for _ in range(rng.choice([1, 4, 32]) if data else 0):
            # the first bytes decide how the rest is read
            place = rng.randrange(len(data) if rng.random() < 0.5 else min(len(data), 64))
            flipped[place] ^= 1 << rng.randrange(8)
        return bytes(flipped)
    if act == 3:
        return data[:at] + data[end:]
    if act == 4:
        return data[:end] + data[at:]
    if act == 5:
        return data[:at] + bytes([rng.choice([0, 255])]) * (end - at) + data[end:]
    if act == 6:
        return data[:at] + rng.randbytes(rng.choice([1, 16, 256])) + data[at:]
    if act == 7:
        return b""
    return rng.choice(
        [b"\xff\xfe" + data, b"\xef\xbb\xbf" + data, data.decode("latin-1").encode("utf-16"), b"\0" * len(data)]
    )


def mutate_json(data: bytes, rng: Random) -> bytes:
    if rng.random() < 0.2:
        return mutate_bytes(data, rng)
    return as_json(mutate_tree(json.loads(data), rng), rng)


def mutate_lines(data: bytes, rng: Random) -> bytes:
    """JSON Lines, or plain ones."""
    lines = data.splitlines()
    if rng.random() < 0.3 or not lines:
        return mutate_bytes(data, rng)
    number = rng.randrange(len(lines))
    try:
        lines[number] = mutate_json(lines[number], rng)
    except ValueError:
        lines[number] = mutate_bytes(lines[number], rng)
    return b"\n".join(lines) + b"\n"


def mutate_yaml(data: bytes, rng: Random, canary: Canary) -> bytes:
    """JSON is YAML; beside its own faults there are those that only YAML has."""
    text = data.decode()
    special = [
        f"!!python/object/apply:os.system [{json.dumps(canary.argv)}]", "2020-99-99", "2020-01-01", "!!binary x", "*a",
        "&a [*a]", "!!int x", "!!set {a}", "{? [a] : b}", "0x1G", "1_0", ".nan", ".inf", "'\t", "!!timestamp x",
        "<<: 3",        f"[&b {'[' * 5}x{']' * 5}, *b]",
    ]  # fmt: skip
    act = rng.random()
    if act < 0.15:
        return mutate_bytes(data, rng)
    if act < 0.35:
        lines = text.splitlines()
        number = rng.randrange(len(lines))
        key, colon, _ = lines[number].partition(":")
        lines[number] = f"{key}{colon} {rng.choice(special)}{',' if rng.random() < 0.8 else ''}"
        return "\n".join(lines).encode()
    if act < 0.4:
        bomb = "\n".join(f"a{i}: &a{i} [{', '.join(['x' if i == 0 else f'*a{i - 1}'] * 9)}]" for i in range(9))
        return f"{bomb}\ndata: *a8\n".encode()
    return as_json(mutate_tree(json.loads(text), rng), rng)


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    """Also a header that says something else about the same bytes."""
    if rng.random() < 0.4:
        return mutate_bytes(data, rng)
    length = struct.unpack("<Q", data[:8])[0]
    header = as_json(mutate_tree(json.loads(data[8 : 8 + length]), rng), rng)
    claimed = len(header) if rng.random() < 0.9 else rng.choice([0, 2**62, len(header) - 1])
    return struct.pack("<Q", claimed) + header + data[8 + length :]


def mutate_torch(path: Path, rng: Random, canary: Canary) -> None:
    """A torch file in place: damaged, with other values in it, or with code."""
    act = rng.random()
    if act < 0.4:
        path.write_bytes(mutate_bytes(path.read_bytes(), rng))
        return
    content = torch.load(path, map_location="cpu", weights_only=True)
    nodes = [content, *(inner for inner in content.values() if isinstance(inner, dict) and inner)]
    node = rng.choice(nodes)
    for _ in range(rng.choice([1, 2])):
        key = rng.choice(list(node))
        old = node[key]
        odd = [None, 3, 10**30, float("nan"), "x", "\ud800", [], {}, [old], {"a": old}, torch.zeros(0),
               torch.ones(2, 3), torch.tensor(float("nan")), torch.ones(3, dtype=torch.complex64),
               torch.ones(2, dtype=torch.int64), torch.eye(3).to_sparse()]  # fmt: skip
        dense = isinstance(old, torch.Tensor) and old.layout == torch.strided  # a first change may be a sparse one
        if dense and rng.random() < 0.5:
            odd = [old.double(), old.int(), old.t() if old.ndim == 2 else old[None], old[:1] if old.ndim else old,
                   torch.full_like(old, float("nan")) if old.is_floating_point() else -old.int()]  # fmt: skip
        node[key] = rng.choice(odd)
    if act < 0.5:
        node[rng.choice([1, "new", ("a", 1), ""])] = node.pop(key)
    if act < 0.55:
        node[key] = node
    if act > 0.9:
        node[key] = canary
        with path.open("wb") as file:
            pickle.dump(content, file) if act > 0.97 else torch.save(content, file)
        return
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.9)


def mutate_file(path: Path, rng: Random, canary: Canary) -> None:
    """Damage a file in place as its kind allows."""
    data, suffix = path.read_bytes(), path.suffix
    if rng.random() < 0.02:
        path.unlink()
        rng.choice(
            [path.mkdir, lambda: path.symlink_to("/etc/hostname"), lambda: None, lambda: path.symlink_to(path.name)]
        )()
    elif suffix in (".pt", ".pth"):
        mutate_torch(path, rng, canary)
    elif suffix == ".json":
        path.write_bytes(mutate_json(data, rng))
    elif suffix in (".jsonl", ".txt"):
        path.write_bytes(mutate_lines(data, rng))
    elif suffix == ".yaml" and data.startswith(b"{"):
        path.write_bytes(mutate_yaml(data, rng, canary))
    elif suffix == ".safetensors":
        path.write_bytes(mutate_safetensors(data, rng))
    else:
        path.write_bytes(mutate_bytes(data, rng))


def plant(folder: Path, rng: Random, canary: Canary) -> None:
    """In a model folder: code beside the weights, and a configuration that asks for it."""
    (folder / "evil.py").write_text(canary.python)
    for name in ("config.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            continue
        settings = json.loads((folder / name).read_text())
        targets = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor")
        settings["auto_map"] = {target: "evil.Evil" for target in targets}
        if rng.random() < 0.5:
            settings["model_type"] = "evil"
        if rng.random() < 0.3:
            settings |= {"_attn_implementation": "someone/kernel", "tokenizer_class": "Evil"}
        (folder / name).write_text(json.dumps(settings))
