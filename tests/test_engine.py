"""Optimisation in one process: accumulation, clipping, master weights, schedules."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tandem.config import OptimizerSection
from tandem.engine.local import LocalEngine, ParameterGroup, schedule_factor


def engine(parameter, **settings) -> LocalEngine:
    options = OptimizerSection(**settings)
    return LocalEngine([ParameterGroup([parameter], options.lr)], options)


def test_gradients_of_micro_batches_add_up_and_are_clipped():
    parameter = nn.Parameter(torch.zeros(2))
    made = engine(parameter, lr=0.1, max_grad_norm=1.0)
    for part in (torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])):
        made.backward((parameter * part).sum())
    assert made.step() == pytest.approx(5.0)
    assert parameter.grad is None
    assert parameter.tolist() == pytest.approx([-0.1, -0.1], rel=1e-4)


def test_steps_too_small_for_bfloat16_are_not_lost():
    parameter = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    made = engine(parameter, lr=1e-4)
    for _ in range(100):
        made.backward(parameter.sum())
        made.step()
    assert parameter.dtype == torch.bfloat16
    assert parameter.item() == pytest.approx(0.99, abs=0.004)


def test_schedules():
    settings = OptimizerSection(schedule="linear", warmup_fraction=0.2)
    assert [schedule_factor(n, 10, settings) for n in (0, 1, 2, 6, 9)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.125])
    cosine = OptimizerSection(schedule="cosine")
    assert [schedule_factor(n, 10, cosine) for n in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])
    assert schedule_factor(7, 10, OptimizerSection()) == 1.0


def test_progress_sets_the_rates_of_all_groups():
    body, head = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    settings = OptimizerSection(lr=0.1, schedule="linear")
    made = LocalEngine([ParameterGroup([body], 0.1), ParameterGroup([head], 0.3)], settings)
    made.set_progress(3, 4)
    assert made.lr == pytest.approx(0.025)
    made.backward((body + head).sum())
    made.step()
    assert (body.item(), head.item()) == pytest.approx((-0.025, -0.075), rel=1e-4)


def test_discarded_gradients_move_nothing():
    parameter = nn.Parameter(torch.zeros(1))
    made = engine(parameter, lr=0.1)
    made.backward(3 * parameter.sum())
    made.discard()
    made.backward(0 * parameter.sum())
    assert made.step() == 0.0
    assert parameter.item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_can_be_taken_out_and_put_back(dtype):
    parameter, other = nn.Parameter(torch.zeros(1, dtype=dtype)), nn.Parameter(torch.zeros(1, dtype=dtype))
    made = LocalEngine([ParameterGroup([parameter, other], 0.1)], OptimizerSection())
    made.backward(3 * parameter.sum())
    taken = made.take()
    assert taken[0].tolist() == [3.0]
    assert taken[1] is None
    assert made.take() == [None, None]
    made.backward(parameter.sum() + 2 * other.sum())
    made.put(taken)
    assert [gradient.item() for gradient in made.take()] == [4.0, 2.0]


def test_no_schedule_runs_at_the_peak():
    made = engine(nn.Parameter(torch.zeros(1)), lr=0.1, schedule="linear", warmup_fraction=0.5)
    made.set_progress(0, 10)
    assert made.lr == pytest.approx(0.02)
    made.set_peak()
    assert made.lr == pytest.approx(0.1)


def test_groups_keep_their_own_rates():
    body, head = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    made = LocalEngine([ParameterGroup([body], 0.1), ParameterGroup([head], 0.3)], OptimizerSection(lr=0.1))
    made.backward((body + head).sum())
    made.step()
    assert (body.item(), head.item()) == pytest.approx((-0.1, -0.3), rel=1e-4)


def test_a_share_of_the_rate_holds_from_the_next_update_on():
    made = engine(nn.Parameter(torch.zeros(1)), lr=0.1, schedule="linear")
    made.set_share(0.5)
    made.set_progress(5, 10)
    assert made.lr == pytest.approx(0.025)
    made.set_peak()
    assert made.lr == pytest.approx(0.05)
