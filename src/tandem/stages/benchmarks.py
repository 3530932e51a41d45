"""Tasks of lm-evaluation-harness on a saved model; the package is an extra, and asked for only where it is used."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

from tandem.config import EvalConfig
from tandem.errors import InputError, RunError, is_out_of_memory, reason_of
from tandem.models.sharing import Placement
from tandem.run import Progress


def check_benchmarks(config: EvalConfig) -> None:
    """Raises InputError where tasks are asked for and the harness is not installed, or does not know one."""
    if not config.benchmarks:
        return
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "benchmarks needs lm-evaluation-harness, which is not installed: pip install 'tandem-rlhf[benchmarks]', or "
            "leave benchmarks out."
        )
    if config.benchmark_folder is not None and not Path(config.benchmark_folder).is_dir():
        raise InputError(f"benchmark_folder = {config.benchmark_folder!r}: there is no such folder; mend the path.")
    known = set(_known_tasks(config).all_tasks)
    unknown = [task for task in config.benchmarks if task not in known]
    if unknown:
        raise InputError(
            f"benchmarks: lm-evaluation-harness knows no task {', '.join(map(repr, unknown))}; "
            f"`lm_eval ls tasks` lists its {len(known)}."
        )


def run_benchmarks(config: EvalConfig, placement: Placement, progress: Progress) -> dict[str, Any]:
    """Each task's metrics, by the name of the model; nothing where no task is asked for.

    Raises RunError where the harness fails.
    """
    return {
        name: _results(source, config, placement, progress)
        for name, source in (("model", config.model), ("baseline", config.baseline))
        if config.benchmarks
    }


def _known_tasks(config: EvalConfig) -> Any:
    """The harness's own tasks and those in the folder."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=config.benchmark_folder)


def _results(source: str, config: EvalConfig, placement: Placement, progress: Progress) -> dict[str, Any]:
    import lm_eval

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    seed = config.run.seed
    try:
        with progress.console.status(f"lm-evaluation-harness: {source}"):
            found = lm_eval.simple_evaluate(
                model="hf",
                model_args={
                    "pretrained": source,
                    "dtype": str(placement.dtype).removeprefix("torch."),
                    "trust_remote_code": placement.trust_remote_code,
                },
                tasks=list(config.benchmarks),
                task_manager=_known_tasks(config),
                device=str(placement.device),
                batch_size=config.rollout.sequences_per_batch,
                limit=config.benchmark_limit,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise RunError(f"lm-evaluation-harness failed on {source!r}: {reason_of(error)}.") from error
    return {task: _numbers(metrics) for task, metrics in found["results"].items()}


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """A task's metrics, which the harness names `metric,filter`; what else stands beside them is left out."""
    return {name: float(value) for name, value in metrics.items() if "," in name and isinstance(value, int | float)}
