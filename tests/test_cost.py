"""What a joint step costs, counted: nothing here looks at a clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from importlib import resources
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from generators import make
from tandem import algo
from tandem.bench.arithmetic import joint_step_flops
from tandem.bench.command import named_rows, same_line
from tandem.bench.counting import counting
from tandem.bench.decoding import random_prompts
from tandem.bench.growth import exponent
from tandem.bench.joint_step import recipe, stage_of, step
from tandem.bench.models import make_reward_model, make_shape
from tandem.bench.page import page
from tandem.bench.rows import STEP, Measured, gpu_rows, ratios, standard_rows
from tandem.bench.workloads import Workload
from tandem.cli import main
from tandem.config import AdapterSection
from tandem.errors import RunError
from tandem.models import causal
from tandem.models.cache import roomy_cache
from tandem.models.loading import load_causal, load_tokenizer
from tandem.plan.model_size import ModelSize
from tandem.plan.shapes import SHAPES
from tandem.stages.joint import evaluate
from tandem.stages.joint_start import check_start
from tandem.stages.state import start_state
from tandem.types import Prompt, Scores, split_by_tokens
from test_generator import policy_of

LAYERS = 4
WIDE = {
    **SHAPES["llama-15m"],
    "vocab_size": 2_000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
}
SEQUENCES, PROMPT, RESPONSE = 16, 5, 6
LENGTH = PROMPT + RESPONSE


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    return make_shape(tmp_path_factory.mktemp("wide"), WIDE)


@pytest.fixture(scope="module")
def workload(wide):
    return Workload("counted", str(wide), SEQUENCES, PROMPT, RESPONSE, "float32", epochs=2)


@pytest.fixture(scope="module")
def whole_reward(wide, tmp_path_factory):
    return str(make_reward_model(str(wide), tmp_path_factory.mktemp("reward"), None))


def counts_of_a_step(workload, reward):
    stage, config = stage_of(workload, reward)
    models = stage.models
    prompts = random_prompts(stage.tokenizer, workload, 0)
    with counting([models.policy.trunk, models.reference.trunk, models.value.trunk]) as counts:
        step(stage, config, start_state(config), prompts)
    return counts


def test_a_step_computes_nothing_twice(workload, whole_reward):
    """Sampling; reference and value; an eighth of the rows for the comparison; policy and value in each epoch."""
    counts = counts_of_a_step(workload, whole_reward)
    read, tried = SEQUENCES * LENGTH, SEQUENCES // 8 * LENGTH
    sampled = SEQUENCES * (PROMPT + RESPONSE - 1)
    assert counts.layer_positions == LAYERS * (sampled + 2 * read + tried + 2 * 2 * read)
    answered = SEQUENCES * RESPONSE
    assert counts.head_rows == answered + answered + SEQUENCES // 8 * RESPONSE + 2 * answered


def test_adapters_share_what_lies_below_them(workload, wide, tmp_path):
    """Below them sampling alone reads every token, the last one of each response too, and an eighth of the rows is run
    for the comparison."""
    adapters = AdapterSection(upper_layers=1)
    reward = make_reward_model(str(wide), tmp_path / "reward", adapters)
    counts = counts_of_a_step(replace(workload, sharing="adapters", upper_layers=1), str(reward))
    read, tried = SEQUENCES * LENGTH, SEQUENCES // 8 * LENGTH
    sampled = LAYERS * SEQUENCES * (PROMPT + RESPONSE - 1)
    below = (LAYERS - 1) * (SEQUENCES + tried)
    rewarded = SEQUENCES * LENGTH
    assert counts.layer_positions == sampled + below + rewarded + 2 * read + tried + 2 * 2 * read


def test_logits_are_bounded_whatever_the_batch(workload, whole_reward, monkeypatch):
    monkeypatch.setattr(causal, "_LOGITS_PER_CHUNK", 8 * WIDE["vocab_size"])
    small = counts_of_a_step(replace(workload, sequences=8), whole_reward)
    large = counts_of_a_step(replace(workload, sequences=32), whole_reward)
    assert small.largest_logits_bytes == 4 * 8 * WIDE["vocab_size"]
    assert large.largest_logits_bytes == 4 * 32 * WIDE["vocab_size"], "only sampling holds a row for each sequence"


@pytest.mark.parametrize("budget", [2048, 4096, 8192])
def test_little_is_padding(budget):
    random = torch.Generator().manual_seed(0)
    lengths = (torch.randn(256, generator=random) * 0.6 + 5).exp().long().clamp(20, 1024)
    groups = split_by_tokens(lengths, budget)
    padded = sum(len(rows) * int(lengths[rows].max()) for rows in groups)
    assert 1 - int(lengths.sum()) / padded < 0.05


def test_decoding_stops_with_the_rows(tiny):
    """A row that has ended is fed no further, and a prompt that is answered several times is read once."""
    policy = policy_of(tiny())
    prompts = [Prompt((5, 6, 7), "", None, {})] * 12
    with counting([policy.trunk]) as counts:
        rollouts = make("torch", policy, stop=range(0, 300, 5), limit=20, batch=12).generate(prompts)
    lengths = [len(rollout.ids) for rollout in rollouts]
    assert len(set(lengths)) > 3
    assert counts.layer_positions == 3 * (3 + sum(length - 1 for length in lengths))


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_room_taken_once_holds_what_a_growing_cache_holds(tiny, architecture):
    """Rows that leave, move and multiply, against transformers' own cache by the same names."""
    model = load_causal(str(tiny(architecture)), "model", torch.float32, torch.device("cpu"))
    plain, roomy = DynamicCache(config=model.config), roomy_cache(model, 6)
    random = torch.Generator().manual_seed(0)
    selections = [None, [0, 0, 1, 2, 2], [4, 1, 2, 3], None, [0, 3], [1], [0, 0, 0]]
    rows = 3
    for number, selection in enumerate(selections):
        ids = torch.randint(0, 300, (rows, 4 if number == 0 else 1), generator=random)
        with torch.no_grad():
            expected, found = (
                model.base_model(input_ids=ids, past_key_values=cache, use_cache=True).last_hidden_state
                for cache in (plain, roomy)
            )
        assert torch.allclose(found, expected, atol=1e-6)
        if selection is not None:
            for cache in (plain, roomy):
                cache.batch_select_indices(torch.tensor(selection))
            rows = len(selection)
    assert roomy.get_seq_length() == plain.get_seq_length() == 10


