"""Sampling by transformers' `generate`: `transformers_generate.py WORKLOAD BATCHES`, JSON out."""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

workload, batches = json.loads(sys.argv[1]), int(sys.argv[2])
if workload["threads"]:
    torch.set_num_threads(workload["threads"])
torch.manual_seed(workload["seed"])
model = AutoModelForCausalLM.from_pretrained(workload["model"], dtype=getattr(torch, workload["precision"]))
model = model.to(workload["device"]).eval()
tokens = workload["response_tokens"]
model.generation_config = GenerationConfig(
    do_sample=True, top_k=0, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
)
seconds = []
for _ in range(batches + 1):
    ids = torch.randint(10, 300, (workload["sequences"], workload["prompt_tokens"]), device=workload["device"])
    start = time.monotonic()
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert out[0].numel() == workload["prompt_tokens"] + tokens, out.shape
    out.cpu()
    seconds.append(time.monotonic() - start)
print(json.dumps({"seconds": seconds[1:], "version": f"transformers {transformers.__version__}"}))
