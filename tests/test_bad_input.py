"""Bad input of every kind: exit status 2 and one line that says where, what was found, and what to do."""

from __future__ import annotations

import io
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

from bad_input import evaluation, models, pipelines, recipes, rows, settings, surroundings
from bad_input.case import Case, World
from tandem.cli import main

CASES = [
    case for table in (settings, recipes, rows, models, surroundings, evaluation, pipelines) for case in table.cases()
]


@pytest.fixture
def world(tmp_path: Path, tiny, tiny_reward: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return World(tmp_path, tiny(), tiny_reward)


def test_there_are_many_cases_and_each_is_another():
    assert len(CASES) >= 220
    assert [name for name, count in Counter(case.name for case in CASES).items() if count > 1] == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input_is_refused_in_one_line(case: Case, world: World, capsys: pytest.CaptureFixture[str]):
    words = list(case.make(world))
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.startswith("tandem: ")
    assert len(said.strip().splitlines()) == 1, said
    assert len(said) < 1500
    assert "Traceback" not in said
    assert [part for part in case.said if part not in said] == [], said
    assert not list(world.folder.rglob("exploded"))
    assert not list(world.folder.rglob("summary.json"))


GOOD_FILES = {
    "a byte order mark": ("p.jsonl", b'\xef\xbb\xbf{"prompt": "the sea"}\n'),
    "CRLF": ("p.jsonl", b'{"prompt": "the sea"}\r\n{"prompt": "a film"}\r\n'),
    "no line break at the end": ("p.jsonl", b'{"prompt": "the sea"}'),
    "blank lines": ("p.jsonl", b'\n{"prompt": "the sea"}\n\n'),
    "a capital suffix": ("p.JSONL", b'{"prompt": "the sea"}\n'),
    "a table's byte order mark and CRLF": ("p.csv", b"\xef\xbb\xbfprompt,n\r\nthe sea,1\r\n"),
    "a line break in a field": ("p.csv", b'prompt,n\n"the\nsea",1\n'),
    "a zero byte spelt out": ("p.jsonl", b'{"prompt": "the\\u0000 sea"}\n'),
    "a whole character of two halves": ("p.jsonl", b'{"prompt": "\\ud83d\\ude00"}\n'),
    "NaN beside the prompt": ("p.jsonl", b'{"prompt": "the sea", "label": NaN}\n'),
}


@pytest.mark.parametrize("name", GOOD_FILES)
def test_what_only_looks_bad_is_read(name: str, tmp_path: Path):
    from tandem.config import PromptsSection
    from tandem.data.prompts import read_prompts
    from tiny import make_tokenizer

    file, content = GOOD_FILES[name]
    (tmp_path / file).write_bytes(content)
    assert read_prompts(PromptsSection(prompts=str(tmp_path / file)), make_tokenizer(), Counter())


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path: Path):
    from tandem.config import SftConfig
    from tandem.recipe import load_config

    (tmp_path / "r.toml").write_bytes(b'\xef\xbb\xbfmodel = "m"\r\n[data]\r\ntrain = "t.jsonl"\r\n')
    assert load_config(SftConfig, tmp_path / "r.toml", []).model == "m"


def test_a_read_only_folder_is_refused(world: World, capsys: pytest.CaptureFixture[str]):
    if os.geteuid() == 0:
        pytest.skip("the superuser writes into read-only folders")
    (world.folder / "kept").mkdir(mode=0o555)
    assert main(world.words("sft", directory=world.folder / "kept" / "run")) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_no_eos_is_warned_of(world: World, capsys: pytest.CaptureFixture[str]):
    words = [word for word in models._without_eos(world) if "missing_eos_penalty" not in word]
    assert main(words) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "WARNING: policy.model has no EOS token" in said
    assert "every one has rollout.max_new_tokens = 4 tokens" in said