class Sampled:
    """Rollouts of a tiny policy, and the trajectories that it is measured by."""

    def __init__(self, path) -> None:
        self.policy = policy_of(path)
        self.rollouts = make("torch", self.policy, limit=5, batch=20).generate(
            [Prompt((4 + n, 9), "", None, {}) for n in range(20)]
        )

    def evaluated(self, rollouts, recompute):
        scores = Scores(torch.zeros(len(rollouts)), {})
        value = Zero()
        return evaluate(rollouts, scores, self.policy, self.policy, value, 10**6, recompute=recompute)


class Zero:
    def values(self, tokens):
        return torch.zeros(len(tokens), tokens.mask.shape[1] + 1)


def test_what_sampling_said_stands_where_it_agrees(tiny):
    sampled = Sampled(tiny())
    always, auto = (sampled.evaluated(sampled.rollouts, recompute) for recompute in (True, False))
    assert bool(always.recomputed.all())
    assert int(auto.recomputed.sum()) == 3
    assert torch.allclose(auto.logprobs, always.logprobs, atol=1e-4)


def test_what_sampling_said_is_dropped_where_it_does_not(tiny):
    sampled = Sampled(tiny())
    off = [replace(rollout, logprobs=tuple(x - 0.01 for x in rollout.logprobs)) for rollout in sampled.rollouts]
    always, auto = (sampled.evaluated(off, recompute) for recompute in (True, False))
    assert bool(auto.recomputed.all())
    assert torch.allclose(auto.logprobs, always.logprobs, atol=1e-6)


@pytest.mark.parametrize(("precision", "again"), [("float32", 2), ("bfloat16", SEQUENCES)])
def test_half_precision_is_run_again_without_a_trial(workload, whole_reward, precision, again):
    stage, _ = stage_of(replace(workload, precision=precision), whole_reward)
    rows, logprobs = [], stage.models.policy.logprobs
    stage.models.policy.logprobs = lambda tokens: rows.append(len(tokens)) or logprobs(tokens)
    rollouts = stage.generator.generate(random_prompts(stage.tokenizer, workload, 0))
    stage.evaluate(rollouts, stage.score(rollouts))
    assert rows == [again]


