"""Joint steps in this process, by `tandem.bench.timed`: WORKLOAD REWARD_MODEL STEPS [GATHER], JSON out.

Alone, times are the processor's in this process and not the wall's: in one thread they are the same on an idle machine,
and they stay what they are where other jobs run beside it. One of several processes waits for the others, so its times
are the wall's; GATHER is then what they gather of the policy to sample.
"""

from __future__ import annotations

import json
import sys
import time

from tandem.bench.joint_step import measure
from tandem.bench.workloads import Workload
from tandem.world import end, join, worker

if __name__ == "__main__":
    workload, reward_model, steps = Workload.from_json(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if worker():
        join("cpu", replicate=1, checkpointing=False)
        print(json.dumps(measure(workload, reward_model, steps, gather=sys.argv[4])))
    else:
        print(json.dumps(measure(workload, reward_model, steps, time.process_time)))
    end(0)
