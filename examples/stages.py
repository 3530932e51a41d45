"""The stages as functions: a configuration in, a summary out. Here SFT of a tiny random model on a few lines."""

import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tandem.config import SftConfig
from tandem.run import Progress
from tandem.stages.sft import run_sft

folder = Path(tempfile.mkdtemp())

# A model of bytes, so that the example needs no download.
inner = Tokenizer(
    models.BPE(vocab={c: i for i, c in enumerate(["<s>", "</s>", *pre_tokenizers.ByteLevel.alphabet()])}, merges=[])
)
inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **shape)).save_pretrained(
    folder / "base"
)
tokenizer.save_pretrained(folder / "base")

rows = [{"prompt": f"{a} + {b} =", "completion": f" {a + b}"} for a in range(10) for b in range(10)]
(folder / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
config = SftConfig.model_validate(
    {
        "model": str(folder / "base"),
        "epochs": 5.0,
        "data": {"train": str(folder / "sums.jsonl")},
        "optimizer": {"lr": 3e-3},
        "run": {"directory": str(folder / "run"), "trackers": []},
    }
)
with Progress() as progress:
    summary = run_sft(config, progress)
print("held-out loss, nats a token:", summary["heldout"]["before"], "->", summary["heldout"]["after"])
