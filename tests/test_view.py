"""The report and the viewer: what they read, what they compute, what they serve, and what they refuse."""

from __future__ import annotations

import http.client
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from made_run import make_run, metrics_row, sample, write_lines
from tandem import algo
from tandem.cli import main
from tandem.errors import InputError
from tandem.view.curves import curves
from tandem.view.export import export
from tandem.view.metrics import JOINT, describe
from tandem.view.page import embedded, static_file
from tandem.view.pieces import pieces_of
from tandem.view.quantities import QUANTITIES, TokenNumbers, outcomes, td_errors
from tandem.view.reading import read_run
from tandem.view.report import REPORT, report_content, reported, write_report
from tandem.view.sample_index import SampleIndex, index_content
from tandem.view.samples import parse_sample, sample_content, short
from tandem.view.server import ViewServer
from tiny import make_tokenizer

ROOT = Path(__file__).parents[1]
BY_NAME = {quantity.name: quantity for quantity in QUANTITIES}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "ppo")


# --- per-token quantities, held against the library's own mathematics


def numbers(gamma=1.0, bootstrapped=False, final_value=float("nan"), **arrays: list[float]) -> TokenNumbers:
    length = len(next(iter(arrays.values())))
    return TokenNumbers(length, {k: np.array(v) for k, v in arrays.items()}, gamma, bootstrapped, final_value)


@pytest.mark.parametrize("bootstrapped", [False, True])
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_td_errors_and_outcomes_are_those_of_the_estimator(gamma, bootstrapped):
    rng = random.Random(0)
    rewards, values = ([rng.gauss(0, 1) for _ in range(7)] for _ in "ab")
    given = numbers(gamma, bootstrapped, 0.7, rewards=rewards, values=values)
    mask = torch.ones(1, 7, dtype=torch.bool)
    after = torch.tensor([0.7 if bootstrapped else 0.0], dtype=torch.float64)
    tensors = [torch.tensor([row], dtype=torch.float64) for row in (rewards, values)]
    expected = algo.gae(*tensors, mask, gamma=gamma, lam=0.0, final_values=after)
    assert td_errors(given).tolist() == pytest.approx(expected[0].tolist())
    earned = algo.gae(tensors[0], torch.zeros(1, 7, dtype=torch.float64), mask, gamma=gamma, lam=1.0)
    known = [float("nan")] * 7 if bootstrapped else earned[0].tolist()
    assert outcomes(given).tolist() == pytest.approx(known, nan_ok=True)


def test_log_ratios_and_ratios():
    given = numbers(
        logprobs=[-1.0, -2.0, -800.0],
        reference_logprobs=[-1.5, np.nan, -1.0],
        behaviour_logprobs=[-1.0, -2.5, -1.0e-9],
    )
    assert short(BY_NAME["kl"].of(given)) == [0.5, None, -799.0]
    assert short(BY_NAME["ratio"].of(given)) == [1.0, round(2.718281828**0.5, 6), 0.0]
    assert short(BY_NAME["surprise"].of(given)) == [1.0, 2.0, 800.0]
    assert short(BY_NAME["advantage"].of(given)) == [None, None, None]


def test_without_the_value_after_a_cut_response_its_last_td_error_is_not_known():
    given = numbers(bootstrapped=True, rewards=[0.0, 1.0], values=[0.5, 0.25])
    assert short(td_errors(given)) == [-0.25, None]


def test_numbers_that_are_none_and_arrays_of_another_length_are_gaps(run):
    row = sample(random.Random(1), "a", [" a", " b", " c"], values=[1.0, None, "x", 3.0], rewards=[1.0], returns={})
    found = parse_sample(row | {"advantages": [10**400, True, [1]]}, read_run(run))
    assert short(found.numbers["values"]) == [1.0, None, None]
    assert short(found.numbers["rewards"]) == [1.0, None, None]
    assert short(found.numbers["advantages"]) == [None, None, None]
    assert short(found.numbers["returns"]) == [None, None, None]