def test_a_second_backward_pass_is_the_first_again():
    torch.manual_seed(0)
    states, weight = torch.randn(4, 3, requires_grad=True), torch.randn(9, 3, requires_grad=True)
    found, _ = algo.projected_logprobs(states, torch.tensor([1, 2, 3, 4]), lambda part, _: part @ weight.T, 8)
    first = torch.autograd.grad(found.sum(), states, retain_graph=True)[0]
    assert torch.allclose(torch.autograd.grad(found.sum(), states)[0], first, atol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux only")
def test_freed_memory_is_used_again():
    """Once warm, a tensor of 64 MiB that is made and freed touches no new page; the system may move some of its own."""
    code = (
        "from tandem.allocator import keep_memory\nkeep_memory()\n"
        "import os, resource, torch\n"
        "assert os.environ['THP_MEM_ALLOC_ENABLE'] == '1'\n"
        "def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(40): y = torch.ones(2**24)\n"
        "def touched():\n"
        "    before = faults()\n"
        "    for _ in range(10): y = torch.ones(2**24)\n"
        "    return faults() - before\n"
        "print(min(touched() for _ in range(5)))\n"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(said) < 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's heaps")
def test_all_threads_have_one_heap(tmp_path):
    code = (
        "import ctypes, sys, threading\n"
        "from tandem.allocator import keep_memory; keep_memory()\n"
        "libc = ctypes.CDLL(None); libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p\n"
        "together = threading.Barrier(4)\n"
        "def work(): libc.malloc(100); together.wait()\n"
        "for thread in (threads := [threading.Thread(target=work) for _ in range(4)]): thread.start()\n"
        "for thread in threads: thread.join()\n"
        "file = ctypes.c_void_p(libc.fopen(sys.argv[1].encode(), b'w')); libc.malloc_info(0, file); libc.fclose(file)\n"
    )
    said = tmp_path / "heaps.xml"
    environment = {name: value for name, value in os.environ.items() if name != "MALLOC_ARENA_MAX"}
    subprocess.run([sys.executable, "-c", code, str(said)], check=True, env=environment)
    assert said.read_text().count("<heap ") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="the system's own peak is the process's elsewhere")
def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    child = "from tandem.allocator import peak_memory; print(peak_memory())"
    parent = (
        "import subprocess, sys\nheld = bytearray(2**28)\n"
        f"print(subprocess.run([sys.executable, '-c', {child!r}], capture_output=True, text=True).stdout)\n{child}"
    )
    said = subprocess.run([sys.executable, "-c", parent], capture_output=True, text=True, check=True).stdout
    of_child, of_parent = map(float, said.split())
    assert 2**22 < of_child < 2**27
    assert of_parent > 2**28


def test_what_is_timed_anew_fills_the_line_that_it_filled():
    """Also where the bench times that work by other settings than it did."""
    work = Workload("a model", "folder", 1, 2, 3, "float32")

    def row(work: Workload) -> dict[str, Any]:
        return {"kind": "joint step", "workload": json.loads(work.to_json())}

    assert same_line(row(work), row(replace(work, tokens_per_microbatch=7)))
    assert not same_line(row(work), row(replace(work, precision="bfloat16")))
    assert not same_line(row(work), row(work) | {"kind": "decoding"})


@pytest.mark.parametrize(
    ("only", "count"),
    [
        ("joint step SmolLM2-135M bfloat16", 1),
        ("joint step SmolLM2 bfloat16", 2),
        ("one trunk", 2),
        ("decoding float32", 2),
    ],
)
def test_rows_of_the_bench_are_named_in_full_or_by_words(only, count):
    assert len(named_rows(standard_rows("a model", "cpu", 2), only)) == count


@pytest.mark.long
def test_the_bench_command_times_a_model_of_ones_own(tiny, tmp_path, capsys):
    words = ["bench", "--model", str(tiny()), "--only", "decoding", "--rounds", "1", "--steps", "1"]
    assert main([*words, "--threads", "1", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "performance.json").read_text())
    (row,) = record["rows"]
    assert 0 < row["tandem"]["share_of_limit"] < 1
    assert len(row["peers"]["transformers"]["ratios"]) == 1
    assert "times transformers" in capsys.readouterr().out
    assert (tmp_path / "performance.md").read_text() == page(record)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--only", "a horse"], "leaves no row"),
        (["--trl-python", "/no/such/python"], "--trl-python"),
        (["--rounds", "0"], "--rounds"),
        (["--device", "tpu"], "allowed are auto"),
    ],
)
def test_what_the_bench_command_refuses(tiny, capsys, words, said):
    assert main(["bench", "--model", str(tiny()), *words]) == 2
    assert said in capsys.readouterr().err


def test_ratios_are_of_one_round_and_exponents_of_sizes():
    ours, peer = Measured([[1.0, 1.0, 9.0], [2.0]]), Measured([[3.0], [3.0, 3.0]])
    assert ratios(peer, ours) == [3.0, 1.5]
    assert exponent([(1, 2.0), (2, 8.0), (4, 32.0)]) == pytest.approx(2.0)


