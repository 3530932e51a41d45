"""From a recipe to a configuration: one TOML file, any field overridden on the command line, all checked at once."""

from __future__ import annotations

import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from tandem.config import DpoConfig, EvalConfig, PpoConfig, RewardConfig, SftConfig
from tandem.errors import InputError
from tandem.pipeline_config import PipelineConfig

RECORD = "run.json"
# Sections that can be given in one word, and the key that the word is the value of: `--cluster ray`.
_IN_ONE_WORD = {"cluster": "kind"}

StageConfig = TypeVar("StageConfig", SftConfig, RewardConfig, DpoConfig, PpoConfig, EvalConfig, PipelineConfig)


def load_config(kind: type[StageConfig], recipe: Path | None, overrides: Sequence[str]) -> StageConfig:
    """Read a recipe, apply `--section.key value` overrides, check the whole.

    Raises InputError for a file that cannot be read, an unknown key, a wrong type or an impossible combination.
    """
    tree = read_tree(recipe, overrides)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        origin = f"{recipe}" if recipe else "the command line"
        raise InputError(_explain(error, kind, origin)) from None


def read_tree(recipe: Path | None, overrides: Sequence[str]) -> dict[str, Any]:
    """What a recipe says with its overrides, unchecked. Raises InputError for what cannot be read."""
    tree: dict[str, Any] = {} if recipe is None else read_toml(recipe)
    for path, value in parse_overrides(overrides):
        _set(tree, path, value)
    return tree


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
    run = Path(named)
    found = read_record(run)["stage"]
    if found == "eval":
        raise InputError(f"--resume {named}: that is an evaluation, which keeps nothing to go on from; run it again.")
    if found != stage:
        raise InputError(f"--resume {named}: that is a run of another stage; go on by tandem {found} --resume {named}.")
    return run, rest


def read_record(run: Path) -> dict[str, Any]:
    """What a run began with, the command that made it among it. Raises InputError where the folder holds none."""
    try:
        record = json.loads((run / RECORD).read_text(encoding="utf-8"))
        return {**record, "stage": str(record["stage"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {RECORD}" if isinstance(error, FileNotFoundError) else f"its {RECORD} cannot be read"
        raise InputError(f"--resume {run}: the folder holds no run that can go on ({reason}).") from error


def command_to_resume(stage: str, run: Path) -> str:
    """The command by which a run goes on; a stage of a pipeline goes on with the whole of it."""
    try:
        if read_record(run.parent)["stage"] == "pipeline":
            return f"tandem pipeline --resume {run.parent}"
    except InputError:
        pass
    return f"tandem {stage} --resume {run}"


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
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such recipe; give the path of a TOML file.") from None
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read as a recipe ({error.strerror}); give the path of a TOML file."
        ) from None
    except UnicodeDecodeError:
        raise InputError(f"{path}: is not UTF-8 text, so not a TOML recipe; save it as UTF-8.") from None
    except RecursionError:
        raise InputError(f"{path}: is not a recipe: its values are nested too deeply.") from None
    except ValueError as error:
        raise InputError(f"{path}: is not valid TOML: {error}.") from None


def parse_overrides(words: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
    """`--a.b 1`, `--a.b=1` -> (["a", "b"], 1); a value is read as TOML, else as the plain text that it is."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise InputError(
                f"{_shown(word)} was not understood: settings are given as --section.key value, after the recipe."
            )
        name, equals, text = word[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                follows = f", and what follows is {_shown(rest[0])}" if rest else ""
                raise InputError(f"--{_cut(name)} needs a value{follows}; give it as --{_cut(name)}=VALUE.")
            text = rest.pop(0)
        keys = name.replace("-", "_").split(".")
        if "" in keys:
            raise InputError(f"{_shown(word)} was not understood: its name has an empty part; --help lists every key.")
        if keys[-1] in _IN_ONE_WORD:
            keys.append(_IN_ONE_WORD[keys[-1]])
        yield keys, _toml_value(text)


def _toml_value(text: str) -> Any:
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return found["value"] if found.keys() == {"value"} else text


def _index(key: str) -> int | None:
    """The key as a place in a list, or None where it is none."""
    return int(key) if key.isascii() and key.isdigit() and len(key) < 10 else None


def _set(tree: dict[str, Any], path: list[str], value: Any) -> None:
    node: Any = tree
    for here, key in enumerate(path):
        last = here == len(path) - 1
        if isinstance(node, list):
            slot: Any = _index(key)
            if slot is None or slot > len(node):
                raise InputError(f"--{'.'.join(path)}: {key!r} must be an index from 0 to {len(node)}.")
            if slot == len(node):
                node.append({})
        elif isinstance(node, dict):
            slot = key
            if not last:
                node.setdefault(key, {} if _index(path[here + 1]) is None else [])
        else:
            raise InputError(f"--{'.'.join(path)}: {'.'.join(path[:here])} is a value, not a section.")
        if last:
            node[slot] = value
        else:
            node = node[slot]


def _explain(error: ValidationError, kind: type[BaseModel], origin: str) -> str:
    return f"{origin}: " + "; ".join(_problem(found, kind) for found in error.errors()) + "."


def _problem(found: ErrorDetails, kind: type[BaseModel]) -> str:
    """One thing that is wrong: where, what was given, what is allowed."""
    where = ".".join(str(part) for part in found["loc"])
    given, message = found["input"], found["msg"].removeprefix("Value error, ")
    match found["type"]:
        case "extra_forbidden":
            return f"{_cut(where)} = {_shown(given)} is not a known key{_meant(where, kind)}"
        case "missing":
            return f"{where} is missing and has no default; give it as --{where} VALUE or in the recipe"
        case "value_error":
            return f"{where}: {message}" if where else message
        case "model_type":
            return f"{where} = {_shown(given)}: must be a section of keys, such as --{where}.KEY VALUE or [{where}]"
        case "list_type" if isinstance(given, dict):
            return f"{where} = {_shown(given)}: must be a list; in a recipe its items are written as [[{where}]]"
        case "string_type" if isinstance(given, bool | int | float | date | time):
            return f"{where} = {_shown(given)}: must be text; quote it"
    return f"{_cut(where)} = {_shown(given)}: {message[0].lower()}{message[1:]}"


def _meant(where: str, kind: type[BaseModel]) -> str:
    """What an unknown key may have been meant to be."""
    places = [part for part in where.split(".") if part.isdigit()]
    fields = [name for name, _ in fields_of(kind)]
    sections = {name.rpartition(".")[0] for name in fields if "." in name}
    as_first = ".".join("0" if part.isdigit() else part for part in where.split("."))
    close = difflib.get_close_matches(as_first, [*fields, *sections], n=1, cutoff=0.6)
    same_leaf = [name for name in fields if name.rpartition(".")[2] == where.rpartition(".")[2]]
    if not (close or same_leaf):
        return "; --help lists every key"
    hint = (close or same_leaf)[0]
    return f"; did you mean {hint.replace('.0.', f'.{places[0]}.') if places else hint}?"


def _shown(value: Any) -> str:
    try:
        return _cut(repr(value))
    except (ValueError, RecursionError):
        return "a value too large to show"


def _cut(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."


def fields_of(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf field of a configuration with its dotted name, in the order of declaration.

    Fields that are not written down, since they are nobody's to set, are left out.
    """
    for name, field in kind.model_fields.items():
        if field.exclude:
            continue
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