# --- the text of tokens


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=30))
def test_pieces_of_a_byte_level_tokenizer_make_up_the_response(text):
    tokenizer = TOKENIZER
    ids = tokenizer(text, add_special_tokens=False).input_ids
    response = tokenizer.decode(ids)
    pieces = pieces_of([tokenizer.decode([token]) for token in ids], response)
    assert len(pieces) == len(ids)
    assert "".join(piece.text for piece in pieces) == response


TOKENIZER = make_tokenizer()


def test_a_character_of_several_tokens_stands_at_the_first_of_them():
    ids = TOKENIZER("a 🌊 b", add_special_tokens=False).input_ids
    tokens = [TOKENIZER.decode([token]) for token in ids]
    assert sum("\ufffd" in token for token in tokens) > 2
    pieces = pieces_of(tokens, "a 🌊 b")
    assert pieces[0].text == "a"
    assert sum("🌊" in piece.text for piece in pieces) == 1
    assert {piece.text for piece in pieces if piece.kind == "part"} == {""}


def test_spaces_that_decoding_a_token_alone_loses_are_found_in_the_response():
    assert [piece.text for piece in pieces_of(["the", "sea", "."], "the sea.")] == ["the", " sea", "."]


def test_what_is_not_in_the_response_is_special():
    pieces = pieces_of([" quiet", "</s>"], " quiet")
    assert [(piece.text, piece.kind) for piece in pieces] == [(" quiet", "text"), ("</s>", "special")]


# --- reading whatever a run has left


def test_a_run_that_was_cut_short_is_read_as_far_as_it_goes(run):
    (run / "summary.json").unlink()
    lines = [json.dumps(metrics_row(step)) for step in (1, 2, 3, 2)]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 4, "objective/sc']))
    with (run / "rollouts" / "step_000004.jsonl").open("a") as file:
        file.write('{"prompt": "half a li')
    found = read_run(run)
    assert [row["step"] for row in found.metrics] == [1, 2, 3]
    assert found.stage == "ppo"
    content = index_content(SampleIndex(found).refresh())
    assert content["unreadable"] == 1
    assert len(content["file"]) == 44
    assert "no summary" in report_content(found)["state"]
    assert report_content(found)["health"] is None


def test_metrics_that_were_not_finite_are_gaps(run):
    points = curves(read_run(run))["points"]["value/explained_variance"]
    assert points == {"x": [1, 2, 3, 4], "y": [0.1, None, 0.3, 0.4]}


def test_heldout_curves_begin_before_the_first_step_and_end_after_the_last(run):
    assert curves(read_run(run))["points"]["heldout/objective/score"] == {"x": [0, 4], "y": [0.1, 0.5]}


def test_every_curve_that_a_run_measured_is_shown_once_or_more(run):
    found = curves(read_run(run))
    shown = {series["name"] for group in found["groups"] for chart in group["charts"] for series in chart["series"]}
    assert shown == set(found["points"])
    assert shown == {name for name in metrics_row(1) if name != "step" and "calibration/" not in name} | {
        "heldout/objective/score"
    }


def test_files_stand_in_the_run_s_course(run):
    write_lines(run / "rollouts" / "heldout_000002.jsonl", [sample(random.Random(1), "a")])
    (run / "rollouts" / "notes.jsonl").write_text("{}\n")
    names = [indexed.file.name for indexed in SampleIndex(read_run(run)).refresh()]
    steps = [f"step_{n:06d}" for n in range(1, 5)]
    assert names == ["heldout_before", *steps[:2], "heldout_000002", *steps[2:], "heldout_after"]


def test_each_sample_of_the_index_is_the_line_that_was_saved(run):
    index = SampleIndex(read_run(run))
    for indexed in index.refresh():
        rows = [json.loads(line) for line in indexed.file.path.read_text().splitlines()]
        assert len(rows) == len(indexed.entries)
        for number, row in enumerate(rows):
            assert sample_content(index.sample(indexed.file.name, number)) == sample_content(
                parse_sample(row, read_run(run))
            )


