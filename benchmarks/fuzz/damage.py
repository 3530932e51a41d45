"""How an input is damaged: its bytes and lines, or the tree that it spells."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, MutableMapping, MutableSequence
from typing import Any

NASTY_BYTES = [
    *(b"\x00", b"\xff", b"\xfe\xff", b"\xef\xbb\xbf", b"\x1f\x8b", b"\x80", b"\xed\xa0\x80", b"PAR1", b"\x85"),
    *(b"\r", b"\n", b"\r\n\r\n", b"\t", "\u2028".encode(), "\u202e".encode(), b"\x1b[31m", b"A" * 70_000),
    *(b"\\", b'"', b"'", b'"""', b"{", b"}", b"]", b"[[", b"[" * 3000, b",", b",,", b";", b"=", b"#", b"//"),
    *(b"\\ud800", b"\\u0000", b"NaN", b"Infinity", b"null", b"None", b"true", b"inf"),
    *(b"-", b"1e999", b"9" * 5000, b"0x"),
]
NASTY_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.0, -0.0, 1e-320, 1e308),
    *(float("inf"), float("-inf"), float("nan")),
    *("", " ", "\n", "\t \u2003", "\x00", "\ud800", "a\udfff", "\u202e", "\ufeff", "a\nb", "é" * 300, "x" * 100_000),
    *("true", "1e-6", "inf", "{stage}", "../..", "/proc/self/mem", "~", "-1", "--steps", "[1]"),
    *([], {}, [[]], [None], [{}], {"": None}, ["user"], {"role": "user"}),
    [{"role": "user", "content": None}],
    [{"role": "robot", "content": "x"}],
    [{"role": "assistant", "content": "x"}],
    [{"role": "user", "content": ""}],
    [{"role": ["user"], "content": "x"}],
]


def damaged_bytes(content: bytes, chance: random.Random) -> bytes:
    """One to four changes of bytes or lines."""
    for _ in range(chance.randint(1, 4)):
        content = chance.choice(_OF_BYTES)(content, chance)
    return content


def _flip(content: bytes, chance: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(min(len(content), chance.randint(1, 8))):
        changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randint(0, len(content))]


def _remove(content: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(content))
    return content[:start] + content[start + chance.randint(1, 40) :]


def _insert(content: bytes, chance: random.Random) -> bytes:
    start = chance.randint(0, len(content))
    return content[:start] + chance.choice(NASTY_BYTES) + content[start:]


def _lines(content: bytes, chance: random.Random) -> bytes:
    """A line removed, doubled, cut short or put elsewhere."""
    lines = content.splitlines(keepends=True)
    if not lines:
        return content
    place = chance.randrange(len(lines))
    line = lines.pop(place)
    cut = line[: chance.randint(0, len(line))]
    lines[place:place] = chance.choice([[], [line, line], [cut], [cut + b"\n"]])
    if chance.random() < 0.3:
        chance.shuffle(lines)
    return b"".join(lines)


_OF_BYTES: list[Callable[[bytes, random.Random], bytes]] = [_flip, _cut, _remove, _insert, _insert, _lines, _lines]


def damaged_tree(tree: Any, chance: random.Random) -> Any:
    """One to three changes of a tree of dictionaries, lists and values."""
    holder = {"root": copy.deepcopy(tree)}
    for _ in range(chance.randint(1, 3)):
        places = list(_places(holder))
        if places:
            chance.choice(_OF_TREES)(*chance.choice(places), chance)
    return holder.get("root")


Node = MutableMapping[Any, Any] | MutableSequence[Any]


def _places(node: Any) -> Any:
    """Every place in a tree, as the node that holds it and the key there."""
    keys = list(node) if isinstance(node, MutableMapping) else range(len(node))
    for key in keys:
        yield node, key
        if isinstance(node[key], MutableMapping | MutableSequence):
            yield from _places(node[key])


def _replace(node: Any, key: Any, chance: random.Random) -> None:
    node[key] = copy.deepcopy(chance.choice(NASTY_VALUES))


def _drop(node: Any, key: Any, chance: random.Random) -> None:
    del chance
    del node[key]


def _wrap(node: Any, key: Any, chance: random.Random) -> None:
    node[key] = chance.choice([[node[key]], {"x": node[key]}, [node[key], copy.deepcopy(node[key])], str(node[key])])


def _rename(node: Any, key: Any, chance: random.Random) -> None:
    if isinstance(node, MutableMapping):
        name = str(key)
        others = [name.upper(), name + "s", name[:-1], "", name.replace("_", "-"), f"{name}.x", "\n", "text", "prompt"]
        node[chance.choice(others)] = node.pop(key)


def _double(node: Any, key: Any, chance: random.Random) -> None:
    """The value of one place at another."""
    keys = list(node) if isinstance(node, MutableMapping) else range(len(node))
    node[chance.choice(list(keys))] = copy.deepcopy(node[key])


_OF_TREES: list[Callable[[Any, Any, random.Random], None]] = [
    _replace,
    _replace,
    _replace,
    _drop,
    _wrap,
    _rename,
    _double,
]
