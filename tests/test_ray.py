"""Joint runs over real Ray processes: placed, killed, and the same in the end as runs that nobody touched."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if importlib.util.find_spec("ray") is None:
    pytest.skip("Ray is not installed here; `make test-ray` has an environment with it", allow_module_level=True)

from faults.cluster import until_free
from faults.same import differences
from in_processes import run_in_processes
from ray_runs import kill_when_at, loopback_cluster, lost, words_of
from tandem.cli import main
from tandem.cluster.events import Events
from tandem.cluster.library import ray
from tandem.cluster.meeting import interface_of, open_store, store_at
from tandem.cluster.pool import Patience, Pool
from tandem.errors import InputError
from tandem.run.folder import read_metrics
from tandem.run.signals import Terminated, ended_by_sigterm
from tandem.stages.over_ray import Lost, verdict
from tandem.stages.trainer import Ended
from test_commands import refused
from test_processes import assert_same

SIZE = 2
BEHIND = ["--rollout.staleness=1", f"--rollout.sequences_per_batch={SIZE}", "--compute.precision=float32", "--steps=3"]
TOGETHER = ["--cluster=ray", "--processes=2", "--cluster.samples_per_task=1"]
OVER_RAY = ["--cluster=ray", "--cluster.generators=2", f"--cluster.samples_per_task={SIZE}"]
ALONE = ["--cluster=none", f"--rollout.sequences_per_batch={SIZE}"]
ENDED = {
    "killed": (signal.SIGKILL, OVER_RAY, ALONE, "untouched"),
    "terminated": (signal.SIGTERM, OVER_RAY, ALONE, "untouched"),
    "terminated, with two trainers": (signal.SIGTERM, TOGETHER, [], "in_two"),
}
"""How a command is ended, what it runs, how the run goes on, and which run it must equal."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[str]:
    with loopback_cluster(tmp_path_factory.mktemp("ray")) as address:
        yield address