def test_what_was_read_once_is_the_same_for_the_reward(workload, wide, tmp_path):
    """A reward adapter scores from the activations of the policy's rows what it scores by itself."""
    reward = make_reward_model(str(wide), tmp_path / "reward", AdapterSection(upper_layers=1))
    stage, _ = stage_of(replace(workload, sharing="adapters", upper_layers=1), str(reward))
    rollouts = stage.generator.generate(random_prompts(stage.tokenizer, workload, 0))
    alone = stage.reward.score(rollouts).total
    stage.models.policy.trunk.forget()
    assert torch.allclose(stage.score(rollouts).total, alone, atol=1e-6)
    assert alone.std() > 1e-3


def test_decoding_that_goes_wrong_in_shared_layers_is_refused_at_the_start(workload, wide, tmp_path):
    """What those made of a text while it was sampled does not stand where the generator is held to the policy."""
    reward = make_reward_model(str(wide), tmp_path / "reward", AdapterSection(upper_layers=1))
    stage, config = stage_of(replace(workload, sharing="adapters", upper_layers=1), str(reward))
    assert check_start(stage, config).generator < 1e-4

    def off_by_some(_, __, hidden):
        return hidden + 0.5 if hidden.shape[1] == 1 else hidden

    stage.models.policy.trunk.layers[0].register_forward_hook(off_by_some)
    with pytest.raises(RunError, match="decoding with a cache is not what its forward computes"):
        check_start(stage, config)


def test_prompts_are_read_as_the_tokens_that_they_are_made_of(wide, tiny, workload):
    """Beginnings of sentences where a tokenizer writes such, other ones for each batch; words elsewhere."""
    written = {}
    for folder in (wide, tiny()):
        tokenizer = load_tokenizer(str(folder), "model")
        first, again, other = (random_prompts(tokenizer, workload, number) for number in (0, 0, 1))
        assert first == again != other
        assert len(first) == workload.sequences
        for prompt in first:
            assert len(prompt.ids) == workload.prompt_tokens
            assert tuple(tokenizer(prompt.text, add_special_tokens=False).input_ids) == prompt.ids
        written[folder] = [prompt.text for prompt in first]
    assert all(text.startswith("w") for text in written[wide])
    openings = (resources.files("tandem.demo") / "openings.txt").read_text(encoding="utf-8").splitlines()
    assert all(any(opening.startswith(text) for opening in openings) for text in written[tiny()])


def test_rows_for_a_gpu_are_recipes_of_shapes_that_there_are(tmp_path):
    rows = gpu_rows("cuda")
    assert all(row.workload.model in SHAPES and row.workload.precision == "bfloat16" for row in rows)
    steps = [recipe(row.workload, "reward", tmp_path) for row in rows if row.kind == STEP]
    assert [config.sharing.mode for config in steps] == ["separate", "separate", "adapters"]


def test_the_arithmetic_is_that_of_the_layers(workload, wide):
    """Against the products counted one by one: a trunk weight and a head weight are two operations a token."""
    size = ModelSize.of(wide)
    a_layer = 4 * 32 * 32 + 3 * 32 * 64
    assert (size.trunk, size.head, size.layers) == (LAYERS * a_layer, 2_000 * 32, LAYERS)
    read, answered = SEQUENCES * LENGTH, SEQUENCES * RESPONSE
    attention = 2 * LAYERS * 32 * read * LENGTH
    trunk, head = 2 * size.trunk * read + attention, 2 * size.head * answered
    assert joint_step_flops(size, workload) == trunk + head + (3 * trunk + head) + 2 * (6 * trunk + 3 * head)
    one_trunk = replace(workload, sharing="adapters", upper_layers=1)
    shared = 3 * trunk / 4 + head
    assert joint_step_flops(size, one_trunk) == trunk + head + shared + 2 * (4 * trunk / 4 + 2 * head)


def test_nothing_is_kept_of_a_step_once_it_is_measured(workload, wide, tmp_path):
    """The activations that the models share stand in the batch; a second hold of them would be memory for nothing."""
    reward = make_reward_model(str(wide), tmp_path / "reward", AdapterSection(upper_layers=1))
    stage, _ = stage_of(replace(workload, sharing="adapters", upper_layers=1), str(reward))
    rollouts = stage.generator.generate(random_prompts(stage.tokenizer, workload, 0))
    trajectories = stage.evaluate(rollouts, stage.score(rollouts))
    assert trajectories.tokens.activations is not None
    assert not stage.models.policy.trunk._activations._held
    assert not stage.models.policy.trunk._activations._sampled