def test_the_index_s_extremes_are_those_of_the_tokens(run):
    content = index_content(SampleIndex(read_run(run)).refresh())
    rows = [
        json.loads(line)
        for file in content["files"]
        for line in (run / "rollouts" / f"{file['name']}.jsonl").read_text().splitlines()
    ]
    largest = [round(max(row["advantages"], key=abs), 6) for row in rows]
    assert content["extremes"]["advantage"] == largest
    kl = [sum(a - b for a, b in zip(row["logprobs"], row["reference_logprobs"], strict=True)) for row in rows]
    assert content["kl"] == pytest.approx(kl, abs=1e-5)


def test_the_index_takes_up_what_a_run_has_written_since(run):
    index = SampleIndex(read_run(run))
    before = index.refresh()
    write_lines(run / "rollouts" / "step_000005.jsonl", [sample(random.Random(5), "new")])
    with (run / "rollouts" / "step_000004.jsonl").open("a") as file:
        file.write(json.dumps(sample(random.Random(6), "more")) + "\n")
    after = {indexed.file.name: indexed for indexed in index.refresh()}
    assert len(after["step_000005"].entries) == 1
    assert len(after["step_000004"].entries) == 9
    assert after["step_000001"] is before[1]


def test_a_link_out_of_the_run_is_not_followed(run, tmp_path):
    write_lines(tmp_path / "secret.jsonl", [sample(random.Random(1), "secret")])
    (run / "rollouts" / "step_000007.jsonl").symlink_to(tmp_path / "secret.jsonl")
    (run / "rollouts").rename(tmp_path / "elsewhere")
    (run / "rollouts").symlink_to(tmp_path / "elsewhere")
    assert "step_000007" not in {indexed.file.name for indexed in SampleIndex(read_run(run)).refresh()}
    assert len(SampleIndex(read_run(run)).refresh()) == 6


def test_samples_of_skipped_steps_are_shown_as_far_as_they_came(run):
    why = {"step": 3, "where": "the loss", "remedy": "lower it"}
    unjudged = {"prompt": "the sea", "response": " was", "ended": False, "ids": [1], "behaviour_logprobs": [-1.0]}
    write_lines(run / "faults" / "step_000003.jsonl", [why, unjudged])
    index = SampleIndex(read_run(run))
    labels = {indexed.file.name: indexed.file.label for indexed in index.refresh()}
    assert labels["fault_000003"] == "step 3, skipped"
    assert index_content(index.files)["unreadable"] == 0
    assert sample_content(index.sample("fault_000003", 0))["pieces"] == []


# --- the report


def test_before_and_after_pairs_the_same_prompts(run):
    found = report_content(read_run(run))["pairs"]
    gains = [row["gain"] for row in found["rows"]]
    assert gains == [row["after"]["score"] - row["before"]["score"] for row in found["rows"]]
    assert found["count"] == 6
    assert gains == sorted(gains, reverse=True)
    assert [row["place"] for row in found["rows"]] == [
        "largest gain",
        "upper quartile",
        "middle",
        "lower quartile",
        "largest loss",
    ]


def test_the_report_says_what_was_measured_and_never_trained_on(run):
    titles = {tile["title"]: tile for tile in report_content(read_run(run))["tiles"] if tile}
    assert (titles["Reward"]["before"], titles["Reward"]["after"]) == (0.1, 0.5)
    assert titles["gold, never trained on"]["where"] == "training"


@pytest.mark.parametrize(
    ("summary", "said"),
    [
        ({"interrupted": False}, "Finished: 4 steps."),
        ({"interrupted": True}, "Interrupted after 4 of 9 steps."),
        ({"interrupted": False, "best_step": 2}, "the models are those of step 2"),
        ({"interrupted": False, "ended": "unwell"}, "Ended after 4 of 9 steps."),
        (None, "4 of 9 steps are written down"),
    ],
)
def test_the_report_says_how_the_run_ended(run, summary, said):
    planned = "steps = 4" if summary == {"interrupted": False} else "steps = 9"
    (run / "config.toml").write_text((run / "config.toml").read_text().replace("steps = 4", planned))
    (run / "summary.json").write_text("{half a" if summary is None else json.dumps(summary))
    assert said in report_content(read_run(run))["state"]


