"""Recipes that cannot be read, and command lines that are none."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from bad_input.case import Case, World

VALID = b'model = "m"\n[data]\ntrain = "t.jsonl"\n'

# Name, the recipe's bytes, and what must be said beside the recipe's name.
CONTENTS = [
    ("a value left out", b"epochs = \n", "not valid TOML", "line 1"),
    ("a text without its end", b'model = "m\n', "not valid TOML", "line 1"),
    ("text without quotes", b"model = m\n", "not valid TOML", "line 1"),
    ("single-quoted wrongly", b"model = 'm\"\n", "not valid TOML"),
    ("a key twice", b'model = "a"\nmodel = "b"\n', "not valid TOML", "line 2"),
    ("a section twice", VALID + b"[data]\nmax_tokens = 5\n", "not valid TOML", "line 4"),
    ("a section over a value", b'data = "x"\n[data]\ntrain = "t"\n', "not valid TOML"),
    ("a bad escape", b'model = "C:\\models"\n', "not valid TOML", "line 1"),
    ("YAML", b"model: m\ndata:\n  train: t.jsonl\n", "not valid TOML", "line 1"),
    ("JSON", b'{"model": "m"}\n', "not valid TOML", "line 1"),
    ("a colon for an equals sign", b'model: "m"\n', "not valid TOML"),
    ("True with a capital", b'model = "m"\nfast = True\n', "not valid TOML", "line 2"),
    ("None", b'model = "m"\nadapters = None\n', "not valid TOML"),
    ("a number with a comma", VALID + b"max_tokens = 1,024\n", "not valid TOML"),
    ("a number with a leading zero", VALID + b"max_tokens = 0512\n", "not valid TOML"),
    ("a bracket left open", b'model = "m"\n[data\n', "not valid TOML", "line 2"),
    ("a list left open", b"betas = [0.9,\n", "not valid TOML"),
    ("a zero byte", b'model = "m\x00"\n', "not valid TOML"),
    ("UTF-16", VALID.decode().encode("utf-16"), "not UTF-8", "save it as UTF-8"),
    ("Latin-1", 'model = "modèle"\n'.encode("latin-1"), "not UTF-8", "save it as UTF-8"),
    ("a binary file", bytes(range(128, 256)), "not UTF-8"),
    ("a number of 5,000 digits", b"epochs = " + b"9" * 5000 + b"\n", "not valid TOML"),
    ("lists in lists", b"x = " + b"[" * 20_000 + b"]" * 20_000, "nested too deeply"),
    ("an empty file", b"", "model is missing", "data is missing", "no default"),
    ("comments only", b'# model = "m"\n', "model is missing"),
    ("no data", b'model = "m"\n', "data is missing"),
    ("no train", b'model = "m"\n[data]\nmax_tokens = 5\n', "data.train is missing"),
    ("a key with a line break", b'"a\\nb" = 1\n' + VALID, "not a known key"),
    ("a key of a megabyte", b"k" * 1_000_000 + b" = 1\n" + VALID, "kkk...", "not a known key"),
    ("another stage's recipe", b'eval_every = 5\n[policy]\nmodel = "m"\n', "policy = ", "is not a known key"),
    ("sections as a list", b'[[data]]\ntrain = "t"\n', "data = [{", "must be a section"),
    ("a date", b"model = 2024-01-01\n[data]\ntrain = 't'\n", "model = datetime.date", "quote it"),
    ("an infinity", b"epochs = inf\n" + VALID, "epochs = inf", "finite"),
    ("a key in the wrong section", VALID + b"epochs = 2\n", "data.epochs = 2", "did you mean epochs"),
]

# Name, words of the command line, and what must be said.
COMMANDS = [
    ("no command", [], "COMMAND", "--help"),
    ("an unknown command", ["frobnicate"], "invalid choice", "'frobnicate'", "ppo"),
    ("a command nearly right", ["pppo"], "invalid choice", "'pppo'", "--help"),
    ("an unknown option before the command", ["--verbose"], "COMMAND", "--help"),
    ("no such recipe", ["sft", "none.toml"], "none.toml", "there is no such recipe", "TOML file"),
    ("a command in place of a recipe", ["sft", "train"], "train: there is no such recipe"),
    ("an empty name", ["sft", ""], "cannot be read as a recipe"),
    ("a folder as recipe", ["sft", "/"], "/: cannot be read as a recipe", "Is a directory"),
    ("a name too long", ["sft", "x" * 400], "cannot be read as a recipe", "name too long"),
    ("generate without a model", ["generate"], "model", "--help"),
    ("generate with an unknown option", ["generate", "m", "--prompt", "x", "--max-tokens", "5"], "'--max-tokens 5'"),
    ("generate cold", ["generate", "m", "--prompt", "x", "--temperature", "0"], "'0' is not a number above 0", "top-k"),
    ("generate nan", ["generate", "m", "--prompt", "x", "--temperature", "nan"], "'nan' is not a number"),
    ("generate top-p", ["generate", "m", "--prompt", "x", "--top-p", "2"], "'2' is not a number above 0 and at most 1"),
    ("generate top-k", ["generate", "m", "--prompt", "x", "--top-k", "0"], "'0' is not a whole number from 1"),
    ("generate nothing", ["generate", "m", "--prompt", "x", "--responses", "0"], "--responses", "whole number from 1"),
    ("generate half a token", ["generate", "m", "--prompt", "x", "--max-new-tokens", "1.5"], "'1.5' is not a whole"),
    ("generate by a negative seed", ["generate", "m", "--prompt", "x", "--seed", "-1"], "--seed", "from 0 to"),
    ("generate in fp16", ["generate", "m", "--prompt", "x", "--precision", "fp16"], "'fp16'", "bfloat16"),
    ("generate with no prompt text", ["generate", "m", "--prompt"], "--prompt", "expected one argument"),
    ("demo by a wrong seed", ["demo", "--seed", "x"], "--seed", "'x' is not a whole number"),
    ("demo with a setting", ["demo", "--steps", "3"], "'--steps 3' was not understood", "--help"),
]


def cases() -> Iterator[Case]:
    for name, content, *said in CONTENTS:
        yield Case(f"recipe: {name}", _recipe(content), ("recipe.toml: ", *said))
    for name, words, *said in COMMANDS:
        yield Case(f"command: {name}", _fixed(words), tuple(said))
    yield Case("recipe: below a file", _below_a_file, ("recipe.toml/x.toml", "Not a directory", "TOML file"))
    yield Case("recipe: two of them", _two, ("was not understood", "after the recipe"))
    for name, said in (("unreadable", "cannot be read as a recipe"), ("a link to itself", "symbolic links")):
        yield Case(f"recipe: {name}", _link("/proc/self/mem" if name == "unreadable" else "recipe.toml"), (said,))
    for name, prompt, said in (
        ("empty", "", "'prompt' is empty"),
        ("white space", " \t", "'prompt' is empty"),
        ("half a character", "a\udcff", "half a character"),
    ):
        yield Case(f"generate: {name}", _prompted(prompt), ("prompt 1", said))
    yield Case("generate: nothing to read", _piped(b""), ("no prompt", "--prompt TEXT"))
    yield Case("generate: Latin-1 to read", _piped("é\n".encode("latin-1")), ("standard input", "0xe9", "UTF-8"))
    yield Case("generate: a device that is none", _device("tpu"), ("'tpu'", "auto, cpu, cuda and cuda:N"))
    yield Case("generate: too long", _long, ("the longest prompt has", "--max-new-tokens is 255", "256"))
    yield Case("demo: a folder in use", _demo, ("--run-dir", "no earlier demo", "choose another folder"))


def _recipe(content: bytes) -> Callable[[World], Sequence[str]]:
    return lambda world: ["sft", str(world.write("recipe.toml", content))]


def _fixed(words: Sequence[str]) -> Callable[[World], Sequence[str]]:
    return lambda _: words


def _below_a_file(world: World) -> Sequence[str]:
    return ["sft", str(world.write("recipe.toml", VALID) / "x.toml")]


def _two(world: World) -> Sequence[str]:
    recipe = str(world.write("recipe.toml", VALID))
    return ["sft", recipe, recipe]


def _link(target: str) -> Callable[[World], Sequence[str]]:
    def make(world: World) -> Sequence[str]:
        os.symlink(target, world.folder / "recipe.toml")
        return ["sft", str(world.folder / "recipe.toml")]

    return make


def _prompted(prompt: str) -> Callable[[World], Sequence[str]]:
    return lambda world: ["generate", str(world.model), "--prompt", prompt]


def _piped(content: bytes) -> Callable[[World], Sequence[str]]:
    def make(world: World) -> Sequence[str]:
        sys.stdin = io.TextIOWrapper(io.BytesIO(content), encoding="utf-8")
        return ["generate", str(world.model)]

    return make


def _device(name: str) -> Callable[[World], Sequence[str]]:
    return lambda world: ["generate", str(world.model), "--prompt", "x", "--device", name]


def _long(world: World) -> Sequence[str]:
    return ["generate", str(world.model), "--prompt", "the sea", "--max-new-tokens", "255"]


def _demo(world: World) -> Sequence[str]:
    world.write("mine.txt", b"mine")
    return ["demo", "--quick", "--model", str(world.model), "--run-dir", str(world.folder)]
