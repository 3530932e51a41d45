"""Sampling by vLLM, in process: `vllm_generate.py WORKLOAD BATCHES`, JSON out."""

from __future__ import annotations

import json
import os
import sys
import time

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

import torch
import vllm

workload, batches = json.loads(sys.argv[1]), int(sys.argv[2])
tokens = workload["response_tokens"]
engine = vllm.LLM(
    model=workload["model"],
    dtype=workload["precision"],
    seed=workload["seed"],
    max_model_len=workload["prompt_tokens"] + tokens,
    max_num_seqs=workload["sequences"],
    enable_prefix_caching=False,
)
sampling = vllm.SamplingParams(temperature=1.0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
torch.manual_seed(workload["seed"])
seconds = []
for _ in range(batches + 1):
    ids = torch.randint(10, 300, (workload["sequences"], workload["prompt_tokens"]))
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    start = time.monotonic()
    answers = engine.generate(prompts, sampling, use_tqdm=False)
    assert all(len(answer.outputs[0].token_ids) == tokens for answer in answers)
    seconds.append(time.monotonic() - start)
print(json.dumps({"seconds": seconds[1:], "version": f"vLLM {vllm.__version__}"}))
