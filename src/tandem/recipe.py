"""From a recipe to a configuration: one TOML file, any field overridden on the command line, all checked at once."""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ValidationError

from tandem.config import PpoConfig, RewardConfig, SftConfig
from tandem.errors import InputError

StageConfig = TypeVar("StageConfig", SftConfig, RewardConfig, PpoConfig)


def load_config(kind: type[StageConfig], recipe: Path | None, overrides: Sequence[str]) -> StageConfig:
    """Read a recipe, apply `--section.key value` overrides, check the whole.

    Raises InputError for a file that cannot be read, an unknown key, a wrong type or an impossible combination.
    """
    tree: dict[str, Any] = {} if recipe is None else read_toml(recipe)
    for path, value in parse_overrides(overrides):
        _set(tree, path, value)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        origin = f"{recipe}" if recipe else "the command line"
        raise InputError(_explain(error, kind, origin)) from None


def resumed_run(stage: str, words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The run that `--resume RUN` names, if it is given, and the other words.

    Raises InputError where no folder follows, or it holds no run or one of another stage.
    """
    rest = list(words)
    at = next((n for n, word in enumerate(rest) if word == "--resume" or word.startswith("--resume=")), None)
    if at is None:
        return None, rest
    _, equals, named = rest.pop(at).partition("=")
    if not equals:
        if at >= len(rest) or rest[at].startswith("--"):
            raise InputError("--resume needs the folder of a run.")
        named = rest.pop(at)
    run, found = Path(named), stage_of(Path(named))
    if found != stage:
        raise InputError(f"--resume {named}: that is a run of another stage; go on by tandem {found} --resume {named}.")
    return run, rest


def stage_of(run: Path) -> str:
    """The command that made a run. Raises InputError where the folder holds none."""
    try:
        return str(json.loads((run / "run.json").read_text(encoding="utf-8"))["stage"])
    except (OSError, ValueError, KeyError) as error:
        reason = "it has no run.json" if isinstance(error, FileNotFoundError) else "its run.json cannot be read"
        raise InputError(f"--resume {run}: the folder holds no run that can go on ({reason}).") from error


def is_finished(run: Path) -> bool:
    """Whether a run came to its end, by its summary, which is written last."""
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        return summary["interrupted"] is False
    except (OSError, ValueError, KeyError):
        return False


def read_toml(path: Path) -> dict[str, Any]:
    """Raises InputError where there is no such file or it is not TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such recipe.") from None
    except (IsADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: cannot be read as a recipe ({error.strerror}).") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text, so not a TOML recipe.") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: is not valid TOML: {error}.") from None


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
    """`--a.b 1`, `--a.b=1` -> (["a", "b"], 1); a value is read as TOML, else as the plain text that it is."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise InputError(
                f"{word!r} was not understood: settings are given as --section.key value, after the recipe."
            )
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not rest:
                raise InputError(f"--{name} needs a value.")
            text = rest.pop(0)
        yield name.replace("-", "_").split("."), _toml_value(text)


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    node: Any = tree
    for here, key in enumerate(path):
        last = here == len(path) - 1
        if isinstance(node, list):
            if not key.isdigit() or int(key) > len(node):
                raise InputError(f"--{'.'.join(path)}: {key!r} must be an index from 0 to {len(node)}.")
            if int(key) == len(node):
                node.append({})
            slot: Any = int(key)
        elif isinstance(node, dict):
            slot = key
            if not last:
                following_is_index = path[here + 1].isdigit()
                node.setdefault(key, [] if following_is_index else {})
        else:
            raise InputError(f"--{'.'.join(path)}: {'.'.join(path[:here])} is a value, not a section.")
        if last:
            node[slot] = value
        else:
            node = node[slot]


def _explain(error: ValidationError, kind: type[BaseModel], origin: str) -> str:
    lines = []
    for problem in error.errors():
        where = ".".join(str(part) for part in problem["loc"])
        given, message = problem["input"], problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "extra_forbidden":
            known = [name for name, _ in fields_of(kind)]
            close = difflib.get_close_matches(where, known, n=1, cutoff=0.6)
            leaf = [name for name in known if name.rpartition(".")[2] == where.rpartition(".")[2]]
            hint = (close or leaf)[:1]
            meant = f"; did you mean {hint[0]}?" if hint else "; --help lists every key"
            lines.append(f"{where} = {_shown(given)} is not a known key{meant}")
        elif problem["type"] == "missing":
            lines.append(f"{where} is missing and has no default")
        elif problem["type"] == "value_error":
            lines.append(f"{where}: {message}" if where else message)
        else:
            lines.append(f"{where} = {_shown(given)}: {message[0].lower()}{message[1:]}")
    return f"{origin}: " + "; ".join(lines) + "."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def fields_of(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf field of a configuration with its dotted name, in the order of declaration."""
    for name, field in kind.model_fields.items():
        section, indexed = _section_of(field.annotation)
        dotted = f"{prefix}{name}"
        if section is None:
            yield dotted, field
        else:
            yield from fields_of(section, f"{dotted}.0." if indexed else f"{dotted}.")


def _section_of(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section inside an annotation, seen through Optional and list, and whether it is a list's item."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    if typing.get_origin(annotation) is Annotated:
        return _section_of(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (types.UnionType, typing.Union, list):
        for inner in typing.get_args(annotation):
            section, indexed = _section_of(inner)
            if section is not None:
                return section, indexed or typing.get_origin(annotation) is list
    return None, False


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The leaves of a tree by their dotted names."""
    if not isinstance(tree, Mapping | list) or not tree:
        return {prefix.rstrip("."): tree}
    items = tree.items() if isinstance(tree, Mapping) else enumerate(tree)
    return {name: leaf for key, value in items for name, leaf in flat(value, f"{prefix}{key}.").items()}


def without_none(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree that TOML can hold: what is unset is left out."""

    def prune(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: prune(value) for key, value in node.items() if value is not None}
        return [prune(item) for item in node] if isinstance(node, list) else node

    return typing.cast(dict[str, Any], prune(tree))
