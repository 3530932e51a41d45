"""Models that cannot be loaded, are not whole, or are not what they are needed for."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bad_input.case import MODEL, Case, World

Change = Callable[[Path], object]
CHAT = b'{"prompt": [{"role": "user", "content": "what?"}]}\n{"prompt": "a film"}\n'


class Bomb:
    """A pickle of it makes a file when it is unpickled without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def edit(name: str, **values: Any) -> Change:
    """Set, or with None remove, keys of a JSON file of the model."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        content = {key: value for key, value in (content | values).items() if value is not None}
        (folder / name).write_text(json.dumps(content))

    return change


def remove(*names: str) -> Change:
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, content: bytes) -> Change:
    return lambda folder: (folder / name).write_bytes(content)


def cut(name: str, keep: float) -> Change:
    """Only the first part of a file, as a copy that broke off leaves it."""

    def change(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return change


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def sharded(folder: Path) -> None:
    """Two shards, of which one is missing."""
    state = load_file(folder / "model.safetensors")
    names = sorted(state)
    shards = {name: f"model-0000{1 + (n % 2)}-of-00002.safetensors" for n, name in enumerate(names)}
    (folder / "model.safetensors").unlink()
    first = "model-00001-of-00002.safetensors"
    save_file({name: state[name] for name in names if shards[name] == first}, folder / first, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": shards}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled_bomb(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"lm_head.weight": Bomb(folder / "exploded")}))


def zipped_bomb(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(folder / "exploded")}, folder / "pytorch_model.bin")


def own_code(folder: Path) -> None:
    (folder / "configuration_own.py").write_text("raise SystemExit('this ran')\n")
    edit("config.json", model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"})(folder)


def own_tokenizer(folder: Path) -> None:
    (folder / "tokenization_own.py").write_text("raise SystemExit('this ran')\n")
    own = {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}
    edit("tokenizer_config.json", tokenizer_class="OwnTokenizer", auto_map=own)(folder)


def adapter_only(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "m"}')
    (folder / "adapter_model.safetensors").write_bytes(b"")


def emptied(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def nan_in(name: str) -> Change:
    return weights(lambda state: state[name].view(-1)[0].fill_(float("nan")))


NO_TOKENIZER = remove("tokenizer.json", "tokenizer_config.json")

# Name, what is done to the model's folder, and what must be said beside the setting and the folder.
CAUSAL = [
    ("an empty folder", emptied, "holds no config.json", "give one that does"),
    ("no config", remove("config.json"), "holds no config.json"),
    ("an adapter", adapter_only, "PEFT adapter", "merged"),
    ("a config cut off", cut("config.json", 0.5), "cannot be loaded", "JSON"),
    ("an empty config", write("config.json", b""), "cannot be loaded", "JSON"),
    ("a config that is a list", write("config.json", b"[]"), "cannot be loaded"),
    ("a config without a type", write("config.json", b"{}"), "cannot be loaded", "model_type"),
    ("an unknown architecture", edit("config.json", model_type="frobformer"), "cannot be loaded", "frobformer"),
    ("an encoder and decoder", edit("config.json", model_type="t5", architectures=["T5Model"]), "cannot be loaded"),
    ("a wrong type in the config", edit("config.json", num_hidden_layers="three"), "num_hidden_layers", "'three'"),
    ("code of its own", own_code, "needs Python code", "compute.trust_remote_code = true"),
    ("a tokenizer with code of its own", own_tokenizer, "needs Python code", "compute.trust_remote_code = true"),
    ("no tokenizer", NO_TOKENIZER, "holds no tokenizer", "tokenizer.save_pretrained"),
    ("a tokenizer cut off", cut("tokenizer.json", 0.5), "its tokenizer cannot be loaded"),
    ("a tokenizer of nothing", write("tokenizer.json", b""), "its tokenizer cannot be loaded"),
    ("a tokenizer that is none", write("tokenizer.json", b"{}"), "its tokenizer cannot be loaded"),
    (
        "a larger vocabulary than the model's",
        edit("config.json", vocab_size=100),
        "embeds 100",
        "do not belong together",
    ),
    ("no weights", remove("model.safetensors"), "cannot be loaded", "model.safetensors"),
    ("a missing shard", sharded, "cannot be loaded", "model-00002-of-00002.safetensors"),
    ("weights cut off", cut("model.safetensors", 0.5), "cannot be loaded", "incomplete"),
    ("weights of nothing", write("model.safetensors", b""), "model.safetensors (0 bytes)", "copy it again"),
    (
        "weights that are a web page",
        write("model.safetensors", b"<!DOCTYPE html>" * 9),
        "model.safetensors (135 bytes)",
    ),
    (
        "a pointer for weights",
        write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"),
        "cannot be loaded",
    ),
    (
        "weights of another width",
        edit("config.json", intermediate_size=48),
        "another shape",
        "[32, 64] instead of [32, 48]",
    ),
    (
        "fewer weights",
        weights(lambda state: state.pop("model.layers.1.mlp.up_proj.weight")),
        "lacks 1 of the weights",
        "model.layers.1.mlp.up_proj.weight",
    ),
    ("more layers than weights", edit("config.json", num_hidden_layers=5), "lacks", "model.layers.3", "not whole"),
    ("a weight that is not a number", nan_in("model.norm.weight"), "model.norm.weight", "not finite"),
    ("a pickle that would run", pickled_bomb, "hold more than tensors", "give weights as safetensors"),
    ("a zipped pickle that would run", zipped_bomb, "hold more than tensors", "give weights as safetensors"),
]

# The same for a reward model of the joint stage.
SCALAR = [
    (
        "two labels",
        edit("config.json", num_labels=None, id2label={"0": "a", "1": "b"}, label2id={"a": 0, "b": 1}),
        "has 2 labels",
        "sequence classifier with one",
    ),
    ("no head", weights(lambda state: state.pop("score.weight")), "lacks 1 of the weights", "score.weight"),
    (
        "a head of another width",
        weights(lambda state: state.update({"score.weight": torch.zeros(1, 16)})),
        "another shape",
        "score.weight: [1, 16] instead of [1, 32]",
    ),
    ("a head of not-a-numbers", nan_in("score.weight"), "score.weight", "not finite"),
    (
        "saved as a language model",
        edit("config.json", architectures=["LlamaForCausalLM"]),
        "was saved as LlamaForCausalLM",
        "tandem reward",
    ),
    ("no config", remove("config.json"), "holds no config.json"),
    ("an adapter", adapter_only, "PEFT adapter"),
    ("no tokenizer", NO_TOKENIZER, "holds no tokenizer"),
    ("weights cut off", cut("model.safetensors", 0.5), "cannot be loaded", "incomplete"),
    ("code of its own", own_code, "needs Python code", "compute.trust_remote_code"),
    ("a card cut off", write("tandem.json", b'{"base": "m", '), "tandem.json is damaged", "remove this file"),
    ("a card of nothing", write("tandem.json", b"[]"), "tandem.json is damaged"),
    ("a card of other things", write("tandem.json", b'{"base": "m"}'), "tandem.json is damaged", "KeyError"),
    (
        "a card with words for numbers",
        write(
            "tandem.json",
            b'{"base": "m", "heldout_accuracy": "good", "heldout_pairs": 1, "adapter": null, "probes": []}',
        ),
        "tandem.json is damaged",
        "'good'",
    ),
]


def cases() -> Iterator[Case]:
    for name, change, *said in CAUSAL:
        for stage in ("sft", "reward", "ppo"):
            if stage == "sft" or name in ("an adapter", "code of its own", "a missing shard"):
                yield Case(f"{stage} model: {name}", _changed(stage, "model", change), (f"{MODEL[stage]} = ", *said))
    for name, change, *said in SCALAR:
        said = said if "card" in name else ["rewards.0.model = ", *said]
        yield Case(f"joint stage, reward model: {name}", _changed("ppo", "reward", change), tuple(said))
    for stage, key in MODEL.items():
        yield Case(
            f"{stage} model: no such folder", _model(stage, "./none"), (f"{key} = './none'", "no such folder", "mend")
        )
    yield Case("model: no such folder at home", _model("sft", "~/none"), ("'~/none'", "~ is not expanded here"))
    yield Case("model: no such hub id", _model("sft", "nobody/nothing"), ("'nobody/nothing'", "cannot be loaded"))
    yield Case("model: a name that is none", _model("sft", "no such model!"), ("'no such model!'", "cannot be loaded"))
    yield Case("model: a file", _weights_file, ("model.safetensors' is a file", "give the folder"))
    yield Case(
        "joint stage, reward model: no such folder", _reward("./none"), ("rewards.0.model = './none'", "no such folder")
    )
    yield Case(
        "reward model: a language model", _language_model, ("was saved as LlamaForCausalLM", "sequence classifier")
    )
    yield Case(
        "model: a reward model", _reward_as_policy, ("policy.model", "is a sequence classifier", "causal language")
    )
    yield Case("generate: no such folder", _generate("./none"), ("model = './none'", "there is no such folder"))
    yield Case("generate: code of its own", _generate_own_code, ("needs Python code", "--trust-remote-code"))
    yield Case("generate: no chat template", _generate_chat, ("prompt 1", "has no chat template", "plain text"))
    yield Case("no chat template", _without_template, ("p.jsonl, line 1", "has no chat template", "plain text"))
    yield Case("a broken chat template", _template("{% for %}"), ("line 1", "refuses this conversation (user)"))
    yield Case(
        "a chat template that wants a system turn",
        _template("{% if messages[0].role != 'system' %}{{ raise_exception('system first') }}{% endif %}"),
        ("line 1", "refuses this conversation (user)", "system first"),
    )
    yield Case(
        "no EOS and a penalty for its lack", _without_eos, ("no EOS token", "score.missing_eos_penalty", "leave it out")
    )
    yield Case(
        "more layers than there are", _layers, ("adapters.upper_layers = 9", "policy.model has 3 layers", "at most")
    )
    for name, folder, said in (("sft", "sft", "layers"), ("reward", "reward", "layers")):
        words = ["--adapters.upper_layers=9"]
        yield Case(
            f"{name}: more layers than there are", _plus(folder, words), ("adapters.upper_layers = 9", "3", said)
        )
    yield Case(
        "another tokenizer", _stranger, ('value.start = "reward"', "another tokenizer", 'set value.start = "policy"')
    )
    yield Case(
        "no device", _plus("sft", ["--compute.device=cuda:7"]), ("compute.device = 'cuda:7'", "CUDA devices here")
    )
    yield Case(
        "a device that is none", _plus("sft", ["--compute.device=gpu"]), ("compute.device = 'gpu'", "allowed are auto")
    )
    yield Case(
        "another device", _plus("ppo", ["--compute.device=cpu:3"]), ("compute.device = 'cpu:3'", "allowed are auto")
    )


def _copy(world: World, source: Path, change: Change) -> Path:
    folder = world.folder / "changed"
    shutil.copytree(source, folder)
    change(folder)
    return folder


def _changed(stage: str, which: str, change: Change) -> Callable[[World], Sequence[str]]:
    def make(world: World) -> Sequence[str]:
        source = world.model if which == "model" else world.reward_model
        return world.words(stage, **{which: _copy(world, source, change)})

    return make


def _model(stage: str, source: str) -> Callable[[World], Sequence[str]]:
    return lambda world: world.words(stage, model=source)


def _reward(source: str) -> Callable[[World], Sequence[str]]:
    return lambda world: world.words("ppo", reward=source)


def _plus(stage: str, words: Sequence[str]) -> Callable[[World], Sequence[str]]:
    return lambda world: [*world.words(stage), *words]


def _weights_file(world: World) -> Sequence[str]:
    return world.words("sft", model=world.model / "model.safetensors")


def _language_model(world: World) -> Sequence[str]:
    return world.words("ppo", reward=world.model)


def _reward_as_policy(world: World) -> Sequence[str]:
    return world.words("ppo", model=world.reward_model)


def _generate(source: str) -> Callable[[World], Sequence[str]]:
    return lambda _: ["generate", source, "--prompt", "x"]


def _generate_own_code(world: World) -> Sequence[str]:
    return ["generate", str(_copy(world, world.model, own_code)), "--prompt", "x"]


def _generate_chat(world: World) -> Sequence[str]:
    return ["generate", str(_copy(world, world.model, remove("chat_template.jinja"))), "--prompt", "x", "--chat"]


def _without_template(world: World) -> Sequence[str]:
    model = _copy(world, world.model, remove("chat_template.jinja"))
    return world.words("ppo", model=model, data=world.write("p.jsonl", CHAT))


def _template(text: str) -> Callable[[World], Sequence[str]]:
    def make(world: World) -> Sequence[str]:
        model = _copy(world, world.model, write("chat_template.jinja", text.encode()))
        return world.words("ppo", model=model, data=world.write("p.jsonl", CHAT))

    return make


def _without_eos(world: World) -> Sequence[str]:
    def change(folder: Path) -> None:
        edit("tokenizer_config.json", eos_token=None)(folder)
        edit("config.json", eos_token_id=None)(folder)
        edit("generation_config.json", eos_token_id=None)(folder)

    model = _copy(world, world.model, change)
    return [*world.words("ppo", model=model), "--value.start=policy", "--score.missing_eos_penalty=1"]


def _layers(world: World) -> Sequence[str]:
    return [*world.words("ppo"), "--sharing.mode=adapters", "--value.start=policy", "--adapters.upper_layers=9"]


def _stranger(world: World) -> Sequence[str]:
    def change(folder: Path) -> None:
        content = json.loads((folder / "tokenizer.json").read_text())
        vocabulary = content["model"]["vocab"]
        vocabulary["Q"], vocabulary["Z"] = vocabulary["Z"], vocabulary["Q"]
        (folder / "tokenizer.json").write_text(json.dumps(content))

    return world.words("ppo", reward=_copy(world, world.reward_model, change))
