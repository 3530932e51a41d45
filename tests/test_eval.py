"""Evaluation: a judge behind a real loopback endpoint, and whole evaluations of tiny models by the command."""

from __future__ import annotations

import json
import math
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tandem.cli import main
from tandem.config import EvalConfig, JudgeSection
from tandem.errors import InputError, RewardError
from tandem.models.sharing import Placement
from tandem.recipe import load_config
from tandem.rewards.judge import Judge, Judgement, verdict_of
from tandem.rewards.server import NoAnswerError
from tandem.run import Progress
from tandem.stages.eval_answers import answer, find_speakers
from tandem.types import Prompt, Rollout
from tandem.view.evaluation import page
from tiny import make_config, make_tokenizer

KEY = "sk-very-secret-0123456789"
SHOWN = re.compile(r"<response A>\n(.*)\n</response A>.*<response B>\n(.*)\n</response B>", re.DOTALL)


def rollout(text: str, prompt: Prompt | None = None) -> Rollout:
    return Rollout(prompt or Prompt((1,), "Ask.", None, {}), (5,), (0.0,), text, True)


class ChatServer(ThreadingHTTPServer):
    """A chat endpoint that answers by `act(handler, first, second)`."""

    def __init__(self, act) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.act, self.requests, self.headers, self.lock = act, [], [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address) -> None:
        """A client that hung up is what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: ChatServer

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append((self.path, request))
            self.server.headers.append(dict(self.headers))
        shown = SHOWN.search(request["messages"][-1]["content"])
        self.server.act(self, *(shown.groups() if shown else ("", "")))

    def say(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def chat(self, content) -> None:
        self.say(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode())

    def log_message(self, *_) -> None:
        pass


def goods(text: str) -> int:
    return text.count("good")


def fair(handler, first, second):
    """Prefers the response with more of "good" in it, wherever it stands."""
    better = "C" if goods(first) == goods(second) else "A" if goods(first) > goods(second) else "B"
    handler.chat(f"Both have merits.\n[[{better}]]")


def always(letter):
    return lambda handler, *_: handler.chat(f"[[{letter}]]")


def status(code, body=b"no " * 200):
    return lambda handler, *_: handler.say(code, body)


def slow(handler, *_):
    time.sleep(1.0)
    handler.chat("[[A]]")


def hang_up(handler, *_):
    handler.connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def serve():
    """Endpoints that end with the test."""
    running = []

    def start(act) -> ChatServer:
        server = ChatServer(act)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def judge(server, **settings) -> Judge:
    return Judge(JudgeSection(url=server.url, model="judge", **settings), first_wait_seconds=0.01)


OURS = [rollout(text) for text in ("good good", "bad", "good", "fine")]
THEIRS = [rollout(text) for text in ("good", "good", "bad", "fine")]


def test_a_fair_judge_is_asked_in_both_positions_and_says_who_won(serve):
    server = serve(fair)
    found = judge(server).compare(OURS, THEIRS)
    assert [one.outcome for one in found] == [1.0, 0.0, 1.0, 0.5]
    assert all(one.consistent and one.preference_for_first == 0.5 for one in found)
    asked = sorted(SHOWN.search(request["messages"][0]["content"]).groups() for _, request in server.requests)
    pairs = [(a.text, b.text) for a, b in zip(OURS, THEIRS, strict=True)]
    assert asked == sorted([*pairs, *((b, a) for a, b in pairs)])
    assert {path for path, _ in server.requests} == {"/v1/chat/completions"}
    assert all(request["model"] == "judge" and request["temperature"] == 0.0 for _, request in server.requests)


def test_a_judge_who_prefers_a_position_decides_nothing(serve):
    found = judge(serve(always("A"))).compare(OURS, THEIRS)
    assert [one.outcome for one in found] == [0.5] * 4
    assert not any(one.consistent for one in found)
    assert {one.preference_for_first for one in found} == {1.0}


@pytest.mark.parametrize(
    ("first", "second", "outcome", "consistent"),
    [
        ("A", "B", 1.0, True),
        ("B", "A", 0.0, True),
        ("C", "C", 0.5, True),
        ("A", "C", 0.5, False),
        ("B", "B", 0.5, False),
    ],
)
def test_only_verdicts_that_agree_count(first, second, outcome, consistent):
    assert (Judgement(first, second).outcome, Judgement(first, second).consistent) == (outcome, consistent)


@pytest.mark.parametrize(
    ("content", "letter"), [("[[A]]", "A"), ("[[A]] at first, but then\n[[ B ]]", "B"), ("C.", "C"), ("**[B]**", "B")]
)
def test_verdicts_are_read(content, letter):
    assert verdict_of(200, {}, json.dumps({"choices": [{"message": {"content": content}}]}).encode()) == letter


@pytest.mark.parametrize("content", ["", "A good one is B", "[A] or [B]", "[[D]]", None, 3, ["[[A]]"]])
def test_what_is_no_verdict_is_not_read_as_one(content):
    with pytest.raises(NoAnswerError) as error:
        verdict_of(200, {}, json.dumps({"choices": [{"message": {"content": content}}]}).encode())
    assert not error.value.again


def test_texts_of_the_models_cannot_move_the_places(serve):
    server = serve(fair)
    prompt = Prompt((1,), "<|user|>why?", ({"role": "user", "content": "why {first}?"},), {})
    judge(server).compare([rollout("{second}", prompt)], [rollout("{prompt}", prompt)])
    content = server.requests[0][1]["messages"][0]["content"]
    assert "user: why {first}?" in content
    assert {"{second}", "{prompt}"} == set(SHOWN.search(content).groups())


FAILING = [
    (status(500), {"retries": 2}, 3, ("answered 500", "(tries: 3)", "judge.retries")),
    (status(429), {"retries": 0}, 1, ("answered 429", "(tries: 1)")),
    (status(404), {}, 1, ("answered 404", "judge.url", "judge.model")),
    (status(200, b"<html>"), {"retries": 1}, 2, ("what is not JSON", "<html>")),
    (status(200, b"{}"), {}, 1, ("no chat completion", "judge.prompt")),
    (always("D"), {}, 1, ("without a verdict", "[[D]]")),
    (slow, {"timeout_seconds": 0.1, "retries": 0}, 1, ("did not answer within 0.1 s", "judge.timeout_seconds")),
    (hang_up, {"retries": 1}, 2, ("did not answer",)),
]


@pytest.mark.parametrize(("act", "settings", "tries", "said"), FAILING, ids=[case[3][0] for case in FAILING])
def test_a_judge_who_fails_ends_in_one_message(serve, act, settings, tries, said):
    server = serve(act)
    with pytest.raises(RewardError) as error:
        judge(server, requests_at_once=1, **settings).compare(OURS[:1], THEIRS[:1])
    assert [part for part in (*said, f"judge 'judge' at '{server.url}'", "'good") if part not in str(error.value)] == []
    assert len(server.requests) >= tries


def test_pairs_without_a_verdict_can_be_left_out(serve):
    def moody(handler, first, second):
        always("D" if "bad" in first else "C")(handler, first, second)

    found = judge(serve(moody), on_error="skip").compare(OURS, THEIRS)
    assert [one is None for one in found] == [False, True, True, False]
    with pytest.raises(RewardError, match="without a verdict"):
        judge(serve(always("D")), on_error="skip").compare(OURS, THEIRS)


def test_the_key_is_sent_and_shown_nowhere(serve, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(status(401, f"wrong key: {KEY}".encode()))
    with pytest.raises(InputError) as error:
        judge(server, api_key_env="JUDGE_KEY").try_out()
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "answered 401" in str(error.value)
    assert KEY not in str(error.value)


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "line\nbreak"])
def test_what_cannot_be_a_key_is_refused(monkeypatch, key):
    monkeypatch.setenv("JUDGE_KEY", key)
    with pytest.raises(InputError, match="JUDGE_KEY") as error:
        Judge(JudgeSection(url="http://127.0.0.1:9/v1", model="judge", api_key_env="JUDGE_KEY"))
    assert not key or key not in str(error.value)


@pytest.fixture(scope="module")
def other(tiny, tmp_path_factory) -> Path:
    """A model with the tokenizer of the tiny llama and weights a little off."""
    path = tmp_path_factory.mktemp("other")
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(tiny())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(path)
    AutoTokenizer.from_pretrained(tiny()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def stranger(tmp_path_factory) -> Path:
    """A model with another tokenizer."""
    path = tmp_path_factory.mktemp("stranger")
    torch.manual_seed(2)
    tokenizer = make_tokenizer(size=280)
    AutoModelForCausalLM.from_config(make_config("llama", len(tokenizer))).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def reward_file(folder: Path, body: str = "return [float(r.count('e')) for r in responses]") -> str:
    path = folder / "score.py"
    path.write_text(f"import os, signal\n\ndef score(prompts, responses, rows):\n    {body}\n")
    return f"{path}:score"


def words(folder: Path, model: Path, baseline: Path, *more: str) -> list[str]:
    prompts = folder / "held.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"the {word} is"}) + "\n" for word in ("sea", "film", "story")))
    settings = {
        "model": model,
        "baseline": baseline,
        "data.prompts": prompts,
        "rollout.max_new_tokens": 8,
        "rollout.responses_per_prompt": 2,
        "run.directory": folder / "run",
        "compute.device": "cpu",
        "compute.precision": "float32",
    }
    return ["eval", *(f"--{name}={value}" for name, value in settings.items()), *more]


def read(folder: Path) -> tuple[dict, list[dict], str]:
    run = folder / "run"
    pairs = [json.loads(line) for line in (run / "pairs.jsonl").read_text().splitlines()]
    return json.loads((run / "summary.json").read_text()), pairs, (run / "eval.md").read_text()


def test_an_evaluation_end_to_end(tiny, tiny_reward, other, serve, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("JUDGE_KEY", KEY)
    server = serve(lambda handler, first, second: handler.chat("[[A]]" if len(first) >= len(second) else "[[B]]"))
    judges = [
        f"--rewards.0.function={reward_file(tmp_path)}",
        f"--rewards.1.model={tiny_reward}",
        f"--judge.url={server.url}",
        "--judge.model=chatty",
        "--judge.api_key_env=JUDGE_KEY",
        "--best_of_n=3",
    ]
    assert main(words(tmp_path, other, tiny(), *judges)) == 0
    summary, pairs, text = read(tmp_path)
    told = [(found["against"], found["judge"]) for found in summary["comparisons"]]
    sides, by = ("baseline", "best_of_3"), ("score", "reward_model", "chatty")
    assert sorted(told) == sorted((side, name) for side in sides for name in by)
    assert len(pairs) == 2 * 3 * 2
    for found in summary["comparisons"]:
        of_side = [pair["verdicts"][found["judge"]] for pair in pairs if pair["against"] == found["against"]]
        said = [one["outcome"] for one in of_side]
        assert (found["wins"], found["ties"], found["losses"]) == tuple(said.count(x) for x in (1.0, 0.5, 0.0))
        assert found["win_rate"]["value"] == pytest.approx(sum(said) / len(said))
        assert found["win_rate"]["low"] < found["win_rate"]["value"] < found["win_rate"]["high"]
    for pair in pairs:
        said = pair["verdicts"]["score"]
        assert said["model_score"] == pair["model_response"].count("e")
        assert said["other_score"] == pair["other_response"].count("e")
        chat = pair["verdicts"]["chatty"]
        tie = len(pair["model_response"]) == len(pair["other_response"])
        assert chat["shown_first"] == ("A" if len(pair["model_response"]) >= len(pair["other_response"]) else "B")
        assert (chat["shown_first"] == chat["shown_second"]) == tie
    for name in by:
        assert name in text
    assert f"{summary['comparisons'][0]['win_rate']['value']:.1%}" in text
    assert f"at most {math.log(3) - 2 / 3:.2f}" in text
    assert summary["kl"]["nats_a_sequence"] > 0
    assert set(summary["writing"]) == {"model", "baseline", "best_of_3"}
    assert not [file for file in (tmp_path / "run").rglob("*") if file.is_file() and KEY in file.read_text()]
    said = capsys.readouterr()
    assert "Who wins" in said.out
    assert "see eval.md" in said.out
    assert main(words(tmp_path, other, tiny(), *judges)) == 2
    assert "already holds" in capsys.readouterr().err


def test_a_model_against_itself_is_told_apart_by_nothing(tiny, tmp_path):
    function = reward_file(tmp_path)
    assert main(words(tmp_path, tiny(), tiny(), f"--rewards.0.function={function}")) == 0
    summary, pairs, _ = read(tmp_path)
    assert summary["kl"]["nats_a_sequence"] == pytest.approx(0.0, abs=1e-5)
    assert [pair["model_response"] for pair in pairs] != [pair["other_response"] for pair in pairs]
    found = summary["comparisons"][0]["win_rate"]
    assert found["low"] < 0.5 < found["high"]
    assert any("does not tell the model from baseline" in note for note in summary["notes"])


def test_another_tokenizer_is_compared_and_its_kl_is_not_made_up(tiny, stranger, tmp_path):
    function = reward_file(tmp_path)
    assert main(words(tmp_path, tiny(), stranger, f"--rewards.0.function={function}", "--best_of_n=2")) == 0
    summary, _, text = read(tmp_path)
    assert summary["kl"]["unmeasured"] == "the reference has another tokenizer"
    assert "nats_a_sequence" not in summary["kl"]
    assert "No KL is measured: the reference has another tokenizer." in text
    assert len(summary["comparisons"]) == 2


@pytest.mark.parametrize("reference", ["baseline", "reference"])
def test_kl_is_that_of_the_models_own_log_probabilities(tiny, other, tmp_path, reference):
    more = ["--rollout.temperature=0.7"] if reference == "baseline" else [f"--reference={tiny()}"]
    baseline = tiny() if reference == "baseline" else other
    recipe = words(tmp_path, other, baseline, f"--rewards.0.function={reward_file(tmp_path)}", "--best_of_n=2", *more)
    config = load_config(EvalConfig, None, recipe[1:])
    placement = Placement(torch.device("cpu"), torch.float32, 4096, False, print)
    with Progress() as progress:
        speakers = find_speakers(config, placement, progress)
        found = answer(config, speakers, placement, progress)
    assert found.log_ratios.shape == (3, 2)
    assert (len(found.baseline), len(found.candidates)) == (6, 12)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(path) for path in (other, tiny()))
    for one, log_ratio in zip(found.model, found.log_ratios.flatten(), strict=True):
        ids = torch.tensor([[*one.prompt.ids, *one.ids]])
        start = len(one.prompt.ids)

        def total(model, ids=ids, start=start):
            logprobs = torch.log_softmax(model(ids).logits[0] / config.rollout.temperature, -1)
            return logprobs[start - 1 : -1].gather(1, ids[0, start:, None]).sum().item()

        assert float(log_ratio) == pytest.approx(total(ours) - total(theirs), abs=1e-3)


def test_the_best_of_n_is_the_best_one(tiny, tmp_path):
    function = reward_file(tmp_path)
    more = (f"--rewards.0.function={function}", "--best_of_n=16")
    assert main(words(tmp_path, tiny(), tiny(), *more)) == 0
    summary, _, _ = read(tmp_path)
    mean = {found["against"]: found["score"]["other"] for found in summary["comparisons"]}
    assert mean["best_of_16"] > mean["baseline"] + 0.5


def test_scores_that_are_missing_count_nowhere(tiny, tmp_path):
    function = reward_file(tmp_path, "return [None if n % 3 == 0 else 1.0 * len(r) for n, r in enumerate(responses)]")
    skip = f'--rewards=[{{function="{function}", on_error="skip"}}]'
    assert main(words(tmp_path, tiny(), tiny(), skip, "--best_of_n=2")) == 0
    summary, pairs, text = read(tmp_path)
    found = summary["comparisons"][0]
    assert found["unjudged"] == 2
    assert found["wins"] + found["ties"] + found["losses"] == 4
    assert sum(pair["verdicts"]["score"]["outcome"] is None for pair in pairs if pair["against"] == "baseline") == 2
    assert "2 comparisons with baseline have no verdict by score, and count nowhere." in text


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ("raise KeyboardInterrupt", 130, "it has no result; run it again"),
        ("os.kill(os.getpid(), signal.SIGTERM)", 130, "it has no result; run it again"),
        ("return [float('nan')] * len(responses)", 1, "returned nan"),
    ],
)
def test_an_evaluation_that_does_not_end_leaves_no_result(tiny, tmp_path, capsys, body, status, said):
    body = f"if responses[0] == ' A first try.': return [0.0] * len(responses)\n    {body}"
    assert main(words(tmp_path, tiny(), tiny(), f"--rewards.0.function={reward_file(tmp_path, body)}")) == status
    found = capsys.readouterr().err
    assert said in found
    assert len(found.strip().splitlines()) == 1
    left = {file.name for file in (tmp_path / "run").iterdir()}
    assert left <= {"config.toml", "run.json", ".lock"}
    function = reward_file(tmp_path)
    assert main(words(tmp_path, tiny(), tiny(), f"--rewards.0.function={function}")) == 0


def test_prompts_that_were_trained_on_are_pointed_out(tiny, tmp_path):
    run = tmp_path / "trained"
    run.mkdir()
    (run / "model").symlink_to(tiny())
    (run / "config.toml").write_text(f'[data]\nprompts = "{tmp_path / "held.jsonl"}"\n')
    function = reward_file(tmp_path)
    assert main(words(tmp_path, run / "model", tiny(), f"--rewards.0.function={function}")) == 0
    assert "trained on this very file of prompts" in read(tmp_path)[2]


def test_benchmarks_without_the_harness_are_refused_at_once(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    function = reward_file(tmp_path)
    asked = words(tmp_path, tiny(), tiny(), f"--rewards.0.function={function}", '--benchmarks=["hellaswag"]')
    assert main(asked) == 2
    said = capsys.readouterr().err
    assert "pip install 'tandem-rlhf[benchmarks]'" in said
    assert not (tmp_path / "run").exists()


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


def made_summary(**changed) -> dict:
    """A summary as an evaluation writes it."""
    comparison = {
        "against": "baseline",
        "judge": "rm",
        "wins": 30,
        "ties": 0,
        "losses": 10,
        "unjudged": 0,
        "win_rate": interval(0.75, 0.6, 0.86),
        "length_controlled": interval(0.6, 0.45, 0.73),
        "score": None,
        "position": None,
    }
    doubting = comparison | {
        "judge": "a|b",
        "win_rate": interval(0.5, 0.35, 0.65),
        "position": {"inconsistent": 0.4, "preference_for_first": 0.7},
    }
    writing = dict.fromkeys(
        ("tokens", "characters", "eos_rate", "repetition", "distinct_1", "distinct_2", "distance_within_prompt"), 0.5
    )
    return {
        "model": "m",
        "baseline": "b",
        "reference": "b",
        "prompts_file": "held.jsonl",
        "prompts": 40,
        "trained_on": False,
        "responses_per_prompt": 1,
        "max_new_tokens": 8,
        "temperature": 1.0,
        "best_of_n": None,
        "comparisons": [comparison, doubting],
        "writing": {"model": writing | {"distinct_2": 0.2, "repetition": 0.9}, "baseline": writing},
        "kl": {"nats_a_sequence": 3.0, "standard_error": 0.2, "nats_a_token": 0.1, "best_of_n_bound": None},
        "samples": [{"prompt": "p", "responses": {"model": "```\nout\x1b[31m", "baseline": "fine"}}],
        "benchmarks": {},
        "seconds": 1.0,
        "device": "cpu",
        "seed": 0,
        "notes": [],
        **changed,
    }


def test_notes_say_what_the_numbers_hide():
    from tandem.view.evaluation import notes

    said = " ".join(notes(made_summary()))
    assert "may be one of length" in said
    assert "changed its mind with the order in 40% of pairs" in said
    assert "rm sees the model ahead of baseline, a|b not" in said
    assert "less diverse" in said
    assert "repeats itself more" in said


def test_a_page_cannot_be_broken_by_what_a_model_wrote():
    text = page(made_summary())
    assert "````text\n```\nout\\x1b[31m\n````" in text
    assert "| baseline | a\\|b | 50.0% (35.0-65.0) |" in text
