"""Signals, and what there is to go back to when one comes."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest
import torch

from tandem.config import CheckpointSection
from tandem.errors import Interrupted, RunError
from tandem.run.checkpoints import Snapshot, newest_good, write_checkpoint
from tandem.run.keeper import Keeper
from tandem.run.signals import Signals, Terminated


def receive(number: int, seconds: float) -> None:
    """Send this process a signal, and work on for so long."""
    os.kill(os.getpid(), number)
    wait(seconds)


def update_given_up(keeper: Keeper, weight: torch.Tensor) -> None:
    with keeper.safe("ppo"), keeper.updating():
        weight += 1
        raise Terminated


def wait(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.005)


def test_work_that_can_be_done_again_is_given_up_at_once():
    with Signals(grace_seconds=60) as signals:
        with pytest.raises(Terminated), signals.may_give_up():
            receive(signal.SIGTERM, 5)
        assert signals.requested
        with pytest.raises(Terminated), signals.may_give_up():
            pytest.fail("nothing begins any more")


def test_other_work_may_end_within_the_grace_and_is_given_up_after_it():
    with Signals(grace_seconds=1) as signals:
        receive(signal.SIGTERM, 0.05)
        assert signals.terminating
        started = time.monotonic()
        with pytest.raises(Terminated):
            wait(5)
        assert time.monotonic() - started < 2


def test_a_step_that_ends_in_time_is_not_disturbed_afterwards():
    with Signals(grace_seconds=0.2) as signals:
        receive(signal.SIGTERM, 0)
        with pytest.raises(Terminated):
            signals.end_if_terminating()
        wait(0.4)


def test_first_interrupt_asks_and_the_second_stops():
    with Signals(grace_seconds=1) as signals:
        receive(signal.SIGINT, 0.02)
        assert signals.requested
        assert not signals.terminating
        with pytest.raises(KeyboardInterrupt):
            receive(signal.SIGINT, 1)


class InterruptedTalk:
    """Two processes, both of which a SIGTERM reaches while they tell each other for the first time."""

    alone = False

    def __init__(self) -> None:
        self.talks = 0

    def gather(self, part):
        self.talks += 1
        if self.talks == 1:
            receive(signal.SIGTERM, 0.01)
        return [part, part]


def test_what_comes_while_processes_agree_is_kept_for_the_next_time(monkeypatch):
    talk = InterruptedTalk()
    monkeypatch.setattr("tandem.run.signals.world", lambda: talk)
    with Signals(grace_seconds=60) as signals:
        assert not signals.agreed()
        assert signals.agreed()
        with pytest.raises(Terminated):
            signals.end_if_terminating()


def snapshot(step: int, weight: torch.Tensor) -> Snapshot:
    return Snapshot(step, {"model/0.weight": weight}, {"step": step})


@pytest.fixture
def keeper(tmp_path):
    made = Keeper(tmp_path / "checkpoints", CheckpointSection(), sync=lambda: None)
    yield made
    made.close()


def saved(tmp_path) -> Snapshot | None:
    return newest_good(tmp_path / "checkpoints", pytest.fail)


def test_an_update_that_is_given_up_leaves_the_state_before_it(tmp_path, keeper):
    weight = torch.zeros(3)
    keeper.boundary(snapshot(4, weight), {})
    with pytest.raises(Interrupted, match=r"after step 4 is saved; go on with: tandem ppo --resume"):
        update_given_up(keeper, weight)
    assert saved(tmp_path).tensors["model/0.weight"].tolist() == [0.0] * 3


def test_after_quick_updates_no_copy_is_made_and_the_last_checkpoint_stands(tmp_path, keeper):
    weight = torch.zeros(3)
    keeper.boundary(snapshot(4, weight), {})
    keeper.save_marked()
    with keeper.updating():
        weight += 1
    keeper.boundary(snapshot(5, weight), {})
    with pytest.raises(Interrupted, match="after step 4 is saved"):
        update_given_up(keeper, weight)
    assert saved(tmp_path).state == {"step": 4}


def test_an_error_saves_what_there_is_and_says_how_to_go_on(tmp_path, keeper):
    keeper.boundary(snapshot(2, torch.ones(1)), {})
    with pytest.raises(RunError, match=r"a server is down\. The state after step 2 is saved"), keeper.safe("ppo"):
        raise RunError("a server is down.")
    assert saved(tmp_path).step == 2


def test_a_snapshot_is_saved_as_it_was_though_weights_move_on(tmp_path):
    keeper = Keeper(tmp_path / "checkpoints", CheckpointSection(every_steps=1), sync=lambda: None)
    weight = torch.zeros(200_000)
    keeper.boundary(snapshot(1, weight), {})
    weight += 1
    keeper.wait()
    assert saved(tmp_path).tensors["model/0.weight"].sum() == 0
    keeper.close()


def test_a_half_written_checkpoint_is_not_one(tmp_path):
    folder = tmp_path / "checkpoints"
    write_checkpoint(folder, snapshot(1, torch.zeros(1)))
    (folder / ".partial_step_000002").mkdir()
    assert newest_good(folder, pytest.fail).step == 1


def test_a_checkpoint_of_another_format_is_told(tmp_path):
    folder, said = tmp_path / "checkpoints", []
    path = write_checkpoint(folder, snapshot(1, torch.zeros(1))).path / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    assert newest_good(folder, said.append) is None
    assert "its format is 99" in said[0]
