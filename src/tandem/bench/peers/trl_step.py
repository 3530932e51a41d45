"""Joint steps of TRL 1.12's PPOTrainer, the last that had one: `trl_step.py WORKLOAD STEPS`, JSON out.

The same work: full fine-tuning of four separate models, one optimiser step an epoch, responses of a fixed length.
"""

from __future__ import annotations

import itertools
import json
import os
import resource
import sys
import tempfile
import time

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    TrainerCallback,
)
from trl.experimental.ppo import PPOConfig, PPOTrainer

workload, steps = json.loads(sys.argv[1]), int(sys.argv[2])
if workload["threads"]:
    torch.set_num_threads(workload["threads"])
torch.manual_seed(workload["seed"])
source, rows = workload["model"], workload["sequences"]
dtype, on_cpu = getattr(torch, workload["precision"]), workload["device"] == "cpu"
tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
policy, reference = (AutoModelForCausalLM.from_pretrained(source, dtype=dtype) for _ in range(2))
reward, value = (
    AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, dtype=dtype) for _ in range(2)
)
for scalar in (reward, value):
    scalar.config.pad_token_id = tokenizer.pad_token_id
prompts = torch.randint(10, 300, (rows * (steps + 2), workload["prompt_tokens"]))
data = Dataset.from_dict({"input_ids": prompts.tolist()})
stamps: list[float] = []


class Stamp(TrainerCallback):
    def on_step_end(self, *_args, **_kwargs):
        stamps.append(time.monotonic())


rows_at_once = min(8, rows)
trainer = PPOTrainer(
    args=PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=rows_at_once,
        gradient_accumulation_steps=rows // rows_at_once,
        num_mini_batches=1,
        num_ppo_epochs=workload["epochs"],
        total_episodes=rows * (steps + 1),
        response_length=workload["response_tokens"],
        stop_token=None,
        temperature=1.0,
        report_to="none",
        save_strategy="no",
        num_sample_generations=0,
        local_rollout_forward_batch_size=min(32, rows),
        use_cpu=on_cpu,
        bf16=False,
        fp16=False,
        gradient_checkpointing=False,
        logging_strategy="no",
        learning_rate=1e-6,
    ),
    processing_class=tokenizer,
    model=policy,
    ref_model=reference,
    reward_model=reward,
    value_model=value,
    train_dataset=data,
    eval_dataset=data.select(range(rows_at_once)),
    callbacks=[Stamp()],
)
trainer.train()
print(
    json.dumps(
        {
            "seconds": [after - before for before, after in itertools.pairwise(stamps)],
            "peak_memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
            "version": f"TRL {trl.__version__}",
        }
    )
)
