"""Rewards from a server that may be slow, broken or wrong; and whole runs under rewards that fail."""

from __future__ import annotations

import datetime
import json
import math
import random
import re
import socket
import subprocess
import sys
import threading
import time
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
import torch

from tandem.cli import main
from tandem.config import RewardSource
from tandem.errors import InputError, RewardError
from tandem.rewards.protocol import scores_of
from tandem.rewards.remote import RemoteReward
from tandem.rewards.server import NoAnswerError
from tandem.run.folder import read_metrics
from tandem.types import Prompt, Rollout

EXAMPLE = Path(__file__).parents[1] / "examples" / "reward_server.py"


def rollout(text: str, **row) -> Rollout:
    """A response of one token a character."""
    prompt = Prompt((1,), f"ask {text}", None, row)
    return Rollout(prompt, tuple(map(ord, text)), (0.0,) * len(text), text, True)


SAMPLES = [rollout("a" * length) for length in range(1, 8)]


def decode(_, ids):
    return "".join(map(chr, ids))


class Server(ThreadingHTTPServer):
    """Does to its first request what the first of `script` says, and so on; the last of them goes on for ever."""

    def __init__(self, *script) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.requests, self.lock = script, [], threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/score"

    def handle_error(self, request, client_address) -> None:
        """A client that hung up is what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            act = self.server.script[min(len(self.server.requests), len(self.server.script) - 1)]
            self.server.requests.append(request)
        act(self, [sample["response"] for sample in request["samples"]])

    def say(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_) -> None:
        pass


def right(handler, responses):
    handler.say(200, json.dumps({"scores": [len(response) for response in responses]}).encode())


def saying(scores):
    """Answers with these scores, whatever was asked."""
    return lambda handler, _: handler.say(200, json.dumps({"scores": scores}).encode())


def status(code, **headers):
    return lambda handler, _: handler.say(code, b"oh " * 200, **headers)


def half(handler, _):
    handler.say(200, b'{"scores": [1', length=1000)


def not_json(handler, _):
    handler.say(200, b"<html>sorry</html>")


def hang_up(handler, _):
    handler.connection.shutdown(socket.SHUT_RDWR)


SLOW_SECONDS = 5.0


def slow(handler, responses):
    time.sleep(SLOW_SECONDS)
    right(handler, responses)


def trickle(handler, _):
    handler.send_response(200)
    handler.end_headers()
    for byte in b'{"scores": [1, 2, 3, 4, 5, 6, 7]}':
        handler.wfile.write(bytes([byte]))
        time.sleep(SLOW_SECONDS / 30)


@pytest.fixture
def serve():
    """Servers that end with the test."""
    running = []

    def start(*script) -> Server:
        server = Server(*script)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def score(url, samples=SAMPLES, **settings):
    """What a server gives to the samples, with hardly a wait between tries."""
    return RemoteReward(RewardSource(url=url, **settings), decode, first_wait_seconds=0.01)(samples)


def test_scores_come_back_in_order_from_several_requests(serve):
    server = serve(right)
    found = score(server.url, samples_per_request=2, requests_at_once=3)
    assert found.final.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert found.process is None
    assert not found.missing
    assert sorted(len(request["samples"]) for request in server.requests) == [1, 2, 2, 2]


def test_a_request_is_what_the_protocol_says(serve):
    server = serve(right)
    row = {"day": datetime.date(2020, 1, 2), "raw": b"x", "gap": math.nan, "deep": [{"n": 1}], "none": None}
    turns = ({"role": "user", "content": "why?"},)
    score(server.url, [Rollout(Prompt((1,), "<user>why?", turns, row), (97,), (0.0,), "aé", True)])
    sent = {"day": "2020-01-02", "raw": "b'x'", "gap": "nan", "deep": [{"n": 1}], "none": None}
    sample = {"prompt": "<user>why?", "messages": list(turns), "response": "aé", "row": sent}
    assert server.requests == [{"version": 1, "samples": [sample]}]


def test_no_more_requests_are_on_their_way_than_allowed(serve):
    now, most = [0], [0]

    def counted(handler, responses):
        with handler.server.lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.05)
        with handler.server.lock:
            now[0] -= 1
        right(handler, responses)

    score(serve(counted).url, samples_per_request=1, requests_at_once=2)
    assert most == [2]


@pytest.mark.parametrize("fault", [status(500), status(503), status(429), status(408), half, not_json, hang_up, slow])
def test_what_may_pass_is_tried_again(serve, fault):
    server = serve(fault, fault, right)
    limit = 1.0 if fault is slow else 30.0
    assert score(server.url, retries=2, timeout_seconds=limit).final.tolist() == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]
    assert len(server.requests) == 3
    assert server.requests[0] == server.requests[2]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (status(500), "answered 500 with 'oh oh"),
        (half, "did not answer (RemoteProtocolError"),
        (not_json, "what is not JSON, '<html>sorry"),
        (slow, "did not answer within 0.5 s"),
        (trickle, "did not answer within 0.5 s"),
    ],
)
def test_tries_are_bounded_and_the_error_says_all(serve, fault, said):
    server, late = serve(fault), fault in (slow, trickle)
    with pytest.raises(RewardError) as error:
        score(server.url, retries=2, timeout_seconds=0.5 if late else 30.0)
    message = str(error.value)
    assert late or len(server.requests) == 3
    for part in (server.url, said, "(tries: 3)", "the response 'a' to 'ask a' and 6 more", "retries", '"skip"'):
        assert part in message
    assert len(message.splitlines()) == 1
    assert len(message) < 800


def closed_port() -> str:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{taken.getsockname()[1]}/"


def test_a_server_that_is_not_there():
    with pytest.raises(RewardError, match=r"did not answer \(ConnectError.*tries: 3"):
        score(closed_port(), retries=2)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (status(404), "answered 404 with 'oh"),
        (status(400), "answered 400"),
        (status(302, Location="/elsewhere"), "a redirect to '/elsewhere'"),
        (saying([1.0]), "returned 1 scores for 7 samples"),
        (saying({"a": 1}), 'without a list of "scores"'),
        (lambda handler, _: handler.say(200, b"[1, 2, 3]"), 'without a list of "scores"'),
    ],
)
def test_what_another_try_cannot_change_fails_at_once(serve, fault, said):
    server = serve(fault)
    with pytest.raises(RewardError) as error:
        score(server.url)
    assert said in str(error.value)
    assert "the response 'a' to 'ask a' and 6 more" in str(error.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("bad", [None, "x", "3.5", {}, [[9, 1.0]], [["a", 1.0]], [3.0]])
def test_one_score_that_is_none(serve, bad):
    server = serve(saying([1.0, 2.0, bad, 4.0, [[1, 2.0], [5, 3.0]], 6.0, True]))
    found = score(server.url, on_error="skip")
    assert found.missing == {2}
    assert found.whole[found.scored].tolist() == [1.0, 2.0, 4.0, 5.0, 6.0, 1.0]
    assert found.process[4].tolist() == [2.0, 0.0, 0.0, 0.0, 3.0, 0.0, 0.0]
    with pytest.raises(RewardError, match="for the response 'aaa' to 'ask aaa'; "):
        score(server.url)


def test_scores_that_are_not_finite(serve):
    server = serve(saying([1.0, math.nan, math.inf, 4.0, 1e300, 6.0, 7.0]))
    assert score(server.url).final.isfinite().tolist() == [True, False, False, True, False, True, True]
    assert score(server.url, on_error="skip").missing == {1, 2, 4}


def test_only_the_samples_of_a_failed_request_are_skipped(serve):
    def picky(handler, responses):
        (status(500) if "aaa" in responses else right)(handler, responses)

    found = score(serve(picky).url, on_error="skip", samples_per_request=2, retries=1)
    assert found.missing == {2, 3}
    assert found.final[found.scored].tolist() == [1.0, 2.0, 5.0, 6.0, 7.0]
    assert "answered 500" in found.fault
    assert "'aaa'" in found.fault


def test_the_first_failed_request_stops_the_others(serve):
    server = serve(status(404), slow)
    started = time.monotonic()
    with pytest.raises(RewardError, match="404"):
        score(server.url, samples_per_request=1, requests_at_once=2)
    assert time.monotonic() - started < SLOW_SECONDS - 0.5
    assert len(server.requests) <= 3


def test_a_server_may_ask_for_a_longer_wait(serve):
    server = serve(status(503, Retry_After="1"), right)
    started = time.monotonic()
    score(server.url, retries=1)
    assert 1.0 <= time.monotonic() - started < 10.0


def test_a_longer_wait_is_asked_for_in_seconds_or_by_date():
    later = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=20)
    asked = {"7": 7.0, format_datetime(later, usegmt=True): 20.0, "soon": 0.0, "-3": 0.0}
    for header, seconds in asked.items():
        with pytest.raises(NoAnswerError) as error:
            scores_of(503, {"retry-after": header}, b"", 1)
        assert error.value.wait_seconds == pytest.approx(seconds, abs=2.0 if seconds == 20 else 0)


def test_waiting_leaves_the_random_state_of_the_run_alone(serve):
    before = random.getstate(), torch.get_rng_state()
    score(serve(status(500), status(500), right).url)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_an_address_that_cannot_be_asked_is_refused():
    with pytest.raises(InputError, match="is no address of a server"):
        RemoteReward(RewardSource(url="http://a\x7fb/"), decode)


PROMPTS = ["the sea is", "a good film is", "a quiet story is", "the slow child", "what is an evening", "a bad one"]


def run(tmp_path, model, *more) -> tuple[int, Path]:
    """Two steps on all six prompts: the exit status and the run's folder."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text, "n": n}) + "\n" for n, text in enumerate(PROMPTS)))
    words = [
        "ppo",
        f"--policy.model={model}",
        f"--data.prompts={prompts}",
        "--steps=2",
        "--rollout.prompts_per_step=6",
        "--rollout.max_new_tokens=5",
        "--value.start=policy",
        "--run.trackers=[]",
        f"--run.directory={tmp_path / 'run'}",
    ]
    return main([*words, *more]), tmp_path / "run"


