"""Layers computed by compiled code are held to the same layers as they are written, and to each other over a break."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from faults.same import differences
from tandem.cli import main
from tandem.config import AdapterSection, PpoConfig
from tandem.models.building import compiler
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy
from tandem.models.compiling import CompiledLayers, CompiledPasses
from tandem.models.loading import load_causal
from tandem.models.trunk import Trunk
from tandem.run.folder import read_metrics
from tandem.stages.compilation import compiles
from tandem.types import whole_texts
from test_commands import EXACT, ppo_words, prompt_file, refused, with_function
from test_resume import self_ending_reward

needs_compiler = pytest.mark.skipif(compiler() is None, reason="torch compiles with g++ on a CPU")
COMPILED = "--compute.compiled=true"
SAME = ["policy/loss", "value/loss", "kl/reference", "policy/entropy", "reward/total", "value/explained_variance"]


def in_float32(path) -> CausalPolicy:
    return CausalPolicy(Trunk(load_causal(str(path), "model", torch.float32, torch.device("cpu"))), FULL_DISTRIBUTION)


@pytest.mark.long
@needs_compiler
def test_a_compiled_run_is_the_run_and_goes_on_exactly(tiny, tmp_path, capsys):
    """What goes on does so in another process; its responses end at different lengths, so rows leave the batch."""
    function, marker = self_ending_reward(tmp_path, 3)
    words = [*ppo_words(tmp_path, tiny(), f"--rewards.0.function={function}", "--value.start=policy", EXACT)]
    words += [f"--data.prompts={prompt_file(tmp_path)}", "--steps=3", "--policy.lr=0.001", "--value.lr=0.001"]
    assert main([*words, f"--run.directory={tmp_path / 'cut'}", COMPILED]) == 130
    assert marker.exists()
    done = subprocess.run([sys.executable, "-m", "tandem", "ppo", "--resume", str(tmp_path / "cut")], check=False)
    assert done.returncode == 0
    assert main([*words, f"--run.directory={tmp_path / 'compiled'}", COMPILED]) == 0
    assert differences(tmp_path / "cut", tmp_path / "compiled") == []
    assert main([*words, f"--run.directory={tmp_path / 'plain'}"]) == 0
    plain, compiled = (read_metrics(tmp_path / name) for name in ("plain", "compiled"))
    for one, other in zip(plain, compiled, strict=True):
        found = {name: (one[name], other[name]) for name in SAME if name in one}
        assert len(found) >= 4
        for a, b in found.values():
            assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    assert "not compiled" not in capsys.readouterr().out


@needs_compiler
def test_layers_that_cannot_be_compiled_stay_as_they_are(tiny, tmp_path, capsys, monkeypatch):
    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    words = [*ppo_words(tmp_path, tiny(), *with_function(tmp_path), EXACT)]
    capsys.readouterr()
    with torch._inductor.config.patch({"cpp.cxx": (None, "false")}):
        said = refused(capsys, [*words, COMPILED])
        assert "layers cannot be compiled" in said
        monkeypatch.setattr("tandem.stages.compilation._EARNS_IT_BACK", 1)
        assert main(words) == 0
        assert "the layers are not compiled" in capsys.readouterr().out
    torch.compiler.reset()


@pytest.mark.long
@needs_compiler
def test_layers_are_compiled_where_kernels_cannot_be_built(tiny, tmp_path, capsys, monkeypatch):
    def cannot() -> None:
        raise RuntimeError("g++ cannot compile the operators: it is too old")

    monkeypatch.setattr("tandem.models.kernels.load_kernels", cannot)
    words = [*ppo_words(tmp_path, tiny(), *with_function(tmp_path), EXACT)]
    capsys.readouterr()
    assert main([*words, COMPILED]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the run is slower than it could be: g++ cannot compile the operators: it is too old" in said
    assert "not compiled" not in said


@pytest.mark.long
@needs_compiler
def test_two_losses_may_ask_one_compiled_pass_for_gradients(tiny):
    """As a value head on the policy's trunk does; and what was compiled can be undone."""
    trunk = in_float32(tiny()).trunk
    texts = whole_texts([[row + place for place in range(9)] for row in range(3)])
    chance = torch.Generator()
    weights = list(trunk.layers.requires_grad_(True).parameters())

    def gradients():
        hidden = trunk.hidden(texts)
        one, other = ((hidden * torch.randn(hidden.shape, generator=chance.manual_seed(n))).sum() for n in range(2))
        return [*torch.autograd.grad(one, weights, retain_graph=True), *torch.autograd.grad(other, weights)]

    plain = gradients()
    layers = CompiledLayers(trunk.layers)
    assert all("forward" in vars(layer) for layer in trunk.layers)
    for found, expected in zip(gradients(), plain, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    layers.undo()
    assert all("forward" not in vars(layer) for layer in trunk.layers)


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize(
    ("adapter", "padded", "after_another"),
    [("policy", True, False), ("policy", False, True), (None, True, True)],
)
def test_a_token_is_computed_by_the_code_of_the_token_before(tiny, adapter, padded, after_another):
    """Rows that leave and move keep it; a response with a cache of its own finds its code anew.

    After another model and other sizes torch knows sizes that change apart, though they may be the same at first.
    """
    policy = in_float32(tiny())
    if adapter:
        for parameter in policy.trunk.add_adapter(adapter, AdapterSection(rank=4)):
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    policy = CausalPolicy(policy.trunk, FULL_DISTRIBUTION, adapter)
    ids = torch.randint(0, 300, (9, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:3, :2] = 0
    stays = {14: [0, 1, 2, 3, 4, 5, 6, 8], 15: [6, 0, 4, 3], 18: [0, 2], 20: [1]}

    def respond(policy, rows=9, room=24) -> tuple[list[torch.Tensor], list[list[object]]]:
        """The logits of each token, and after each what the layers keep for the next one."""
        cache, rows = policy.new_cache(room), torch.arange(rows)
        logits, kept = [], []
        with policy.gathered():
            for first, end in [(0, 12), *((place, place + 1) for place in range(12, 24))]:
                seen = mask[rows, :end] if padded else None
                places = torch.arange(first, end).expand(len(rows), -1)
                logits.append(policy.next_logits(ids[rows, first:end], seen, places, cache))
                kept.append([layer.repeat for layer in cache.layers])
                if end in stays and max(stays[end]) < len(rows):
                    cache.batch_select_indices(torch.tensor(stays[end]))
                    rows = rows[stays[end]]
        return logits, kept

    if after_another:
        another = in_float32(tiny())
        CompiledLayers(another.trunk.layers)
        respond(another, rows=4, room=30)
    plain = respond(policy)[0]
    layers = CompiledLayers(policy.trunk.layers)
    found, kept = respond(policy)
    assert all(torch.allclose(one, other, rtol=1e-4, atol=1e-5) for one, other in zip(found, plain, strict=True))
    assert None not in kept[1], "the first token after the prompt is looked up"
    assert all(later == kept[1] for later in kept[2:7]), "and repeated for all that follow"
    assert (kept[7] == kept[1]) == (not padded), "until no row that is left is padded, and there is no mask"
    assert all(later == kept[7] for later in kept[8:])
    again, anew = respond(policy)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert anew[1] != kept[1]
    layers.undo()


@needs_compiler
@pytest.mark.parametrize("entropies", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_compiled_passes_read_logits_as_those_that_are_written(tiny, entropies, trains):
    """Log-probabilities, entropies and gradients; what was not tried before is computed as it is written."""
    policy = in_float32(tiny())
    policy.trunk.model.get_output_embeddings().requires_grad_(trains)
    weights = list(policy.trunk.layers.requires_grad_(True).parameters())
    texts = whole_texts([[row + place for place in range(9)] for row in range(5)], [2] * 5)
    rows = whole_texts([[row + place for place in range(6)] for row in range(3)], [3] * 3)
    chance = torch.Generator()

    def read(tokens):
        asked = policy.logprobs_and_entropies(tokens) if entropies else (policy.logprobs(tokens),)
        upstream = [torch.randn(found.shape, generator=chance.manual_seed(n)) for n, found in enumerate(asked)]
        loss = sum((found * given).sum() for found, given in zip(asked, upstream, strict=True))
        return [*asked, *torch.autograd.grad(loss, weights)]

    plain = [read(texts), read(rows)]
    passes = CompiledPasses([policy])
    assert policy.passes.whole
    first = read(texts)
    passes.settle()
    with torch._dynamo.config.patch(error_on_recompile=True):
        found = [first, read(rows)]
    for one, other in zip(plain, found, strict=True):
        for expected, tensor in zip(one, other, strict=True):
            assert torch.allclose(tensor, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    passes.undo()
    assert not policy.passes.whole


def test_only_a_long_run_compiles_by_itself(tiny):
    policy = in_float32(tiny())
    parameters = sum(parameter.numel() for parameter in policy.trunk.model.parameters())

    def config(steps: int, **compute: object) -> PpoConfig:
        rollout = {"prompts_per_step": 10, "responses_per_prompt": 10, "max_new_tokens": 100}
        tree = {"policy": {"model": "m"}, "data": {"prompts": "p"}, "rewards": [{"model": "r"}], "steps": steps}
        return PpoConfig.model_validate(tree | {"rollout": rollout, "compute": compute})

    enough = int(1e13 / parameters / 10_000) + 1
    assert compiles(config(enough), policy) == (compiler() is not None)
    assert not compiles(config(enough // 2), policy)
    assert not compiles(config(enough, compiled=False), policy)


def test_a_compiled_run_needs_a_compiler_and_one_process(tiny, tmp_path, capsys, monkeypatch):
    words = ppo_words(tmp_path, tiny(), *with_function(tmp_path), COMPILED)
    capsys.readouterr()
    assert "one process" in refused(capsys, [*words, "--processes=2"])
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler" in refused(capsys, words)