def test_findings_come_from_the_summary(run):
    finding = {"rule": "kl", "title": "KL explodes", "first_step": 2, "last_step": 4, "explanation": "why"}
    summary = json.loads((run / "summary.json").read_text()) | {"health": [finding]}
    (run / "summary.json").write_text(json.dumps(summary))
    assert report_content(read_run(run))["health"] == [finding]


def test_settings_are_shown_with_their_defaults(run):
    rows = {row["name"]: row for row in report_content(read_run(run))["recipe"]}
    assert (rows["steps"]["value"], rows["steps"]["default"], rows["steps"]["changed"]) == ("4", "100", True)
    assert not rows["advantage.gamma"]["changed"]
    assert rows["rewards.1.weight"]["what"] == "multiplies the term"


def test_time_is_told_by_phase(run):
    assert report_content(read_run(run))["time"] == {
        "total": 20.0,
        "phases": [
            {"name": "rollout", "seconds": 4.0},
            {"name": "update", "seconds": 12.0},
            {"name": "outside of steps", "seconds": 4.0},
        ],
    }


def test_a_report_that_cannot_be_written_is_a_warning(run):
    (run / REPORT).mkdir()
    said: list[str] = []
    with reported(run, said.append):
        pass
    assert len(said) == 1
    assert REPORT in said[0]
    assert not list(run.glob(".report*"))


def test_a_run_that_fails_has_a_report_and_its_own_error(run):
    with pytest.raises(ZeroDivisionError), reported(run, pytest.fail):
        raise ZeroDivisionError
    assert (run / REPORT).exists()


def test_every_metric_of_the_documentation_is_described():
    text = (ROOT / "docs" / "joint-stage.md").read_text().split("## Metrics")[1]
    names = [name for cell in re.findall(r"^\| (`.*?) \|", text, re.M) for name in re.findall(r"`([^`]+)`", cell)]
    whole = [name for name in names if re.fullmatch(r"[a-z]+/[a-zA-Z_/0-9]+", name)]
    assert len(whole) > 30
    assert [name for name in whole if describe(name) is None] == []
    assert describe("heldout/objective/kl").what.startswith(JOINT["objective/kl"].what)
    assert describe("no/such") is None


# --- after real runs


def words(folder: Path, stage: str, *more: str) -> list[str]:
    return [stage, *more, f"--run.directory={folder / stage}"]


def test_every_stage_leaves_a_report_with_every_metric_described(tiny, tmp_path, capsys):
    prompts, rows = tmp_path / "p.jsonl", tmp_path / "s.jsonl"
    write_lines(prompts, [{"prompt": "the sea"}, {"prompt": "a film"}])
    write_lines(rows, [{"prompt": "the sea", "completion": " was quiet"}] * 12)
    reward = tmp_path / "reward.py"
    reward.write_text("def reward(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n")
    joint = [
        f"--policy.model={tiny()}",
        f"--data.prompts={prompts}",
        f"--data.eval_prompts={prompts}",
        f"--rewards.0.function={reward}:reward",
        "--value.start=policy",
        "--advantage.at_limit=bootstrap",
        "--steps=2",
        "--eval_every=1",
        "--rollout.prompts_per_step=4",
        "--rollout.max_new_tokens=5",
    ]
    assert main(words(tmp_path, "ppo", *joint)) == 0
    assert main(words(tmp_path, "sft", f"--model={tiny()}", f"--data.train={rows}")) == 0
    assert "WARNING" not in capsys.readouterr().out
    for stage in ("ppo", "sft"):
        run = read_run(tmp_path / stage)
        assert "</html>" in (run.path / REPORT).read_text()
        assert [name for name, found in curves(run)["descriptions"].items() if found is None] == []
        assert report_content(run)["state"].startswith("Finished")
    index = SampleIndex(read_run(tmp_path / "ppo"))
    assert [indexed.file.name for indexed in index.refresh()][-1] == "heldout_after"
    content = sample_content(index.sample("step_000002", 0))
    known = {name for name, values in content["quantities"].items() if None not in values}
    assert {"advantage", "value", "td_error", "kl", "ratio", "reward", "surprise"} <= known


