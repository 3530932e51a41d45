"""What is planned, against what models really are, keep and hold: counted, never timed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    Qwen2Config,
    Qwen3Config,
)

from tandem.cli import main
from tandem.config import AdapterSection, PpoConfig, gathers_by_layer
from tandem.engine.local import LocalEngine, ParameterGroup
from tandem.errors import InputError
from tandem.models.cache import roomy_cache
from tandem.models.trunk import Trunk
from tandem.plan.advice import engines_beside, generators_of_their_own, what_would_be_faster, what_would_fit
from tandem.plan.arithmetic import activation_bytes, cache_bytes
from tandem.plan.demand import Demand, Lengths, demand_of
from tandem.plan.devices import DEVICES, AttentionPace, gpus_asked_for, measure_attention
from tandem.plan.layout import Layout
from tandem.plan.memory import memory_of, samples_by_layer
from tandem.plan.model_size import ModelSize
from tandem.plan.planned import Plan, planned
from tandem.plan.shapes import SHAPES, size_of_shape
from tandem.recipe import load_config
from tandem.stages.planning import PlanSettings, plan_of

RECIPES = Path(__file__).parents[1] / "recipes"
NARROW = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
    pad_token_id=None,
)
BASE = ["--data.prompts=p.jsonl", "--policy.model=m", "--rewards.0.model=r"]


@pytest.mark.parametrize(
    ("asked", "count", "name"),
    [
        ("8xH100", 8, "H100"),
        ("h200", 1, "H200"),
        ("64 x H100-80GB", 64, "H100"),
        ("1x24GB", 1, "L4"),
        ("A100", 1, "A100-80GB"),
        ("cpu", 1, "cpu"),
    ],
)
def test_gpus_are_understood_as_people_write_them(asked, count, name):
    assert gpus_asked_for(asked) == (count, name)


@pytest.mark.parametrize("asked", ["", "0xH100", "8", "8xH900", "-1xH100", "8xcpu", "9999999xH100", "H100x8"])
def test_gpus_that_there_are_not_are_refused_with_those_that_there_are(asked):
    with pytest.raises(InputError, match=r"8xH100.*A100-80GB"):
        gpus_asked_for(asked)


def test_a_size_alone_is_the_slowest_card_of_that_size():
    slowest = DEVICES[gpus_asked_for("24GB")[1]]
    of_that_size = [device for device in DEVICES.values() if 21 < device.memory_gib <= 24]
    assert slowest.memory_gib == min(device.memory_gib for device in of_that_size)
    assert slowest.bandwidth == min(device.bandwidth for device in of_that_size)


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        ("qwen-0.5b", 494_032_768),
        ("qwen-7b", 7_615_616_512),
        ("llama-1b", 1_235_814_400),
        ("llama-8b", 8_030_261_248),
        ("llama-70b", 70_553_706_496),
    ],
)
def test_shapes_have_as_many_weights_as_the_published_models(shape, published):
    assert size_of_shape(shape).parameters == published


def test_shapes_are_found_by_their_size():
    assert size_of_shape("7B") == size_of_shape("qwen-7b")
    with pytest.raises(InputError, match="llama-70b"):
        size_of_shape("3000b")


def test_a_classifier_has_its_body_and_a_row():
    size = ModelSize.of_config(NARROW)
    made = AutoModelForSequenceClassification.from_config(LlamaConfig(**{**NARROW.to_dict(), "num_labels": 1}))
    assert size.scalar_parameters == sum(parameter.numel() for parameter in made.parameters())


@pytest.mark.parametrize("upper", [None, 2])
def test_adapters_have_as_many_weights_as_lora_gives_them(upper):
    trunk = Trunk(AutoModelForCausalLM.from_config(NARROW).requires_grad_(False))
    made = trunk.add_adapter("policy", AdapterSection(rank=4, upper_layers=upper))
    assert ModelSize.of_config(NARROW).adapter_parameters(4, upper) == sum(one.numel() for one in made)


def test_a_mixture_of_experts_is_refused():
    with pytest.raises(InputError, match="mixture of experts"):
        ModelSize.of_config(Qwen2Config(num_experts=8))


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_activations_are_those_that_autograd_keeps(dtype, width):
    """A layer more keeps what the plan says, counted by storage so that a tensor that is kept twice counts once."""

    def kept(layers: int) -> int:
        config = LlamaConfig(**{**NARROW.to_dict(), "num_hidden_layers": layers})
        model = AutoModelForCausalLM.from_config(config).to(dtype).model
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        storages: dict[int, int] = {}
        alive = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            alive.append(tensor)
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(input_ids=torch.zeros(4, 64, dtype=torch.int64), use_cache=False)
        return sum(storages.values())

    a_layer = (kept(5) - kept(2)) / 3 / (4 * 64)
    assert activation_bytes(ModelSize.of_config(NARROW), width) == pytest.approx(a_layer, rel=0.05)


def test_keys_and_values_are_those_of_the_cache():
    model = AutoModelForCausalLM.from_config(NARROW).eval()
    cache = roomy_cache(model, 10)
    with torch.no_grad():
        model(input_ids=torch.zeros(2, 10, dtype=torch.int64), past_key_values=cache)
    held = sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
    assert held == 2 * 10 * cache_bytes(ModelSize.of_config(NARROW), 4)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_what_an_optimiser_holds_is_what_is_planned(dtype, width):
    model = AutoModelForCausalLM.from_config(NARROW).to(dtype).requires_grad_(True)
    config = load_config(PpoConfig, None, [*BASE, "--value.start=policy"])
    engine = LocalEngine([ParameterGroup(list(model.parameters()), 1e-3)], config.policy)
    engine.backward(model(input_ids=torch.arange(8)[None]).logits.float().sum())
    engine.step()
    state = engine.state()
    moments = sum(tensor.nbytes for name, tensor in state.items() if "exp_avg" in name)
    masters = sum(tensor.nbytes for name, tensor in state.items() if name.endswith(".weight"))
    demand = demand_for(width=width)
    staying = memory_of(demand, layout_for("H100")).staying
    share = demand.policy_trained / (demand.policy_trained + demand.value_trained)
    assert staying["Adam moments"] * share == pytest.approx(moments)
    assert staying.get("float32 master weights", 0) * share == pytest.approx(masters if width == 2 else 0)


def demand_for(*words: str, size: ModelSize | None = None, width: int = 2) -> Demand:
    config = load_config(PpoConfig, None, [*BASE, "--value.start=policy", *words])
    size = size or ModelSize.of_config(NARROW)
    return demand_of(config, size, [size], Lengths(100, 100, 512, 128), width)


def layout_for(card: str, gpus: int = 1, shard: int | None = None) -> Layout:
    return Layout(gpus, DEVICES[card], shard or gpus, False, "torch", "never", None)


def test_cut_over_more_gpus_each_holds_less_and_gathers_more():
    demand = demand_for(size=size_of_shape("7b"))
    one, eight = (memory_of(demand, layout_for("H100", gpus)) for gpus in (1, 8))
    for name in ("policy", "reference", "value model", "Adam moments", "float32 master weights"):
        assert eight.staying[name] == pytest.approx(one.staying[name] / 8)
    whole = size_of_shape("7b").parameters * 2
    assert eight.by_phase["rollout"]["policy gathered whole"] == pytest.approx(whole * 7 / 8)
    assert "policy gathered whole" not in one.by_phase["rollout"]
    costs = planned(demand, layout_for("H100", 8)).phases
    assert costs["rollout"].network > 0 == planned(demand, layout_for("H100")).phases["rollout"].network


@pytest.mark.parametrize("slower", ["sequence", "token"])
def test_attention_that_was_measured_is_planned_by_its_scores(slower):
    size, demand, layout, pace = ModelSize.of_config(NARROW), demand_for(), layout_for("L4"), AttentionPace(1e-9, 1e-8)

    def seconds(attention: AttentionPace) -> dict[str, float]:
        phases = planned(demand, replace(layout, device=replace(layout.device, attention=attention))).phases
        return {name: cost.total for name, cost in phases.items()}

    once, twice = seconds(pace), seconds(replace(pace, **{slower: 2 * getattr(pace, slower)}))
    grown = {name: twice[name] - once[name] for name in once}
    lengths, scores = demand.lengths, size.heads * size.layers * demand.sequences
    if slower == "token":
        context = lengths.mean_prompt + lengths.mean_response / 2
        assert grown["rollout"] == pytest.approx(1e-8 * scores * context * lengths.mean_response)
        assert grown["update"] == 0
    else:
        epochs = demand.policy_epochs + demand.value_epochs
        assert grown["update"] == pytest.approx(3 * epochs * 1e-9 * scores * lengths.mean**2)


def test_a_score_takes_longer_in_a_wider_head():
    narrow, wide = (
        measure_attention(replace(ModelSize.of_config(NARROW), head_width=w, attention=4 * w, keys=2 * w), "float32")
        for w in (8, 128)
    )
    assert 0 < narrow.sequence < wide.sequence
    assert 0 < narrow.token < wide.token


def test_copies_hold_the_whole_and_sum_their_gradients():
    demand = demand_for(size=size_of_shape("0.5b"))
    copies, cut = (planned(demand, layout_for("H100", 8, shard)) for shard in (1, 8))
    assert copies.memory.staying["policy"] == 8 * cut.memory.staying["policy"]
    assert copies.phases["update"].network > 0


def test_checkpointing_trades_memory_for_a_forward():
    demand, layout = demand_for(size=size_of_shape("1.5b")), layout_for("H100")
    plain, again = planned(demand, layout), planned(demand, replace(layout, activation_checkpointing=True))
    assert again.memory.peak < plain.memory.peak
    assert again.phases["update"].products > plain.phases["update"].products
    assert again.phases["evaluate"] == plain.phases["evaluate"]


@pytest.mark.parametrize(
    ("shape", "card", "words"),
    [
        ("0.5b", "L4", ["--compute.tokens_per_microbatch=65536"]),
        ("1.5b", "L4", []),
        ("7b", "H100", []),
        ("0.5b", "L4", ["--rollout.sequences_per_batch=4096", "--rollout.prompts_per_step=8192"]),
    ],
)
def test_advice_that_is_followed_makes_it_fit(shape, card, words):
    size, layout = size_of_shape(shape), layout_for(card)
    demand = demand_for(*words, size=size)
    assert not planned(demand, layout).fits
    lines = what_would_fit(demand, layout)
    assert lines
    settings = [f"--{key}={value.partition(' (')[0]}" for key, _, value in (line.partition(" = ") for line in lines)]
    layout = replace(layout, activation_checkpointing=any("activation_checkpointing" in line for line in lines))
    assert planned(demand_for(*words, *settings, size=size), layout).fits


def test_no_advice_where_no_line_helps():
    assert what_would_fit(demand_for(size=size_of_shape("70b")), layout_for("L4")) == []


def save_config(folder: Path, config, classifier: bool) -> str:
    """A folder that says what a model is, without any weights."""
    kind = type(config).__name__.removesuffix("Config")
    config.architectures = [f"{kind}{'ForSequenceClassification' if classifier else 'ForCausalLM'}"]
    config.num_labels = 1 if classifier else 2
    config.save_pretrained(folder)
    return str(folder)


def qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=tied,
    )


def of_shape(name: str):
    return SHAPES[name]["kind"](**{key: value for key, value in SHAPES[name].items() if key != "kind"})


@pytest.mark.parametrize(
    ("recipe", "gpus", "policy", "reward"),
    [
        ("ppo-0.5b-24gb", "1x24GB", "qwen-0.5b", qwen3(1024, 3072, 28, 16, tied=True)),
        ("ppo-7b-80gb", "1xH100", "qwen-7b", qwen3(2560, 9728, 36, 32, tied=True)),
        ("ppo-7b-8x80gb", "8xH100", "qwen-7b", qwen3(4096, 12_288, 36, 32, tied=False)),
        ("ppo-32b-64x80gb", "64xH100", "qwen-32b", qwen3(4096, 12_288, 36, 32, tied=False)),
        ("ppo-70b-64x80gb", "64xH100", "llama-70b", of_shape("llama-8b")),
        ("ppo-70b-64x180gb", "64xB200", "llama-70b", of_shape("llama-8b")),
    ],
)
def test_recipes_of_real_sizes_fit_and_can_be_built(recipe, gpus, policy, reward, tmp_path):
    models = [
        f"--policy.model={save_config(tmp_path / 'policy', of_shape(policy), classifier=False)}",
        f"--rewards.0.model={save_config(tmp_path / 'reward', reward, classifier=True)}",
    ]
    config = load_config(PpoConfig, RECIPES / f"{recipe}.toml", models)
    plan = plan_of(config, PlanSettings(gpus, None, None, None, json=False))
    assert plan.fits
    assert plan.layout.gpus_asked_for == gpus_asked_for(gpus)[0]
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(of_shape(policy))
        scorer = AutoModelForSequenceClassification.from_config(reward)
    assert plan.demand.policy.parameters == sum(parameter.numel() for parameter in built.parameters())
    assert plan.demand.rewards[0].scalar_parameters == sum(parameter.numel() for parameter in scorer.parameters())


CHECKPOINTED = ["--parallel.activation_checkpointing=true"]


def test_a_policy_that_no_gpu_holds_is_sampled_a_layer_at_a_time():
    """Gathered whole it fits no card of 80 GB, however many there are; `auto` then does what `layer` does."""
    recipe, settings = RECIPES / "ppo-70b-64x180gb.toml", PlanSettings("64xH100", None, None, "llama-70b", json=False)

    def plan(gather: str) -> Plan:
        return plan_of(load_config(PpoConfig, recipe, [*CHECKPOINTED, f"--rollout.gather={gather}"]), settings)

    whole, layer, auto = plan("model"), plan("layer"), plan("auto")
    assert not whole.fits
    assert whole.memory.peak_phase == "rollout"
    assert auto.phases == layer.phases
    assert auto.memory == layer.memory
    assert what_would_fit(whole.demand, whole.layout) == ['rollout.gather = "layer"']


@pytest.mark.parametrize(
    ("gather", "whole", "free", "by_layer"),
    [("model", 9, 1, False), ("layer", 1, 9, True), ("auto", 4, 8, False), ("auto", 5, 8, True)],
)
def test_how_a_policy_is_gathered_is_one_rule_for_generator_and_plan(gather, whole, free, by_layer):
    assert gathers_by_layer(gather, whole, free) == by_layer


def test_gathered_by_layer_a_token_costs_all_weights_however_many_rows_decode():
    size = size_of_shape("7b")
    layout = replace(layout_for("H100", 8), gather="layer")
    few, many = (
        planned(demand_for(f"--rollout.prompts_per_step={rows}", size=size), layout).phases["rollout"]
        for rows in (64, 256)
    )
    sent = size.parameters * 2 * 7 / 8 / (450e9 * 0.75)
    assert few.network + few.products + few.memory + few.calls > 128 * sent
    assert many.total < 1.1 * few.total
    whole = planned(demand_for("--rollout.prompts_per_step=64", size=size), replace(layout, gather="model"))
    assert whole.phases["rollout"].total < few.total / 2
    assert "policy gathered whole" not in planned(demand_for(size=size), layout).memory.by_phase["rollout"]


def test_auto_goes_by_what_is_free_once_all_that_trains_is_held():
    """7B on eight: gathered whole while half of what is free holds it; a larger model beside it tips the scale."""
    layout = layout_for("H100", 8)
    demand = demand_for(size=size_of_shape("7b"))
    assert not samples_by_layer(demand, layout)
    assert not samples_by_layer(demand, layout_for("H100"))
    full = replace(demand, rewards=[size_of_shape("72b")] * 2)
    assert samples_by_layer(full, layout)
    assert not samples_by_layer(full, replace(layout, gather="model"))


def on_cluster(*words: str, there: int = 8, shape: str = "7b", card: str = "H100") -> Plan:
    """A plan for trainers, generators and reward workers of a GPU each, unless the words say otherwise."""
    of_gpus = ["--cluster.kind=ray", "--cluster.trainer_gpus=1", "--cluster.generator_gpus=1"]
    of_gpus += ["--policy.sequences_per_minibatch=64", "--value.sequences_per_minibatch=64"]
    of_gpus += ["--rollout.prompts_per_step=128"]
    config = load_config(PpoConfig, None, [*BASE, "--value.start=policy", *of_gpus, *words])
    return plan_of(config, PlanSettings(f"{there}x{card}", None, None, shape, json=False))


IN_FOUR = [
    "--parallel.processes=4",
    "--parallel.activation_checkpointing=true",
    "--cluster.generators=3",
    "--cluster.reward_workers=1",
    "--cluster.reward_gpus=1",
]


def test_over_a_cluster_each_kind_of_process_holds_what_is_its_own():
    plan, size = on_cluster(*IN_FOUR), size_of_shape("7b")
    assert plan.fits
    assert plan.layout.gpus_asked_for == 8
    assert set(plan.memory.by_phase) == {"evaluate", "update"}
    assert plan.memory.staying["policy"] == size.parameters * 2 / 4
    generators, scorers = plan.roles
    assert generators.memory.staying["generator's weights"] == size.parameters * 2
    assert scorers.memory.staying["reward models"] == size.scalar_parameters * 2
    by_vllm, _ = on_cluster(*IN_FOUR, "--rollout.generator=vllm").roles
    assert by_vllm.memory.peak_phase == "start"
    assert by_vllm.memory.peak > 2 * size.parameters * 2


def test_sampling_ahead_the_longer_of_sampling_and_learning_is_a_step():
    in_turn, ahead = on_cluster(*IN_FOUR), on_cluster(*IN_FOUR, "--rollout.staleness=1")
    assert in_turn.seconds == pytest.approx(sum(cost.total for cost in in_turn.phases.values()))
    sent, generators = ahead.phases["send weights"].total, ahead.busy("generators")
    learning = ahead.busy("trainers") - sent + ahead.busy("reward workers")
    assert ahead.seconds == pytest.approx(sent + max(generators, learning))
    assert ahead.slowest == ("generators" if generators > ahead.busy("trainers") else "trainers")


def test_more_of_a_kind_make_its_phases_shorter_and_no_others():
    before, after = on_cluster("--cluster.generators=2"), on_cluster("--cluster.generators=4")
    assert after.phases["rollout"].total == pytest.approx(before.phases["rollout"].total / 2)
    assert after.phases["update"] == before.phases["update"]
    trainers = on_cluster("--cluster.generators=2", "--parallel.processes=4")
    assert trainers.phases["update"].total < before.phases["update"].total / 2
    assert trainers.phases["rollout"] == before.phases["rollout"]


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        (["--cluster.generators=3"], 4),
        (["--cluster.generators=3", "--cluster.generator_gpus=0.5"], 3),
        (["--cluster.generators=3", "--cluster.generator_gpus=0.4", "--cluster.trainer_gpus=0.5"], 2),
        (["--cluster.generators=2", "--cluster.generator_gpus=2"], 5),
    ],
)
def test_gpus_that_the_resource_lines_ask_for_are_counted_as_ray_places_them(words, asked):
    assert on_cluster(*words, shape="0.5b").layout.gpus_asked_for == asked


def test_a_share_of_a_gpu_is_a_share_of_its_memory_and_speed():
    whole, half = (on_cluster(f"--cluster.generator_gpus={gpus}", shape="0.5b") for gpus in (1, 0.5))
    assert half.roles[0].bytes_there == whole.roles[0].bytes_there / 2
    assert half.phases["rollout"].products == 2 * whole.phases["rollout"].products


def followed(lines: Sequence[str]) -> list[str]:
    return [f"--{key}={value}" for key, _, value in (line.partition(" = ") for line in lines)]


@pytest.mark.parametrize("there", [8, 6])
def test_advice_on_a_cluster_that_is_followed_makes_it_fit(there):
    words = ["--cluster.generators=7", "--parallel.processes=1", "--rollout.staleness=1"]
    plan = on_cluster(*words, there=there)
    assert not plan.fits
    lines = what_would_fit(plan.demand, plan.layout)
    assert any(line.startswith("parallel.processes = ") for line in lines)
    assert on_cluster(*words, *followed(lines), there=there).fits


def test_advice_on_a_generator_that_holds_no_copy_is_to_do_without():
    plan = on_cluster("--cluster.generators=16", "--parallel.processes=48", *SEVENTY, there=64, shape="70b")
    lines = what_would_fit(plan.demand, plan.layout)
    assert lines == ["no [cluster] (--cluster none)", "parallel.processes = 64"]


SEVENTY = [
    "--policy.sequences_per_minibatch=256",
    "--value.sequences_per_minibatch=256",
    "--rollout.prompts_per_step=512",
    "--parallel.activation_checkpointing=true",
]


def test_advice_on_what_would_be_faster_is_as_fast_as_it_says():
    words = ["--parallel.processes=6", "--cluster.generators=2", "--rollout.prompts_per_step=256"]
    plan = on_cluster(*words)
    faster = what_would_be_faster(plan)
    assert faster is not None
    after = on_cluster(*words, *followed(faster.lines))
    assert after.fits
    assert after.tokens_per_day == pytest.approx(faster.times * plan.tokens_per_day)
    assert faster.times > 1.5


def test_vllm_decodes_as_many_rows_together_as_its_cache_holds():
    words = ["--rollout.generator=vllm", "--cluster.samples_per_task=64", "--cluster.generators=2"]
    small, large = (on_cluster(*words, f"--rollout.vllm.kv_cache_gib={gib}") for gib in (0.5, 4.0))
    assert small.phases["rollout"].total > 2 * large.phases["rollout"].total
    faster = what_would_be_faster(small)
    assert faster is not None
    assert any(line.startswith("rollout.vllm.kv_cache_gib = ") for line in faster.lines)


@pytest.mark.parametrize("others", [generators_of_their_own, engines_beside])
def test_other_generators_are_advised_where_the_policy_is_gathered_by_layer(others):
    """32B on 64 cards: beside what trains there is no room for a copy; on a card by itself there is, or in parts."""
    settings = PlanSettings("64xH100", None, None, "32b", json=False)
    words = [*BASE, "--value.start=policy", *SEVENTY, "--rollout.max_new_tokens=512", "--rollout.gather=layer"]
    plan = plan_of(load_config(PpoConfig, None, [*words, "--parallel.processes=64"]), settings)
    assert plan.fits
    assert plan.by_layer is not None
    faster = what_would_be_faster(plan)
    assert faster is not None
    changes = [change for change in others(plan.demand, plan.layout) if change.plan.fits]
    best = max(changes, key=lambda change: change.plan.tokens_per_day)
    own = ["--parallel.processes=64"] if others is engines_beside else []
    after = plan_of(load_config(PpoConfig, None, [*words, *own, *followed(best.lines)]), settings)
    assert after.fits
    assert after.memory == best.plan.memory
    assert plan.tokens_per_day < after.tokens_per_day == pytest.approx(best.plan.tokens_per_day)
    assert best.plan.tokens_per_day <= faster.times * plan.tokens_per_day * (1 + 1e-9)


def test_engines_in_parts_hold_and_read_less_each_and_talk():
    """Of the eight cards that share one each has an eighth of its weights, and two engines wait for nobody."""
    words = [*BASE, "--value.start=policy", *SEVENTY, "--rollout.generator=vllm", "--rollout.sequences_per_batch=64"]
    settings = PlanSettings("8xH100", None, None, "7b", json=False)

    def plan(parts: int) -> Plan:
        more = ["--parallel.processes=8", f"--rollout.vllm.tensor_parallel={parts}"]
        return plan_of(load_config(PpoConfig, None, [*words, *more]), settings)

    whole, parts = plan(1), plan(8)
    weights = "generator's weights"
    assert whole.memory.by_phase["rollout"][weights] == 8 * parts.memory.by_phase["rollout"][weights]
    assert whole.phases["rollout"].network == 0.0
    assert 0.0 < parts.phases["rollout"].network < parts.phases["rollout"].total
    assert whole.phases["weight sync"] == parts.phases["weight sync"]


def test_the_command_says_it_within_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    words = ["plan", str(RECIPES / "ppo-0.5b-24gb.toml"), "--gpus", "1x24GB", "--model-shape", "0.5b"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "It fits." in said
    assert main([*words, "--compute.tokens_per_microbatch=262144"]) == 1
    assert "compute.tokens_per_microbatch = " in capsys.readouterr().out


def test_the_command_answers_scripts(capsys):
    words = ["plan", str(RECIPES / "ppo-7b-8x80gb.toml"), "--gpus", "8xH100", "--model-shape", "7b", "--json"]
    assert main([*words, "--prompt-tokens", "100"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["device"], found["fits"], found["advice"]) == (8, "H100", True, [])
    assert found["memory"]["bytes_needed"] == pytest.approx(sum(found["memory"]["components"].values()))
    seconds = sum(phase["seconds"] for phase in found["time"]["phases"].values())
    assert found["time"]["seconds_a_step"] == pytest.approx(seconds)
    assert found["lengths"]["mean_prompt"] == 100


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "8xH900"], "B200, H200, H100"),
        (["--gpus", "1xH100", "--model-shape", "3000b"], "--model-shape '3000b'"),
        (["--gpus", "1xH100", "--response-tokens", "100000"], "rollout.max_new_tokens"),
        (["--gpus", "1xH100", "--rollout.nonsense=1"], "rollout.nonsense"),
        (["--gpus", "512xH100"], "parallel.processes"),
        ([], "--gpus"),
        (["--gpus", "8xH100", "--cluster", "ray"], "cluster.trainer_gpus = 0"),
        (["--gpus", "cpu", "--cluster", "ray"], "--cluster none"),
    ],
)
def test_the_command_refuses_what_it_cannot_plan(words, said, capsys):
    shape = [] if "--model-shape" in words else ["--model-shape", "7b"]
    assert main(["plan", str(RECIPES / "ppo-7b-8x80gb.toml"), *words, *shape]) == 2
    assert said in capsys.readouterr().err


def test_models_that_cannot_be_looked_at_can_be_planned_by_shape(tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[policy]\nmodel = "none/here"\n[data]\nprompts = "p.jsonl"\n[[rewards]]\nmodel = "none/there"\n')
    assert main(["plan", str(recipe), "--gpus", "8xH100", "--policy.model", str(tmp_path / "none")]) == 2
    assert "--model-shape 7b" in capsys.readouterr().err


CLUSTER = ["plan", str(RECIPES / "ppo-32b-64x80gb.toml"), "--model-shape", "32b", "--gpus"]


def test_the_command_says_who_does_what_over_a_cluster(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*CLUSTER, "64xH100"]) == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80
    assert "generators: 24 x 1 GPU" in said
    assert "are the bottleneck" in said
    assert main([*CLUSTER, "70xH100"]) == 0
    assert "6 are idle" in capsys.readouterr().out
    assert main([*CLUSTER, "48xH100"]) == 1
    said = capsys.readouterr().out
    assert "asks for 64 GPUs, and there are 48" in said
    assert "cluster.generators = " in said


def test_the_command_tells_scripts_who_does_what_over_a_cluster(capsys):
    assert main([*CLUSTER, "64xH100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["gpus"], found["cluster"]["ahead"], found["gathered_for_each_token"]) == (64, True, None)
    assert found["cluster"]["roles"]["generators"]["processes"] == 24
    assert found["time"]["phases"]["rollout"]["who"] == "generators"


def test_the_command_says_what_sampling_by_layer_costs_and_which_cards_could_do_without(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    words = ["plan", str(RECIPES / "ppo-70b-64x180gb.toml"), "--gpus", "64xH100", "--model-shape", "70b"]
    assert main([*words, *CHECKPOINTED, "--rollout.gather=layer"]) == 0
    said = capsys.readouterr().out
    assert "131.4 GiB are sent to every GPU for each token, which takes 0.42 s" in said
    assert "Generators of their own ([cluster]) each hold a copy of the policy, 131.4 GiB, on one GPU: of" in said
    assert "B200 and H200 could" in said
    assert "rollout.vllm.tensor_parallel = 8" in said


@pytest.mark.long
def test_this_machine_is_planned_for_by_what_it_reaches(capsys):
    recipe = str(RECIPES / "ppo-0.5b-24gb.toml")
    assert main(["plan", recipe, "--gpus", "cpu", "--model-shape", "llama-15m", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"] == "cpu"
    assert all(phase["seconds"] > 0 for phase in found["time"]["phases"].values())
