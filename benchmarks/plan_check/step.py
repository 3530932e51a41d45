"""Joint steps in this process: `python -m plan_check.step WORKLOAD REWARD_MODEL STEPS`, JSON out.

Times are the processor's in this process and not the wall's: in one thread they are the same on an idle machine, and
they stay what they are where other jobs run beside it.
"""

from __future__ import annotations

import json
import sys
import time

from tandem.allocator import keep_memory
from tandem.bench.joint_step import measure
from tandem.bench.workloads import Workload

if __name__ == "__main__":
    keep_memory()
    print(json.dumps(measure(Workload.from_json(sys.argv[1]), sys.argv[2], int(sys.argv[3]), time.process_time)))