# --- the server


@pytest.fixture
def server(run):
    with ViewServer(read_run(run), 0) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: ViewServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read().decode()
    connection.close()
    return answer.status, dict(answer.headers), body


def test_the_server_serves_the_pages_and_the_samples(server):
    for path, kind in (("/", "text/html"), ("/static/viewer.js", "text/javascript"), ("/report.html", "text/html")):
        status, headers, body = ask(server, path)
        assert status == 200
        assert headers["Content-Type"].startswith(kind)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]
        assert body
    assert "unsafe" not in ask(server, "/")[1]["Content-Security-Policy"]
    assert ask(server, "/", "HEAD")[2] == ""
    index = json.loads(ask(server, "/api/index")[2])
    assert len(index["file"]) == 44
    assert json.loads(ask(server, "/api/sample?file=step_000001&row=3")[2])["prompt"] == "opening 1 3"


@pytest.mark.parametrize(
    "path",
    [
        "/config.toml",
        "/../config.toml",
        "/static/../../config.toml",
        "/static/%2e%2e/reading.py",
        "/static/",
        "/static/viewer.py",
        "//etc/passwd",
        "/api/sample?file=../config&row=0",
        "/api/sample?file=step_000001&row=-1",
        "/api/sample?file=step_000001&row=8",
        "/api/sample?file=step_000001&row=x",
        "/api/sample?row=1",
        "/api/sample",
        "/http://[",
    ],
)
def test_the_server_serves_nothing_else(server, path):
    status, _, body = ask(server, path)
    assert status == 404
    assert "root:" not in body
    assert "steps = 4" not in body


def test_the_server_is_for_this_machine_and_for_reading_only(server):
    assert server.server_address[0] == "127.0.0.1"
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", ""):
        assert ask(server, "/api/index", Host=host)[0] == 403
    for host in ("localhost:9", "127.0.0.1", "LOCALHOST:1234"):
        assert ask(server, "/api/index", Host=host)[0] == 200
    assert ask(server, "/", "POST")[0] == 501


def test_a_sample_that_was_taken_away_meanwhile_is_no_crash(server, run):
    ask(server, "/api/index")
    shutil.rmtree(run / "rollouts")
    assert ask(server, "/api/sample?file=step_000001&row=0")[0] == 404
    assert json.loads(ask(server, "/api/index")[2])["file"] == []


# --- pages that stand alone

HOSTILE = [
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'>",
    "<!--<script>",
    "]]>",
    "\u2028\u2029",
    "\u202eright to left",
    "\0",
    "x" * 100_000,
]


def test_what_a_model_wrote_cannot_end_the_data_that_it_stands_in():
    text = embedded(HOSTILE)
    assert json.loads(text) == HOSTILE
    assert text.isascii()
    assert not set(text) & set("<>&")


