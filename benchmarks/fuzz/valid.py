"""What is damaged: the repository's recipes, and rows as the stages read them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

RECIPES = Path(__file__).parents[2] / "recipes"
STAGES = ("sft", "reward", "ppo")
WORDS = ["the sea", "a film", "was good", "slow", "quiet", "é", "数", "😀", ", and", '"said"', "\n", " "]


def recipes(stage: str) -> list[Path]:
    """The repository's recipes for a stage."""
    return sorted(RECIPES.glob(f"{stage}-*.toml"))


def rows(stage: str, chance: random.Random) -> list[dict[str, Any]]:
    """A few rows in one of the conventions that a stage knows."""
    convention = chance.random()
    return [_conventions(stage, chance)[int(convention * 2)] for _ in range(chance.randint(1, 6))]


def _conventions(stage: str, chance: random.Random) -> list[dict[str, Any]]:
    """A row as text, and one of turns."""
    prompt, answer, other = (_text(chance) for _ in range(3))
    user, said = _turn("user", prompt), _turn("assistant", answer)
    if stage == "ppo":
        return [{"prompt": prompt, "n": len(answer)}, {"prompt": [user], "n": len(answer)}]
    if stage == "reward":
        by_turns = {"chosen": [user, said], "rejected": [user, _turn("assistant", other)]}
        return [{"prompt": prompt, "chosen": answer, "rejected": other}, by_turns]
    texts = chance.choice([{"text": prompt}, {"prompt": prompt, "completion": answer}])
    return [texts, {"messages": [_turn("system", other), user, said]}]


def _text(chance: random.Random) -> str:
    return " ".join(chance.choices(WORDS, k=chance.randint(1, 6)))


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, and a chat template."""
    special = ["<s>", "</s>"]
    vocabulary = {
        token: number for number, token in enumerate([*special, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(special)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.chat_template = (
        "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    return made