def function(tmp_path, *lines):
    """The setting of a reward that is a function of these lines."""
    path = tmp_path / "reward.py"
    path.write_text("calls = []\ndef reward(prompts, responses, rows):\n" + "".join(f"    {line}\n" for line in lines))
    return f"function={path}:reward"


def samples_of(folder, step):
    return [json.loads(line) for line in (folder / "rollouts" / f"step_{step:06d}.jsonl").read_text().splitlines()]


def test_training_under_the_reference_server(tiny, tmp_path):
    with subprocess.Popen([sys.executable, str(EXAMPLE), "--port", "0"], stdout=subprocess.PIPE, text=True) as server:
        try:
            url = server.stdout.readline().split()[-1]
            done, folder = run(tmp_path, tiny(), f"--rewards.0.url={url}", "--rewards.0.samples_per_request=4")
            with pytest.raises(NoAnswerError, match=r"400.*speaks version 1"):
                ask(url, {"version": 2, "samples": []})
        finally:
            server.terminate()
    assert done == 0
    metrics = read_metrics(folder)
    assert len(metrics) == 2
    for step, row in enumerate(metrics, start=1):
        earned = [sample["scores"]["remote"] for sample in samples_of(folder, step)]
        expected = [-0.01 * len(sample["response"].split()) for sample in samples_of(folder, step)]
        assert earned == pytest.approx(expected, abs=1e-6)
        assert row["objective/score/remote"] == pytest.approx(sum(expected) / 6, abs=1e-6)
    assert "reward/skipped" not in metrics[0]