@pytest.fixture(scope="module")
def untouched(tiny, tmp_path_factory) -> Path:
    """The run as it is in one process that nobody kills, on batches that are as large as tasks."""
    folder = tmp_path_factory.mktemp("untouched")
    assert main(["ppo", *words_of(folder, tiny(), "run"), f"--rollout.sequences_per_batch={SIZE}"]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def behind(tiny, tmp_path_factory) -> Path:
    """The run in one process whose responses are sampled while it learns from those before."""
    folder = tmp_path_factory.mktemp("behind")
    assert main(["ppo", *words_of(folder, tiny(), "run"), *BEHIND]) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def in_two(tiny, tmp_path_factory) -> Path:
    """The run in two processes without a cluster, each response sampled by itself."""
    folder = tmp_path_factory.mktemp("in_two")
    words = ["ppo", *words_of(folder, tiny(), "run"), "--rollout.sequences_per_batch=1"]
    assert run_in_processes([words], folder / "processes") == [0]
    return folder / "run"


def test_a_run_over_ray_is_the_run_in_one_process(cluster, tiny, tmp_path, untouched):
    words = [
        *words_of(tmp_path, tiny(), "run"),
        *OVER_RAY,
        f"--cluster.address={cluster}",
        "--cluster.reward_workers=2",
    ]
    assert main(["ppo", *words]) == 0
    assert differences(tmp_path / "run", untouched) == []
    assert lost(tmp_path / "run", "worker lost") == []
    row = read_metrics(tmp_path / "run")[-1]
    assert (row["cluster/generators"], row["cluster/reward_workers"], row["cluster/lost_samples"]) == (2, 2, 0)


def test_a_killed_generator_costs_its_task_alone(cluster, tiny, tmp_path, untouched, capsys):
    words = [*words_of(tmp_path, tiny(), "run"), *OVER_RAY, f"--cluster.address={cluster}"]
    done: list[int] = []
    watching = kill_when_at("ray::GeneratorWorker.answer", signal.SIGKILL, done)
    assert main(["ppo", *words]) == 0
    watching.join()
    assert done
    assert differences(tmp_path / "run", untouched) == []
    (event,) = lost(tmp_path / "run", "worker lost")
    assert event["pool"] == "generator"
    assert event["lost_samples"] <= SIZE
    assert f"generator {event['worker']} was lost" in capsys.readouterr().out


def test_a_generator_that_hangs_has_its_task_done_by_another(cluster, tiny, tmp_path, untouched):
    words = [*words_of(tmp_path, tiny(), "run"), *OVER_RAY, f"--cluster.address={cluster}"]
    done: list[int] = []
    watching = kill_when_at("ray::GeneratorWorker.answer", signal.SIGSTOP, done)
    assert main(["ppo", *words, "--cluster.silent_seconds=300"]) == 0
    watching.join()
    assert done
    assert differences(tmp_path / "run", untouched) == []
    assert [event["pool"] for event in lost(tmp_path / "run", "given twice")] == ["generator"]
    assert lost(tmp_path / "run", "worker lost") == []


def test_the_only_generator_that_hangs_is_ended_and_replaced(cluster, tiny, tmp_path, untouched):
    words = [*words_of(tmp_path, tiny(), "run"), *OVER_RAY, f"--cluster.address={cluster}", "--cluster.generators=1"]
    done: list[int] = []
    watching = kill_when_at("ray::GeneratorWorker.answer", signal.SIGSTOP, done)
    assert main(["ppo", *words, "--cluster.silent_seconds=15"]) == 0
    watching.join()
    assert done
    assert differences(tmp_path / "run", untouched) == []
    assert [event["reason"] for event in lost(tmp_path / "run", "worker lost")] == ["no answer for 15 s"]


def test_sampling_one_update_behind_is_the_same_over_a_cluster(cluster, tiny, tmp_path, behind):
    words = [*words_of(tmp_path, tiny(), "run"), *BEHIND, *OVER_RAY, f"--cluster.address={cluster}"]
    assert main(["ppo", *words]) == 0
    assert differences(tmp_path / "run", behind) == []


def test_two_trainers_learn_while_generators_sample(cluster, tiny, tmp_path, behind):
    words = [*words_of(tmp_path, tiny(), "run"), *BEHIND, *OVER_RAY, f"--cluster.address={cluster}", "--processes=2"]
    assert main(["ppo", *words, "--cluster.reward_workers=1"]) == 0
    assert_same(tmp_path / "run", behind)


def test_two_trainers_of_which_one_is_killed_are_two_processes_without_a_cluster(
    cluster, tiny, tmp_path, in_two, capsys
):
    """The second dies while the first scores the fourth step, and takes it along; the third step is done again."""
    words = [*words_of(tmp_path, tiny(), "run", call=5, victim="another_trainer"), *TOGETHER]
    assert main(["ppo", *words, f"--cluster.address={cluster}"]) == 0
    (event,) = lost(tmp_path / "run", "trainer lost")
    assert (event["processes"], event["goes_on_after_step"]) == ([1], 2)
    assert differences(tmp_path / "run", in_two) == []
    said = capsys.readouterr()
    assert "the trainer died; a new one goes on after step 2" in said.out
    assert [line for line in (said.out + said.err).splitlines() if "(raylet)" in line] == []


def test_a_killed_reward_worker_costs_its_task_alone(cluster, tiny, tmp_path, untouched):
    words = [*words_of(tmp_path, tiny(), "run", call=5), *OVER_RAY, f"--cluster.address={cluster}"]
    assert main(["ppo", *words, "--cluster.reward_workers=2"]) == 0
    assert differences(tmp_path / "run", untouched) == []
    (event,) = lost(tmp_path / "run", "worker lost")
    assert event["pool"] == "reward worker"
    assert event["lost_samples"] <= SIZE


def test_a_killed_trainer_goes_on_from_its_last_checkpoint(cluster, tiny, tmp_path, untouched):
    """It dies by its reward, in the fourth step; the third is done again."""
    words = [*words_of(tmp_path, tiny(), "run", call=5), *OVER_RAY, f"--cluster.address={cluster}"]
    assert main(["ppo", *words]) == 0
    assert [event["goes_on_after_step"] for event in lost(tmp_path / "run", "trainer lost")] == [2]
    assert differences(tmp_path / "run", untouched) == []


def test_the_ends_of_its_processes_say_how_a_trainer_ended():
    from ray.exceptions import ActorDiedError, RayTaskError

    done, refused = Ended({"steps": 5}, None), Ended(None, InputError("no such model"))
    dead, broken = ActorDiedError(), RayTaskError("run", "a traceback", RuntimeError("connection closed"))
    assert verdict({1: dead, 0: done}, 2) is done
    assert verdict({0: broken, 1: dead}, 2) == Lost([1])
    assert verdict({1: refused}, 2) is refused
    assert verdict({1: done}, 2) == Lost([0])
    with pytest.raises(RayTaskError, match="a traceback"):
        verdict({1: broken}, 2)


def test_a_signal_that_comes_while_a_task_is_waited_for_raises_what_its_handler_raises(cluster, tmp_path):
    class Slow:
        def prepare(self) -> None:
            pass

        def answer(self) -> None:
            time.sleep(30)

    def start(number: int) -> Any:
        return ray().remote(Slow).options(num_cpus=number + 1).remote()

    ray().init(address=cluster, log_to_driver=False, logging_level="error")
    try:
        pool = Pool("generator", 1, start, Patience(2.0, 60.0), Events(tmp_path), print)
        threading.Timer(5.0, signal.raise_signal, [signal.SIGTERM]).start()
        with ended_by_sigterm(), pytest.raises(Terminated):
            pool.run([[1]], lambda process, _: process.answer.remote())
    finally:
        ray().shutdown()


@pytest.mark.skipif(sys.platform != "linux", reason="looks for ports in /proc")
def test_trainers_meet_at_the_address_of_the_cluster_alone():
    store, (host, port) = open_store()
    store_at((host, port)).set("key", "value")
    assert store.get("key") == b"value"
    lines = [line.split() for kind in ("tcp", "tcp6") for line in Path(f"/proc/net/{kind}").read_text().splitlines()]
    listening = [line[1] for line in lines if line[3] == "0A" and line[1].endswith(f":{port:04X}")]
    assert (host, listening) == ("127.0.0.1", [f"0100007F:{port:04X}"])
    assert interface_of(host) == "lo"


def test_a_trainer_that_always_dies_is_given_up(cluster, tiny, tmp_path, capsys):
    words = [*words_of(tmp_path, tiny(), "run", call=1), *OVER_RAY, f"--cluster.address={cluster}"]
    assert main(["ppo", *words, "--cluster.trainer_restarts=0"]) == 1
    assert "the trainer died 1 times" in capsys.readouterr().err


@pytest.mark.parametrize("ended", ENDED)
def test_a_command_that_is_ended_goes_on_exactly(cluster, tiny, tmp_path, request, ended):
    number, options, onward, like = ENDED[ended]
    run = tmp_path / "run"
    words = [*words_of(tmp_path, tiny(), "run"), *options, f"--cluster.address={cluster}", "--cluster.reward_workers=1"]
    command = subprocess.Popen([sys.executable, "-m", "tandem", "ppo", *words], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not list(run.glob("checkpoints/step_*")):
        time.sleep(0.005)
    command.send_signal(number)
    said = command.communicate(timeout=60)[1].decode()
    if number == signal.SIGTERM:
        assert command.returncode == 130, said
    until_free(run, seconds=60)
    assert main(["ppo", "--resume", str(run), *onward]) == 0
    assert differences(run, request.getfixturevalue(like)) == []


def test_what_the_cluster_has_not_is_refused(cluster, tiny, tmp_path, capsys):
    words = [*words_of(tmp_path, tiny(), "run"), *OVER_RAY, f"--cluster.address={cluster}"]
    said = refused(capsys, ["ppo", *words, "--cluster.generator_cpus=5"])
    assert "11 CPUs" in said
    assert not (tmp_path / "run").exists()
