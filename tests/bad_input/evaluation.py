"""Evaluations that cannot be: of no responses, by no judge, or by one that does not answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bad_input.case import Case, World

JUDGE = ["--judge.model=judge", "--judge.url=http://127.0.0.1:9/v1"]

# What is set beside a command line that would run, and what must be said.
TABLE = [
    (["--rewards=[]"], "nobody judges", "--rewards.0.model DIR", "--judge.url URL"),
    (["--rewards=[]", *JUDGE, "--best_of_n=4"], "best_of_n needs a judge by score"),
    (["--best_of_n=1"], "best_of_n = 1", "greater than or equal to 2"),
    (["--best_of=4"], "best_of = 4 is not a known key", "did you mean best_of_n?"),
    (["--benchmark_limit=5"], "benchmark_limit has no effect", "leave it out"),
    (["--benchmarks=hellaswag"], "benchmarks = 'hellaswag'", "valid list"),
    (["--rewards.0.weight=2.0"], "rewards.0.weight and center have no effect", "leave them out"),
    (["--rewards.0.center=true"], "rewards.0.weight and center have no effect"),
    (["--rewards.0.timeout_seconds=5"], "rewards.0.timeout_seconds has no effect", "for a function or a url"),
    (["--rollout.prompts_per_step=5"], "rollout.prompts_per_step = 5", "not a known key"),
    (["--data.eval_prompts=p.jsonl"], "data.eval_prompts = 'p.jsonl'", "not a known key"),
    (["--run.trackers=[]"], "run.trackers", "not a known key"),
    (["--baseline="], "baseline = ''", "at least 1 character"),
    (["--baseline=./none"], "baseline = './none'", "no such folder", "mend the path"),
    (["--reference=./none"], "reference = './none'", "no such folder", "mend the path"),
    (["--rewards.0.model=./none"], "rewards.0.model = './none'", "no such folder"),
    (["--rewards=[{function='none.py:f'}]"], "reward function 'none.py:f'", "there is no file"),
    (["--rewards=[{function='math:sqrt'}]"], "reward function 'math:sqrt'", "raised TypeError"),
    (["--rollout.max_new_tokens=300"], "rollout.max_new_tokens is 300", "more than the 256 that model reads"),
    (["--judge.url=http://127.0.0.1:9/v1"], "judge.model is missing"),
    (["--judge.model=judge"], "judge.url is missing"),
    ([*JUDGE, "--judge.url=localhost:8000"], "'localhost:8000' is no address of a server"),
    ([*JUDGE, "--judge.url=http://h/v1/chat/completions"], "judge.url", "leave /chat/completions out"),
    ([*JUDGE, "--judge.url=http://me:secret@h/v1"], "judge.url", "use api_key_env"),
    ([*JUDGE, "--judge.prompt=which?"], "judge.prompt: lacks {prompt} and {first} and {second}"),
    ([*JUDGE, "--judge.request={model='x'}"], "judge.request: model cannot be set", "leave them out"),
    ([*JUDGE, "--judge.request={day=2024-01-01}"], "judge.request: holds what JSON has no form for"),
    ([*JUDGE, "--judge.api_key_env=NO_SUCH_KEY"], "judge.api_key_env = 'NO_SUCH_KEY'", "is not set"),
    ([*JUDGE, "--judge.retries=0"], "judge 'judge' at 'http://127.0.0.1:9/v1' did not answer", "see that it runs"),
    (["--resume", "runs/eval"], "--resume was not understood", "run it again"),
]


def cases() -> Iterator[Case]:
    for words, *said in TABLE:

        def make(world: World, words: list[str] = words) -> list[str]:
            return [*world.words("eval"), *words]

        yield Case(f"eval {' '.join(words)}", make, tuple(said))
    yield Case("eval model: a reward model", _classifier("model"), ("model = ", "gives no responses"))
    yield Case("eval baseline: a reward model", _classifier("baseline"), ("baseline = ", "gives no responses"))
    yield Case("eval, reward model: a language model", _language_model, ("rewards.0.model = ", "sequence classifier"))
    yield Case("eval: a function that returns words", _no_number, ("reward function", "returned what is no number"))
    yield Case("eval: a folder with a run", _used, ("already holds a run or an evaluation", "--run.directory"))
    yield Case("ppo: resume an evaluation", _with_eval("ppo", "--resume"), ("that is an evaluation", "run it again"))
    yield Case("view: an evaluation", _with_eval("view"), ("holds an evaluation", "its page is", "eval.md"))


def _classifier(name: str):
    return lambda world: world.words("eval", **{name: world.reward_model})


def _language_model(world: World) -> Sequence[str]:
    return world.words("eval", reward=world.model)


def _no_number(world: World) -> Sequence[str]:
    function = world.write("judge.py", b"def judge(prompts, responses, rows):\n    return ['good'] * len(responses)\n")
    return [*world.words("eval"), f'--rewards=[{{function="{function}:judge"}}]']


def _used(world: World) -> Sequence[str]:
    (world.folder / "run").mkdir()
    (world.folder / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    return world.words("eval")


def _with_eval(*words: str):
    """The command on the folder of an evaluation."""

    def make(world: World) -> Sequence[str]:
        (world.folder / "run").mkdir()
        (world.folder / "run" / "run.json").write_text('{"stage": "eval"}')
        (world.folder / "run" / "config.toml").write_text('model = "m"\n')
        return [*words, str(world.folder / "run")]

    return make