def test_an_exported_page_holds_every_sample_and_asks_for_nothing(run, tmp_path):
    page = export(read_run(run), tmp_path / "out.html").read_text()
    held = dict(re.findall(r'<script type="application/json" id="([\w-]+)">(.*?)</script>', page))
    assert {name for name in held if name != "index"} == {
        f"file-{file['name']}" for file in json.loads(held["index"])["files"]
    }
    assert len(json.loads(held["file-step_000001"])) == 8
    assert set(re.findall(r"https?://[^\s\"'`;]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "src=" not in re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.S)


def test_an_exported_folder_can_be_written_again_and_nothing_else_is_overwritten(run, tmp_path):
    folder = tmp_path / "out"
    page = export(read_run(run), folder)
    (run / "rollouts" / "step_000004.jsonl").unlink()
    assert export(read_run(run), folder) == page
    assert sorted(file.stem for file in (folder / "data").iterdir()) == [
        "heldout_after",
        "heldout_before",
        *(f"step_{n:06d}" for n in (1, 2, 3)),
    ]
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("years of work")
    with pytest.raises(InputError, match="no earlier export"):
        export(read_run(run), other)


def test_samples_too_many_for_a_page_are_refused_for_one(run, tmp_path, monkeypatch):
    monkeypatch.setattr("tandem.view.export.LARGEST_PAGE", 1000)
    with pytest.raises(InputError, match="give a folder, such as"):
        export(read_run(run), tmp_path / "out.html")


def test_the_package_s_files_name_no_other_machine():
    names = [path.name for path in (ROOT / "src" / "tandem" / "view" / "static").iterdir()]
    assert len(names) > 8
    for name in names:
        text = static_file(name)
        assert set(re.findall(r"https?://[^\s\"'`;)]+", text)) <= {"http://www.w3.org/2000/svg"}
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text)


# --- the command


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["nowhere"], "no folder"),
        (["n" * 300], "cannot be read: File name too long"),
        (["parent/ppo", "--export", "n" * 300], "cannot be written: File name too long"),
        (["parent/ppo", "--export", f"{'n' * 300}.html"], "cannot be written: File name too long"),
        (["empty"], "holds no run"),
        (["parent"], "parent/ppo would do"),
        ([], "required: RUN"),
        (["parent/ppo", "--port", "0"], "a whole number from 1 to 65535"),
        (["parent/ppo", "--port", "taken"], "is not a port"),
        (["parent/ppo", "--report", "--port", "8000"], "have no effect"),
        (["parent/ppo", "--export", "x.html", "--no-browser"], "have no effect"),
        (["parent/ppo", "--export", "nowhere/x.html"], "cannot be written"),
        (["parent/ppo", "--export", "empty/file"], "is a file"),
        (["parent/ppo", "--export", "page.html"], "is a folder"),
        (["parent/ppo", "--sort"], "'--sort' was not understood"),
    ],
)
def test_what_cannot_be_viewed_is_refused_in_one_line(tmp_path, monkeypatch, capsys, more, said):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "parent" / "ppo")
    (tmp_path / "empty").mkdir()
    (tmp_path / "page.html").mkdir()
    if "empty/file" in more:
        (tmp_path / "empty" / "file").write_text("")
    assert main(["view", *more]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1


def test_a_port_that_is_taken_is_refused(run, server, capsys):
    port = server.server_address[1]
    assert main(["view", str(run), "--no-browser", "--port", str(port)]) == 2
    assert f"--port {port} cannot be used" in capsys.readouterr().err


def test_report_and_export_at_once(run, tmp_path, capsys):
    assert main(["view", str(run), "--report", "--export", str(tmp_path / "v.html")]) == 0
    assert (run / REPORT).stat().st_size > 10_000
    assert (tmp_path / "v.html").stat().st_size > 10_000
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_folder_whose_name_is_no_text_can_be_viewed(tmp_path, capsys):
    run = make_run(tmp_path / os.fsdecode(b"caf\xe9\n"))
    assert main(["view", str(run), "--report", "--export", str(tmp_path / "v.html")]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert "</html>" in (run / REPORT).read_text()


def test_ctrl_c_ends_the_server_quietly(run):
    command = [sys.executable, "-m", "tandem", "view", str(run), "--no-browser"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "http://127.0.0.1:" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 0
    assert error == ""


def test_looking_at_a_run_loads_no_torch():
    code = "import sys, tandem.view; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


def test_an_old_report_goes_on_standing_where_a_new_one_fails(run, monkeypatch):
    page = write_report(run)
    before = page.read_text()
    monkeypatch.setattr("tandem.view.report.report_page", lambda _: 1 / 0)
    with reported(run, lambda _: None):
        pass
    assert page.read_text() == before
