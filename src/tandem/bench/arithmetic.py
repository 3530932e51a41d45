"""What a workload must multiply, whoever does it."""

from __future__ import annotations

from tandem.bench.workloads import Workload
from tandem.plan.arithmetic import adapted_share, head_flops, trunk_flops
from tandem.plan.devices import Pace
from tandem.plan.model_size import ModelSize


def _trunk(size: ModelSize, workload: Workload) -> float:
    """One forward of all layers over prompts and responses."""
    length = workload.prompt_tokens + workload.response_tokens
    return trunk_flops(size, workload.sequences * length, length)


def decoding_flops(size: ModelSize, workload: Workload) -> float:
    """Every prompt and response token through the trunk once, every response token through the head."""
    return _trunk(size, workload) + head_flops(size, workload.response_total)


def learning_flops(size: ModelSize, workload: Workload) -> float:
    """Forward and backward of policy and value model in every epoch.

    A backward is two forwards, or one where the weights are frozen; adapters learn in the upper layers only.
    """
    trunk, head = _trunk(size, workload), head_flops(size, workload.response_total)
    if workload.sharing == "separate":
        return workload.epochs * (6 * trunk + 3 * head)
    return workload.epochs * (4 * trunk * adapted_share(size, workload.upper_layers) + 2 * head)


def joint_step_flops(size: ModelSize, workload: Workload) -> float:
    """The least that a joint step multiplies where nothing is computed twice.

    Sampling; reward, reference and value forward, where one trunk is shared in the layers that carry adapters only;
    then what is learnt.
    """
    trunk, head = _trunk(size, workload), head_flops(size, workload.response_total)
    measured = trunk if workload.sharing == "separate" else trunk * adapted_share(size, workload.upper_layers)
    measuring = 3 * measured + head
    return decoding_flops(size, workload) + measuring + learning_flops(size, workload)


def decoding_floor(size: ModelSize, workload: Workload, pace: Pace) -> float:
    """Seconds that a batch takes at this pace: the prompts' products, then for each token the slower of
    multiplying the rows and reading the weights and the keys and values so far."""
    rows, width = workload.sequences, 2 if workload.precision == "bfloat16" else 4
    weights = size.trunk + size.head
    prompts = 2.0 * size.trunk * rows * workload.prompt_tokens / pace.flops
    arithmetic = 2.0 * rows * weights / pace.flops
    return prompts + workload.response_tokens * max(arithmetic, weights * width / pace.bandwidth)
