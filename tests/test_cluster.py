"""What a run over a cluster is made of, as far as it needs no Ray: tasks, their answers put together, events."""

from __future__ import annotations

import sys

import pytest
import torch

from generators import make
from sharded_memory import peak_growth
from tandem.cluster.events import Events, read_events, summed
from tandem.cluster.library import ray
from tandem.cluster.placement import lines
from tandem.cluster.transport import buckets
from tandem.config import ClusterSection
from tandem.errors import InputError
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.loading import load_causal
from tandem.models.trunk import Trunk
from tandem.rewards.composition import Earned
from tandem.rollout.torch_generator import draw_uniform, groups_by_length
from tandem.stages.workers import joined
from tandem.types import Prompt

PROMPTS = [Prompt(tuple(range(5, 5 + length)), "", None, {}) for length in (7, 1, 3, 2, 3, 5, 2)]


def test_tasks_are_the_batches_of_one_process_and_bring_their_own_chance(tiny):
    policy = CausalPolicy(
        Trunk(load_causal(str(tiny()), "model", torch.float32, torch.device("cpu"))), FULL_DISTRIBUTION
    )
    together = make("torch", policy, limit=9, batch=2, seed=3).generate(PROMPTS)
    chance = draw_uniform(len(PROMPTS), 9, torch.Generator().manual_seed(3))
    elsewhere = make("torch", policy, limit=9, batch=64, seed=8)
    for rows in groups_by_length(PROMPTS, 2)[::-1]:
        answers = elsewhere.answer([PROMPTS[row] for row in rows], chance[rows])
        assert answers == [together[row] for row in rows]


def test_groups_hold_every_row_once_by_length():
    groups = groups_by_length(PROMPTS, 3)
    assert [len(group) for group in groups] == [3, 3, 1]
    lengths = [len(PROMPTS[row].ids) for group in groups for row in group]
    assert lengths == sorted(lengths)
    assert sorted(row for group in groups for row in group) == list(range(len(PROMPTS)))


def test_what_parts_earned_is_put_together_row_by_row():
    parts = [
        Earned(torch.tensor([1.0, float("nan")]), None, frozenset({1}), "the second failed"),
        Earned(torch.tensor([2.0]), torch.tensor([[0.5, 0.25, 0.0]])),
        Earned(torch.tensor([float("nan"), 3.0]), torch.tensor([[0.0], [1.0]]), frozenset({0}), "another"),
    ]
    whole = joined(parts)
    assert whole.final[[0, 2, 4]].tolist() == [1.0, 2.0, 3.0]
    assert whole.missing == {1, 3}
    assert whole.fault == "the second failed"
    assert whole.process is not None
    assert whole.process.tolist() == [[0, 0, 0], [0, 0, 0], [0.5, 0.25, 0], [0, 0, 0], [1, 0, 0]]
    assert joined(parts[:1]).process is None


def test_events_belong_to_their_step_and_are_counted_once(tmp_path):
    events = Events(tmp_path)
    events.begin(3)
    events.write("worker lost", pool="generator", lost_samples=4)
    assert events.take_counts()["lost_samples"] == 4
    assert events.take_counts()["worker lost"] == 0
    events.begin(4)
    events.write("given twice", pool="generator", samples=2)
    assert [(event["step"], event["event"]) for event in read_events(tmp_path)] == [
        (3, "worker lost"),
        (4, "given twice"),
    ]
    assert summed(read_events(tmp_path)) == {"events": {"worker lost": 1, "given twice": 1}, "lost_samples": 4}
    assert read_events(tmp_path / "none") == []


def test_every_process_has_a_bundle_of_what_its_line_says():
    settings = ClusterSection(
        kind="ray", trainer_cpus=8, trainer_gpus=1, generators=2, generator_cpus=4, reward_workers=1, reward_gpus=0.5
    )
    assert lines(settings, trainers=2) == [
        ("trainer", {"CPU": 8.0, "GPU": 1.0}),
        ("trainer", {"CPU": 8.0, "GPU": 1.0}),
        ("generator", {"CPU": 4.0}),
        ("generator", {"CPU": 4.0}),
        ("reward worker", {"CPU": 1.0, "GPU": 0.5}),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads memory in /proc")
def test_weights_are_packed_a_bucket_at_a_time():
    weights = ((str(number), torch.full((2**22,), 1.0)) for number in range(40))
    grown, names = peak_growth(lambda: [packed.name for bucket in buckets(weights) for packed in bucket])
    assert names == [str(number) for number in range(40)]
    assert grown < 40 * 2**24 / 2


def test_ray_that_is_not_installed_is_told_of(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'tandem-rlhf\[ray\]'"):
        ray()
