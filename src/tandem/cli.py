"""The command line. Exit status: 0 done, 1 the run failed, 2 the input was refused, 130 interrupted and saved."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pydantic_core import PydanticUndefined

from tandem import __version__
from tandem.allocator import keep_memory
from tandem.config import DpoConfig, EvalConfig, PpoConfig, RewardConfig, SftConfig
from tandem.errors import DONE, FAILED, INTERRUPTED, REFUSED, InputError, Interrupted, RunError
from tandem.launch import die_with_launcher, run_together
from tandem.pipeline_config import PipelineConfig
from tandem.recipe import fields_of, is_finished, load_config, resumed_run
from tandem.world import join, leave, rank, settle, speaks_for_all, worker, world_size

if TYPE_CHECKING:
    from tandem.run import Progress

_STAGES: dict[str, Any] = {
    "pipeline": PipelineConfig,
    "sft": SftConfig,
    "reward": RewardConfig,
    "dpo": DpoConfig,
    "ppo": PpoConfig,
}
_EVAL = "eval"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    keep_memory()
    die_with_launcher()
    try:
        if words and words[0] in _STAGES and not {"-h", "--help"} & set(words):
            return _run_stage(words[0], words[1:])
        if words[:1] == [_EVAL] and not {"-h", "--help"} & set(words):
            return _run_eval(words[1:])
        known, rest = _parser().parse_known_args(words)
        return int(known.run(known, rest))
    except InputError as error:
        return _ended(REFUSED, f"tandem: {error}")
    except RunError as error:
        return _ended(FAILED, f"tandem: the run failed: {error}")
    except Interrupted as ended:
        return _ended(INTERRUPTED, f"tandem: {ended}")
    except KeyboardInterrupt:
        return _ended(INTERRUPTED, "tandem: stopped.")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except Exception:
        if speaks_for_all():
            raise
        return FAILED
    finally:
        leave()


def _ended(status: int, message: str) -> int:
    """The exit status; of several processes that end together one says why."""
    if speaks_for_all():
        print(message, file=sys.stderr)
    return status


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}. See {self.prog} --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tandem", description="Actor-critic RLHF: policy and value model trained together.")
    parser.add_argument("--version", action="version", version=f"tandem {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_Parser)
    _add_demo(commands)
    for name, kind in _STAGES.items():
        _add_stage(commands, name, kind)
    _add_recipe_command(commands, _EVAL, EvalConfig)
    _add_generate(commands)
    _add_view(commands)
    _add_diagnose(commands)
    _add_bench(commands)
    _add_plan(commands)
    return parser


def _add_stage(commands: Any, name: str, kind: Any) -> None:
    command = _add_recipe_command(commands, name, kind)
    command.add_argument(
        "--resume", metavar="RUN", help="go on with the run in this folder, by its own recipe, where it was cut short"
    )
    command.add_argument(
        "--processes", metavar="N", help="train in so many processes on this machine (parallel.processes)"
    )


def _add_recipe_command(commands: Any, name: str, kind: Any) -> argparse.ArgumentParser:
    """A command whose settings come from a recipe; returns its parser, which is only read for its help."""
    command: argparse.ArgumentParser = commands.add_parser(
        name,
        help=(kind.__doc__ or "").strip().rstrip("."),
        description=(kind.__doc__ or "").strip() + " Settings come from the recipe; any of them can be given here.",
        epilog="settings:\n" + _settings_help(kind),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("recipe", nargs="?", help="a TOML file; the settings that follow override it")
    return command


def _settings_help(kind: Any) -> str:
    lines = []
    for name, field in fields_of(kind):
        if field.default is PydanticUndefined:
            default = "required"
        else:
            default = "unset" if field.default is None else str(field.default)
        lines.append(f"  --{name}  ({default})\n        {field.description or ''}")
    return "\n".join(lines)


def _run_stage(name: str, words: Sequence[str]) -> int:
    run, words = resumed_run(name, words)
    recipe, overrides = _recipe_and_settings(_with_processes(name, words))
    # A pipeline goes on with a stage by the recipe that it now has for it.
    if run is not None and recipe is not None and not worker():
        raise InputError(f"--resume {run} goes on with the run's own recipe, so {words[0]!r} was not understood.")
    if run is not None and recipe is None:
        recipe = run / "config.toml"
        if is_finished(run) and not [word for word in overrides if not word.startswith(_PROCESSES)]:
            if rank() == 0:
                print(f"{run}: the run is finished; there is nothing to go on with. To train further, give more steps.")
            return DONE
    config = load_config(_STAGES[name], recipe, overrides)
    if name != "pipeline":
        if not _placed_by_cluster(config) and config.parallel.processes > 1 and not worker():
            return _in_processes(name, config, run, words)
        _settle(config)
    directory = str(run) if run is not None else config.run.directory.replace("{stage}", name)
    config = _kept_in(directory, config)
    summary = _with_progress(lambda progress: _within_memory(name, config, progress, resume=run is not None))
    if rank() > 0:
        return INTERRUPTED if summary["interrupted"] else DONE
    print(f"{directory}: {_result(summary)}")
    if summary.get("health"):
        names = ", ".join(dict.fromkeys(finding["rule"] for finding in summary["health"]))
        print(f"{directory}: not all was well ({names}); see: tandem diagnose {directory}")
    return INTERRUPTED if summary["interrupted"] else DONE


def _with_processes(name: str, words: Sequence[str]) -> list[str]:
    """The words with --processes N as the setting that it is; one of several processes knows their number itself."""
    if name == "pipeline" and worker():
        raise InputError(
            "a pipeline starts the processes of its stages by itself; give the command once, without torchrun, and how "
            "many are to train together by --processes N."
        )
    long = [
        f"{_PROCESSES}{word.removeprefix('--processes')}" if word.partition("=")[0] == "--processes" else word
        for word in words
    ]
    return [*long, f"{_PROCESSES}={world_size()}"] if worker() else long


_PROCESSES = "--parallel.processes"


def _in_processes(name: str, config: Any, run: Path | None, words: Sequence[str]) -> int:
    """The same command in several processes. Raises InputError where the machine has too few GPUs for them."""
    from tandem.models.loading import check_device

    check_device(config.compute.device, config.parallel.processes)
    resume = [] if run is None else ["--resume", str(run)]
    return run_together([name, *_with_processes(name, words), *resume], config.parallel.processes)


def _placed_by_cluster(config: Any) -> bool:
    """Whether a cluster starts the processes that train. Raises InputError where they were started already."""
    over_cluster = getattr(config, "cluster", None) is not None
    if over_cluster and worker():
        raise InputError(
            "[cluster] starts the processes of a run by itself; give the command once, without torchrun, and how many "
            "are to train together by --processes N; or --cluster none."
        )
    return over_cluster


def _settle(config: Any) -> None:
    """Meet the other processes, where there are any."""
    parallel = config.parallel
    if worker():
        from tandem.models.loading import check_device

        device = check_device(config.compute.device, parallel.processes)
        join(device, parallel.replicate, parallel.activation_checkpointing)
    else:
        settle(parallel.activation_checkpointing)


def _recipe_and_settings(words: Sequence[str]) -> tuple[Path | None, Sequence[str]]:
    """The recipe, if the first word is none of the settings, and the settings."""
    return (Path(words[0]), words[1:]) if words and not words[0].startswith("-") else (None, words)


def _kept_in(directory: str, config: Any) -> Any:
    return config.model_copy(update={"run": config.run.model_copy(update={"directory": directory})})


def _run_eval(words: Sequence[str]) -> int:
    if any(word.partition("=")[0] == "--resume" for word in words):
        raise InputError("--resume was not understood: an evaluation keeps nothing to go on from; run it again.")
    config = load_config(EvalConfig, *_recipe_and_settings(words))
    directory = config.run.directory.replace("{stage}", _EVAL)
    config = _kept_in(directory, config)

    def work(progress: Progress) -> None:
        from tandem.run.memory import evaluation_knobs, memory_limits
        from tandem.stages.eval import run_eval

        with memory_limits("tandem eval", lambda: 0, evaluation_knobs(config)):
            run_eval(config, progress)

    _with_progress(work)
    print(f"{directory}: see eval.md, summary.json and pairs.jsonl.")
    return DONE


def _within_memory(name: str, config: Any, progress: Progress, *, resume: bool) -> dict[str, Any]:
    """The stage; memory that runs out around its steps is told of as within them. A pipeline does so for each stage."""
    if name == "pipeline":
        return _stage_function(name)(config, progress, resume=resume)
    from tandem.run.memory import memory_limits, steps_in, training_knobs

    with memory_limits(f"tandem {name}", lambda: steps_in(Path(config.run.directory)), training_knobs(config)):
        return _stage_function(name)(config, progress, resume=resume)


def _stage_function(name: str) -> Callable[..., dict[str, Any]]:
    """The stage, imported only now: the command line answers quickly where no model is needed."""
    if name == "pipeline":
        from tandem.stages.pipeline import run_pipeline

        return run_pipeline
    if name == "sft":
        from tandem.stages.sft import run_sft

        return run_sft
    if name == "reward":
        from tandem.stages.reward import run_reward

        return run_reward
    if name == "dpo":
        from tandem.stages.dpo import run_dpo

        return run_dpo
    from tandem.stages.joint_run import run_joint

    return run_joint


def _with_progress(work: Callable[[Progress], Any]) -> Any:
    from tandem.run import Progress
    from tandem.run.progress import silent_console

    quiet_libraries()
    with Progress(silent_console() if rank() > 0 else None) as progress:
        return work(progress)


def quiet_libraries() -> None:
    """Bars and advice of the libraries below are not for the person who runs a command."""
    from tandem.run.quiet import quiet_libraries

    quiet_libraries()


def _result(summary: dict[str, Any]) -> str:
    """What a stage reached, in a line."""
    from tandem.view.outcome import reached

    if summary["stage"] == "pipeline":
        made = f" The model: {summary['model']}." if summary["model"] else ""
        return f"{summary['seconds']:.0f} s, {reached(summary)}.{made} See report.html and summary.json."
    return f"{summary['steps']} steps in {summary['seconds']:.0f} s, {reached(summary)}. See model/ and summary.json."


def _add_generate(commands: Any) -> None:
    command = commands.add_parser(
        "generate", help="Try a model", description="Answers of a model to prompts.", allow_abbrev=False
    )
    command.add_argument("model", help="directory or hub id of a causal language model")
    command.add_argument(
        "--prompt",
        action="append",
        help="a prompt; may be given several times (else one a line from standard input)",
    )
    command.add_argument(
        "--chat", action="store_true", help="put each prompt through the chat template as a user's turn"
    )
    command.add_argument("--max-new-tokens", type=_at_least_one, default=64)
    command.add_argument("--temperature", type=_temperature, default=1.0)
    command.add_argument("--top-k", type=_at_least_one, default=None, help="1 takes the likeliest token every time")
    command.add_argument("--top-p", type=_share, default=1.0)
    command.add_argument("--responses", type=_at_least_one, default=1, help="answers to each prompt")
    command.add_argument("--seed", type=_seed, default=0)
    command.add_argument("--device", default="auto")
    command.add_argument("--precision", choices=["auto", "float32", "bfloat16"], default="auto")
    command.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run Python code that comes with the model; only for models you trust",
    )
    command.set_defaults(run=_run_generate)


def _run_generate(known: argparse.Namespace, rest: Sequence[str]) -> int:
    _refuse_rest(rest)
    prompts = known.prompt or _lines_of_input()
    if not prompts:
        raise InputError("no prompt: give --prompt TEXT, or prompts on standard input, one a line.")
    quiet_libraries()
    from tandem.run.memory import memory_limits
    from tandem.stages.generate import GenerateSettings, run_generate

    settings = GenerateSettings(**_fields_of(GenerateSettings, known))
    knobs = {
        f"--{name.replace('_', '-')} {getattr(known, name)}": "lower it" for name in ("responses", "max_new_tokens")
    }
    with memory_limits("tandem generate", lambda: 0, knobs):
        rollouts = run_generate(settings, prompts)
    for rollout in rollouts:
        print(f"> {rollout.prompt.row['prompt']}\n{rollout.text.strip()}\n")
    return DONE


def _lines_of_input() -> list[str]:
    try:
        return [line.rstrip("\n") for line in sys.stdin if line.strip()]
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input is not UTF-8 text (it holds the byte {error.object[error.start]:#x}); give prompts as "
            "UTF-8, one a line."
        ) from None


def _add_view(commands: Any) -> None:
    command = commands.add_parser(
        "view",
        help="Look at a run: its report, and every token of its samples",
        description="Serves a run's report and its samples, every token with its advantage, value, KL and more, to a "
        "browser on this machine, until Ctrl-C.",
        allow_abbrev=False,
    )
    command.add_argument("directory", type=Path, metavar="RUN", help="the folder of a run, finished or not")
    command.add_argument("--port", type=_port, default=None, help="port to serve at (a free one)")
    command.add_argument("--no-browser", action="store_true", help="open no browser, only say the address")
    command.add_argument(
        "--export",
        type=Path,
        metavar="PATH",
        help="write the viewer with all samples to FILE.html, or to a folder where there are many, and end",
    )
    command.add_argument("--report", action="store_true", help="write report.html into the run's folder, and end")
    command.set_defaults(run=_run_view)


def _run_view(known: argparse.Namespace, rest: Sequence[str]) -> int:
    _refuse_rest(rest)
    serves = not known.report and known.export is None
    if not serves and (known.port is not None or known.no_browser):
        raise InputError(
            "--port and --no-browser have no effect with --export or --report, which serve nothing; leave them out."
        )
    from tandem.view import run_view

    run_view(
        known.directory,
        port=known.port or 0,
        export_to=known.export,
        report=known.report,
        open_browser=not known.no_browser,
    )
    return DONE


def _add_diagnose(commands: Any) -> None:
    command = commands.add_parser(
        "diagnose",
        help="What is wrong with a run, why, and which line of its recipe to change",
        description="Judge a joint run by its metrics, while it goes or afterwards; or one of TRL, OpenRLHF or verl by "
        "its TensorBoard folder or a CSV, JSON or JSON lines export. Finding something is not failing: the exit status "
        "is 0.",
        allow_abbrev=False,
    )
    command.add_argument("path", metavar="RUN", type=Path, help="folder of a run, or a file of metrics")
    command.add_argument("--json", action="store_true", help="for scripts: one JSON object")
    command.set_defaults(run=_run_diagnose)


def _run_diagnose(known: argparse.Namespace, rest: Sequence[str]) -> int:
    _refuse_rest(rest)
    from tandem.health import watched
    from tandem.health.imports import read_run
    from tandem.health.words import record, report

    found = read_run(known.path)
    watch = watched(found.rows, found.config)
    print(json.dumps(record(found, watch), indent=2) if known.json else report(str(known.path), found, watch))
    return DONE


def _add_demo(commands: Any) -> None:
    command = commands.add_parser(
        "demo",
        help="RLHF on a laptop: reward model, then policy and value model together",
        description="A small chat model learns to continue the openings of film reviews positively: preferences from "
        "its own samples, a reward model from those, then the joint stage under that reward model.",
        allow_abbrev=False,
    )
    command.add_argument(
        "--model", help="directory or hub id of a causal language model (default: SmolLM2-135M-Instruct)"
    )
    command.add_argument("--run-dir", type=Path, default=Path("runs/demo"))
    command.add_argument("--seed", type=_seed, default=0)
    command.add_argument("--quick", action="store_true", help="a few steps only, to see that it runs")
    command.set_defaults(run=_run_demo)


def _run_demo(known: argparse.Namespace, rest: Sequence[str]) -> int:
    _refuse_rest(rest)
    from tandem.demo.story import run_demo

    summary = _with_progress(lambda progress: run_demo(known.model, known.run_dir, known.seed, known.quick, progress))
    return INTERRUPTED if summary["interrupted"] else DONE


def _add_bench(commands: Any) -> None:
    command = commands.add_parser(
        "bench",
        help="How fast a joint step and decoding are here",
        description="Times joint steps and decoding, each side in processes of its own that take turns, against "
        "transformers' generate and, where their interpreters are given, TRL 1.12 and vLLM.",
        allow_abbrev=False,
    )
    command.add_argument("--model", help="directory or hub id of a model to time (default: the page's rows)")
    command.add_argument(
        "--only", metavar="WORDS", help="the row of this name, or those whose names hold all of its words"
    )
    command.add_argument("--rounds", type=_at_least_one, default=3, help="processes of each side")
    command.add_argument("--steps", type=_at_least_one, default=2, help="steps or batches in each, after the first")
    command.add_argument("--growth", action="store_true", help="also how cost grows with length, batch, ...")
    command.add_argument("--out", type=Path, help="a folder for performance.md, performance.json and the plot")
    command.add_argument("--trl-python", metavar="PYTHON", help="the python of an environment with trl 1.12")
    command.add_argument("--vllm-python", metavar="PYTHON", help="the python of an environment with vllm")
    command.add_argument("--device", default="auto")
    command.add_argument("--threads", type=_at_least_one, help="of the processor (default: all)")
    command.set_defaults(run=_run_bench)


def _run_bench(known: argparse.Namespace, rest: Sequence[str]) -> int:
    _refuse_rest(rest)
    quiet_libraries()
    from tandem.bench.command import BenchSettings, run_bench

    settings = BenchSettings(**{name: value for name, value in vars(known).items() if name != "run"})
    _with_progress(lambda progress: run_bench(settings, progress))
    return DONE


def _add_plan(commands: Any) -> None:
    command = commands.add_parser(
        "plan",
        help="What a joint recipe needs and how long it takes on given GPUs, before anyone pays",
        description="Memory of one GPU by component, the time of a step by phase, tokens a day, and which line of the "
        "recipe to change where it does not fit or would be faster. A recipe with a cluster is compared with the GPUs "
        "that there are. No weights are read. Settings of the recipe can be given here too "
        "(--rollout.prompts_per_step 64). Exit status: 0 it fits, 1 it does not.",
        allow_abbrev=False,
    )
    command.add_argument("recipe", type=Path, help="the TOML file of a joint run")
    command.add_argument("--gpus", required=True, help="how many of which: 8xH100, 1x24GB, 64xA100-80GB, or cpu")
    command.add_argument("--prompt-tokens", type=_at_least_one, help="mean prompt (default: data.max_prompt_tokens)")
    command.add_argument("--response-tokens", type=_at_least_one, help="mean response (rollout.max_new_tokens)")
    command.add_argument("--model-shape", metavar="SHAPE", help="plan this shape, such as 7b, for all models instead")
    command.add_argument("--json", action="store_true", help="for scripts: one JSON object, in bytes and seconds")
    command.set_defaults(run=_run_plan)


def _run_plan(known: argparse.Namespace, rest: Sequence[str]) -> int:
    quiet_libraries()
    from tandem.stages.planning import PlanSettings, run_plan

    plan = run_plan(known.recipe, rest, PlanSettings(**_fields_of(PlanSettings, known)))
    return DONE if plan.fits else FAILED


def _fields_of(settings: Any, known: argparse.Namespace) -> dict[str, Any]:
    """The options of a command that are fields of its settings, a dataclass."""
    return {name: value for name, value in vars(known).items() if name in settings.__dataclass_fields__}


def _refuse_rest(rest: Sequence[str]) -> None:
    if rest:
        raise InputError(f"{' '.join(rest)!r} was not understood; --help lists what is.")


def _number(text: str, kind: Any, allowed: Callable[[Any], bool], words: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")
    return value


def _seed(text: str) -> int:
    return int(_number(text, int, lambda value: 0 <= value < 2**32, f"a whole number from 0 to {2**32 - 1}"))


def _at_least_one(text: str) -> int:
    return int(_number(text, int, lambda value: 1 <= value < 2**31, f"a whole number from 1 to {2**31 - 1}"))


def _port(text: str) -> int:
    return int(_number(text, int, lambda value: 1 <= value < 2**16, f"a port, a whole number from 1 to {2**16 - 1}"))


def _temperature(text: str) -> float:
    words = "a number above 0, from 0.01 to 100 (for the likeliest token: --top-k 1)"
    return float(_number(text, float, lambda value: 0.01 <= value <= 100, words))


def _share(text: str) -> float:
    return _number(text, float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