def ask(url, request):
    response = httpx2.post(url, json=request)
    return scores_of(response.status_code, response.headers, response.content, 0)


def test_a_server_that_is_not_there_is_refused_at_the_start(tiny, tmp_path, capsys):
    for on_error in ("fail", "skip"):
        words = [f"--rewards.0.url={closed_port()}", "--rewards.0.retries=0", f"--rewards.0.on_error={on_error}"]
        (tmp_path / on_error).mkdir()
        assert run(tmp_path / on_error, tiny(), *words)[0] == 2
        said = capsys.readouterr().err
        assert "did not answer (ConnectError" in said
        assert len(said.splitlines()) == 1


def test_a_function_that_raises_later_ends_the_run(tiny, tmp_path, capsys):
    lines = ["calls.append(1)", "return [1.0 / (len(calls) < 3) for _ in responses]"]
    done, folder = run(tmp_path, tiny(), f"--rewards.0.{function(tmp_path, *lines)}")
    assert done == 1
    said = capsys.readouterr().err
    assert "the run failed" in said
    assert re.search(rf"raised ZeroDivisionError\(.*\) at {tmp_path / 'reward.py'}:4 ", said)
    assert "the response '" in said
    assert "Traceback" not in said
    assert len(read_metrics(folder)) == 1


def test_samples_without_a_score_stay_out_of_their_step(tiny, tmp_path, capsys):
    lines = ["if any(row['n'] == 3 for row in rows): raise ValueError('three')"]
    lines += ["return [[(len(r) // 2, 1.0), (len(r), float(row['n']))] for r, row in zip(responses, rows)]"]
    measured = tmp_path / "measured"
    measured.mkdir()
    words = [f"--rewards.0.{function(tmp_path, *lines)}", "--rewards.0.on_error=skip"]
    words += ["--rewards.1." + function(measured, "return [None if row['n'] == 4 else 2.0 for row in rows]")]
    words += [
        "--rewards.1.on_error=skip",
        "--rewards.1.weight=0.0",
        f"--data.eval_prompts={tmp_path / 'prompts.jsonl'}",
    ]
    done, folder = run(tmp_path, tiny(), *words)
    assert done == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("1 of 6 samples have no score") == 1
    assert "raised ValueError('three')" in out
    for step, row in enumerate(read_metrics(folder), start=1):
        assert row["reward/skipped"] == 1.0
        assert row["objective/score"] == pytest.approx((0 + 1 + 2 + 4 + 5) / 5 + 1.0)
        assert row["objective/score/reward_2"] == 2.0
        kept = samples_of(folder, step)
        assert {sample["prompt"] for sample in kept} == {*PROMPTS} - {PROMPTS[3]}
        for sample in kept:
            earned = sample["score"] + sum(sample["process_rewards"])
            assert earned == pytest.approx(1.0 + PROMPTS.index(sample["prompt"]))
            assert sample["scores"]["reward_2"] == (None if sample["prompt"] == PROMPTS[4] else 2.0)
    heldout = json.loads((folder / "summary.json").read_text())["heldout"]["after"]
    assert heldout["reward/skipped"] == 1.0


def test_a_step_without_a_score_ends_a_run_that_skips(tiny, tmp_path, capsys):
    lines = ["calls.append(1)", "return [None if len(calls) > 2 else 1.0 for _ in responses]"]
    words = [f"--rewards.0.{function(tmp_path, *lines)}", "--rewards.0.on_error=skip"]
    done, folder = run(tmp_path, tiny(), *words)
    assert done == 1
    assert "none of the 6 samples has a score" in capsys.readouterr().err
    assert len(read_metrics(folder)) == 1
