"""The operators in C++ are held to the plain ways in Python."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch.nn.functional import linear
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from tandem.algo import sample
from tandem.models import kernels
from tandem.models.attention import _in_products, _one_token, _one_token_in_sums
from tandem.models.building import built_library, compiler
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy, SamplingRule
from tandem.models.compiling import CompiledLayers, CompiledPasses, KernelSampling
from tandem.models.head import head_logprobs
from tandem.models.repeating import compile_graph
from tandem.models.trunk import Trunk
from tandem.types import whole_texts

pytestmark = pytest.mark.skipif(compiler() is None, reason="the operators are built with g++")
UNITS = torch.cpu.get_capabilities().get("amx_bf16", False)
needs_units = pytest.mark.skipif(not UNITS, reason="this processor has no matrix units for bfloat16")
SHAPE = LlamaConfig(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)
TYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)
    kernels.load_kernels()


@needs_units
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(16, 32), (48, 96), (64, 16), (32, 8), (192, 576)])
@pytest.mark.parametrize("rows", [1, 15, 16, 17, 32, 47, 63, 64, 65, 100, 129])
def test_products_of_few_rows(rows, shape, biased):
    """Each as near to that of the same numbers in float64 as rounding the answer to bfloat16 is."""
    layer = torch.nn.Linear(shape[1], shape[0], bias=biased, dtype=torch.bfloat16).requires_grad_(False)
    assert kernels.multiplies(layer.weight)
    given = torch.randn(rows, 1, shape[1]).bfloat16()
    truth = linear(given.double(), layer.weight.double(), layer.bias.double() if biased else None)
    found = kernels.packed_product(layer)(given)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found.double(), truth, rtol=2**-8, atol=1e-6)


@needs_units
def test_onednn_multiplies_as_before_in_between():
    """The shape of a thread's tiles is the processor's state, and oneDNN's own."""
    weight = torch.randn(96, 128).bfloat16()
    layer = torch.nn.Linear(64, 16, bias=False, dtype=torch.bfloat16)
    product, given, few = kernels.packed_product(layer), torch.randn(50, 128).bfloat16(), torch.randn(3, 64).bfloat16()
    expected, own = given @ weight.T, product(few)
    for _ in range(20):
        assert torch.equal(product(few), own)
        assert torch.equal(given @ weight.T, expected)


def test_only_whole_tiles_are_multiplied():
    for shape in [(17, 32), (16, 40), (16, 24)]:
        assert not kernels.multiplies(torch.zeros(shape, dtype=torch.bfloat16))
    assert not kernels.multiplies(torch.zeros(16, 32))
    with pytest.raises(RuntimeError, match="whole tiles"):
        torch.ops.tandem_cpu.pack(torch.zeros(17, 32, dtype=torch.bfloat16))


@needs_units
@pytest.mark.parametrize("rows", [1, 2, 31, 32, 33, 64, 100])
@pytest.mark.parametrize(("outputs", "inputs"), [([16], 16), ([32], 48), ([48, 16, 32], 32), ([96, 64], 80)])
def test_gradients_of_matrices(rows, outputs, inputs):
    """Each as near to that of the same numbers in float64 as rounding the answer to bfloat16 is."""
    given = torch.randn(rows, inputs).bfloat16()
    upstream = [torch.randn(rows, width).bfloat16() for width in outputs]
    assert all(kernels.finds_gradient(gradient, given) for gradient in upstream)
    for found, gradient in zip(kernels.weight_gradients(upstream, given), upstream, strict=True):
        truth = gradient.double().T @ given.double()
        assert torch.allclose(found.double(), truth, rtol=2**-8, atol=1e-5)


def test_gradients_of_other_matrices_are_left_alone():
    tiles = torch.zeros(3, 32, dtype=torch.bfloat16)
    assert not kernels.finds_gradient(tiles[:, :24], tiles)
    assert not kernels.finds_gradient(tiles, tiles[:, :24])
    assert not kernels.finds_gradient(tiles.float(), tiles.float())


@pytest.mark.long
@needs_units
def test_compiled_layers_compute_by_the_operators():
    """Gradients of query, key and value together, gate and up together; as near to float32's as uncompiled ones are."""
    model = LlamaForCausalLM(SHAPE).bfloat16()
    exact = LlamaForCausalLM(SHAPE)
    exact.load_state_dict(model.state_dict())
    policy, truth = (CausalPolicy(Trunk(each), FULL_DISTRIBUTION) for each in (model, exact))
    texts, slope = whole_texts([[(5 * row + place) % 96 for place in range(9)] for row in range(5)]), torch.randn(64)

    def gradients(of: CausalPolicy) -> list[torch.Tensor]:
        loss = (of.trunk.hidden(texts).float() * slope).sum()
        return list(torch.autograd.grad(loss, list(of.trunk.layers.parameters())))

    expected, plain = gradients(truth), gradients(policy)
    KernelSampling([policy])
    layers = CompiledLayers(policy.trunk.layers)
    gradients(policy)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        found = gradients(policy)
    layers.undo()
    calls = {event.key: event.count for event in seen.key_averages()}
    assert calls["tandem_cpu::weight_gradients"] == 2 * 4
    assert calls["tandem_cpu::attend_texts"] == calls["tandem_cpu::attend_texts_gradients"] == 2
    assert calls["tandem_cpu::rotate"] == 2 * 2 * 2
    for compiled, written, exactly in zip(found, plain, expected, strict=True):
        gap, usual = ((each.float() - exactly).norm() / exactly.norm() for each in (compiled, written))
        assert gap < max(1.5 * usual, 0.01)


@pytest.fixture
def threads(request) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def read_and_gradients(read, states, weight, upstream):
    given = [states.clone().requires_grad_(), weight.clone().requires_grad_()]
    logprobs = read(*given)
    return logprobs.detach(), *torch.autograd.grad(logprobs, given, upstream.to(logprobs.dtype))


@needs_units
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("rows", [1, 31, 33, 80, 560])
@pytest.mark.parametrize(("vocabulary", "width"), [(32, 32), (96, 64), (608, 96)])
def test_a_head_is_read_by_squares(rows, vocabulary, width):
    """As near to the same numbers in float64 as rounding logits and gradients to bfloat16 is; in chunks too."""
    states, weight = 3 * torch.randn(rows, width).bfloat16(), torch.randn(vocabulary, width).bfloat16() / 4
    targets, upstream = torch.randint(vocabulary, (rows,)), torch.randn(rows)

    def exactly(states, weight):
        return (states @ weight.T).log_softmax(-1)[torch.arange(rows), targets]

    def rounded(states, weight):
        logits = (states.bfloat16() @ weight.bfloat16().T).double()
        return logits.log_softmax(-1)[torch.arange(rows), targets]

    def by_kernels(states, weight):
        return head_logprobs(states, targets, weight, rows_per_chunk=1024)

    def in_chunks(states, weight):
        return head_logprobs(states, targets, weight, rows_per_chunk=48)

    expected, *truth = read_and_gradients(exactly, states.double(), weight.double(), upstream)
    plain, *usual = read_and_gradients(rounded, states, weight, upstream)
    for way in (by_kernels, in_chunks):
        found, *gradients = read_and_gradients(way, states, weight, upstream)
        assert torch.allclose(found.double(), expected, rtol=1e-4, atol=2 * (plain - expected).abs().max() + 1e-4)
        for gradient, exact, written in zip(gradients, truth, usual, strict=True):
            assert (gradient - exact).norm() <= 1.5 * (written - exact).norm() + 1e-4 * exact.norm()
        with torch.no_grad():
            assert torch.equal(way(states, weight), found), "the same bits with a gradient and without"
    frozen, moving = weight.clone(), states.clone().requires_grad_()
    of_states = torch.autograd.grad(by_kernels(moving, frozen), moving, upstream)[0]
    assert (of_states - truth[0]).norm() <= 1.5 * (usual[0] - truth[0]).norm() + 1e-2 * truth[0].norm()


@needs_units
def test_a_head_reads_no_rows():
    states, weight = torch.zeros(0, 32).bfloat16().requires_grad_(), torch.randn(64, 32).bfloat16().requires_grad_()
    logprobs = head_logprobs(states, torch.zeros(0, dtype=torch.int64), weight, rows_per_chunk=64)
    of_states, of_weight = torch.autograd.grad(logprobs.sum(), [states, weight])
    assert of_states.shape == (0, 32)
    assert torch.equal(of_weight, torch.zeros(64, 32))


@needs_units
def test_a_head_is_asked_for_gradients_twice():
    """As two losses do; what the first pass has used up is made again."""
    states = torch.randn(40, 32).bfloat16().requires_grad_()
    weight = torch.randn(64, 32).bfloat16().requires_grad_()
    logprobs = head_logprobs(states, torch.arange(40), weight, rows_per_chunk=64)
    one, other = (torch.autograd.grad(logprobs.sum(), [states, weight], retain_graph=True) for _ in range(2))
    assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_other_heads_are_read_as_before():
    def head(*shape, **more):
        return torch.nn.Linear(*shape, **{"bias": False, "dtype": torch.bfloat16} | more)

    assert kernels.reads_head(head(64, 96)) == UNITS
    assert not kernels.reads_head(head(64, 96, bias=True))
    assert not kernels.reads_head(head(64, 96, dtype=torch.float32))
    assert not kernels.reads_head(head(48, 96))
    assert not kernels.reads_head(head(64, 80))


def error(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth).norm() / truth.norm())


def in_heads(rows: int, heads: int, length: int, width: int) -> torch.Tensor:
    """As a layer makes them: [rows, heads, length, width] with the heads of a token beside each other."""
    return torch.randn(rows, length, heads, width).bfloat16().transpose(1, 2)


@needs_units
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("length", [1, 5, 32, 33, 77, 600])
@pytest.mark.parametrize(("heads", "sets", "width"), [(4, 4, 16), (6, 6, 48), (9, 3, 64), (4, 1, 80), (2, 1, 128)])
def test_texts_attend(heads, sets, width, length):
    """What comes of it and all gradients are nearer to those in float64 than by products with a softmax between."""
    given = in_heads(3, heads, length, width), in_heads(3, sets, length, width), in_heads(3, sets, length, width)
    upstream = torch.randn(3, length, heads, width).bfloat16()
    assert kernels.attends_texts(*given)

    def with_gradients(attend, dtype):
        inputs = [one.to(dtype).requires_grad_() for one in given]
        found = attend(*inputs)
        return [found.detach(), *torch.autograd.grad(found, inputs, upstream.to(dtype))]

    def exactly(query, key, value):
        key, value = (one.repeat_interleave(heads // sets, 1) for one in (key, value))
        fused = torch.nn.functional.scaled_dot_product_attention
        return fused(query, key, value, is_causal=True, scale=0.3).transpose(1, 2)

    every = zip(
        with_gradients(lambda *inputs: kernels.attend_texts(*inputs, 0.3), torch.bfloat16),
        with_gradients(lambda *inputs: _in_products(*inputs, None, 0.3), torch.bfloat16),
        with_gradients(exactly, torch.float64),
        strict=True,
    )
    for found, plain, truth in every:
        assert found.shape == truth.shape
        # With a single token to read, queries and keys have no gradient.
        assert error(found, truth) <= error(plain, truth) if truth.abs().max() > 1e-6 else found.abs().max() < 1e-4


@needs_units
def test_texts_do_not_attend_to_what_follows():
    query, key, value = (in_heads(2, 2, 70, 32) for _ in range(3))
    found = kernels.attend_texts(query, key, value, 0.3)
    for one in (query, key, value):
        one[:, :, 40:] = 1e4
    assert torch.equal(kernels.attend_texts(query, key, value, 0.3)[:, :40], found[:, :40])


@needs_units
def test_a_gradient_of_attention_is_asked_for_twice():
    given = [in_heads(2, 2, 40, 32).requires_grad_() for _ in range(3)]
    found = kernels.attend_texts(*given, 0.3)
    upstream = torch.randn(found.shape).bfloat16()
    first = torch.autograd.grad(found, given, upstream, retain_graph=True)
    again = torch.autograd.grad(found, given, upstream)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_other_texts_attend_in_another_way():
    query, key, value = (in_heads(2, 4, 9, 64) for _ in range(3))
    assert kernels.attends_texts(query, key, value) == UNITS
    assert not kernels.attends_texts(query[:, :, 3:], key, value)
    assert not kernels.attends_texts(query, key, value[..., :32])
    assert not kernels.attends_texts(query[..., :40], key[..., :40], value[..., :40])
    assert not kernels.attends_texts(query.float(), key.float(), value.float())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", [2, 16, 24, 32, 48, 128])
@pytest.mark.parametrize("angles_of", [1, 3])
def test_heads_are_rotated(width, dtype, angles_of):
    """As transformers writes it, and so are the gradients; a half may have other angles than the other."""
    heads = torch.randn(3, 7, 2, width, dtype=dtype).transpose(1, 2).requires_grad_()
    cos, sin = (torch.randn(angles_of, 1, 7, width, dtype=dtype) for _ in range(2))
    upstream, half = torch.randn(3, 2, 7, width, dtype=dtype), width // 2
    exact = heads.detach().double().requires_grad_()
    turned = torch.cat((-exact[..., half:], exact[..., :half]), dim=-1)
    expected = exact * cos.double() + turned * sin.double()
    assert kernels.rotates(heads, cos, sin)
    found = torch.ops.tandem_cpu.rotate(heads, cos, sin, False)
    near = {"rtol": 2**-8, "atol": 1e-3} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    assert torch.allclose(found.double(), expected, **near)
    (gradient,) = torch.autograd.grad(found, heads, upstream)
    (of_exact,) = torch.autograd.grad(expected, exact, upstream.double())
    assert torch.allclose(gradient.double(), of_exact, **near)


@pytest.mark.parametrize(("half", "by_angles", "names"), [(8, True, {"rotate"}), (4, True, set()), (8, False, set())])
def test_a_rotation_is_found_in_what_is_compiled(half, by_angles, names):
    """And what only looks like one is left as it is: parts that are no halves, numbers in the place of angles."""
    heads, *angles = torch.randn(3, 2, 7, 16), torch.randn(1, 1, 7, 16), torch.randn(1, 1, 7, 16)

    def rotated(heads, cos, sin):
        turned = torch.cat((-heads[..., half:], heads[..., :half]), dim=-1)
        return heads * cos + turned * sin if by_angles else heads * 0.6 + turned * 0.8

    compiled = torch.compile(rotated, backend=compile_graph)
    assert torch.allclose(compiled(heads, *angles), rotated(heads, *angles), atol=1e-6)
    assert called_by(lambda: compiled(heads, *angles)) == names


def test_other_heads_are_rotated_as_before():
    heads, angles = torch.randn(3, 2, 7, 16), torch.randn(1, 1, 7, 16)
    assert kernels.rotates(heads, angles, angles)
    assert not kernels.rotates(heads[:, :, :1], angles[:, :, :1], angles[:, :, :1])
    assert not kernels.rotates(heads, angles.bfloat16(), angles)
    assert not kernels.rotates(heads, angles, torch.randn(3, 2, 7, 16))
    assert not kernels.rotates(heads, angles, angles.clone().requires_grad_())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("width", kernels._WIDTHS)
@pytest.mark.parametrize("masked", [None, "every row", "one for all"])
def test_a_single_query_attends(width, dtype, masked):
    """Keys and values lie in room for more, and a row may read nothing at all."""
    query = torch.randn(5, 1, 6, width, dtype=dtype).transpose(1, 2)
    keys, values = (torch.randn(7, 2, 40, width, dtype=dtype)[:5, :, :23] for _ in range(2))
    mask = None if masked is None else torch.rand(5 if masked == "every row" else 1, 1, 1, 30)[..., :23] < 0.5
    if mask is not None:
        mask[0] = masked == "one for all"
    assert kernels.attends_one(query, values)
    found = kernels.attend_one(query, keys, values, mask, 0.3)
    expected = _one_token_in_sums(query, keys, values, mask, 0.3)
    assert torch.allclose(found, expected, atol=1e-5 if dtype == torch.float32 else 2**-7)
    if mask is None:
        fused = _one_token(query.contiguous(), keys, values, None, 0.3)
        assert torch.allclose(found, fused, atol=1e-5 if dtype == torch.float32 else 2**-6)


def test_heads_of_another_width_attend_in_another_way():
    assert not kernels.attends_one(torch.randn(2, 4, 1, 40), torch.randn(2, 4, 9, 40))
    assert not kernels.attends_one(torch.randn(2, 4, 1, 64), torch.randn(2, 4, 9, 32))
    assert not kernels.attends_one(torch.randn(2, 4, 1, 64).half(), torch.randn(2, 4, 9, 64).half())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("vocabulary", [7, 16, 250, 256, 1000, 32_000])
@pytest.mark.parametrize("left_out", [0.0, 0.7])
def test_tokens_are_drawn(vocabulary, dtype, left_out):
    """The same tokens by the same chance, but for one drawn where two touch; never one that is left out."""
    logits = 3 * torch.randn(200, vocabulary)
    out = torch.rand(200, vocabulary) < left_out
    out[torch.arange(200), logits.argmax(1)] = False
    logits = logits.masked_fill(out, -torch.inf).to(dtype)
    uniform = torch.rand(200)
    uniform[0], uniform[1] = 0, 1 - 2**-24
    tokens, logprobs = kernels.draw(logits, uniform)
    expected, of_expected = sample(logits, uniform)
    same = tokens == expected
    assert same.float().mean() >= 0.98
    assert torch.allclose(logprobs[same], of_expected[same], atol=2e-5)
    assert torch.isfinite(logprobs).all()
    assert torch.allclose(logprobs, logits.float().log_softmax(-1)[torch.arange(200), tokens], atol=2e-5)


def test_draws_follow_the_distribution():
    logits = torch.randn(300)
    tokens, _ = kernels.draw(logits.expand(100_000, -1), torch.rand(100_000))
    found = torch.bincount(tokens, minlength=300) / 100_000
    assert (found - logits.softmax(0)).abs().max() < 4e-3


def decoded(policy: CausalPolicy) -> Iterator[torch.Tensor]:
    """Logits of three tokens after left-padded prompts, a row leaving after the first."""
    ids, mask = torch.arange(5, 53).reshape(4, 12), torch.ones(4, 12, dtype=torch.int64)
    mask[1, :5] = 0
    with policy.gathered():
        cache = policy.new_cache(15)
        yield policy.next_logits(ids, mask, (mask.cumsum(1) - 1).clamp(min=0), cache)
        for token in range(60, 63):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            row = torch.full((len(mask), 1), token)
            yield policy.next_logits(row, mask, mask.sum(1, keepdim=True) - 1, cache)
            if token == 60:
                cache.batch_select_indices(torch.tensor([0, 1, 3]))
                mask = mask[[0, 1, 3]]


def policy_of(dtype: torch.dtype, rule: SamplingRule = FULL_DISTRIBUTION, **config: float) -> CausalPolicy:
    torch.manual_seed(1)
    model = LlamaForCausalLM(SHAPE).to(dtype).eval()
    model.config.update(config)
    return CausalPolicy(Trunk(model), rule)


def called_by(work: Callable[[], object]) -> set[str]:
    """The operators of ours that it computes by."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        work()
    found = {event.key for event in seen.key_averages()}
    return {name.removeprefix("tandem_cpu::") for name in found if name.startswith("tandem_cpu::")}


def read_by(work: Callable[[], object]) -> set[str]:
    """Those of them that read a head."""
    return {name for name in called_by(work) if name.startswith("head_")}


@needs_units
@pytest.mark.parametrize("trains", [False, True])
def test_a_compiled_policy_reads_its_head_by_them(trains):
    """Log-probabilities and all gradients are as near to those in float32 as a plain policy's; until it is undone."""
    texts = whole_texts([[(5 * row + place) % 96 for place in range(9)] for row in range(5)], [4] * 5)
    upstream = torch.randn(5, 5)

    def read(policy: CausalPolicy) -> list[torch.Tensor]:
        policy.trunk.model.get_output_embeddings().requires_grad_(trains)
        policy.trunk.model.zero_grad()
        logprobs = policy.logprobs(texts)
        (logprobs * upstream).sum().backward()
        weights = [weight for weight in policy.trunk.model.parameters() if weight.requires_grad]
        return [logprobs.detach(), *(weight.grad.clone() for weight in weights)]

    ours = policy_of(torch.bfloat16)
    passes = CompiledPasses([ours])
    names = {"head_logprobs", "head_states_gradient", *(["head_weight_gradient"] if trains else [])}
    assert read_by(lambda: read(ours)) == names
    every = zip(read(ours), read(policy_of(torch.bfloat16)), read(policy_of(torch.float32)), strict=True)
    for found, plain, truth in every:
        assert (found.float() - truth).norm() < 1.2 * (plain.float() - truth).norm() + 1e-3 * truth.norm()
    passes.undo()
    assert read_by(lambda: read(ours)) == set()


@needs_units
def test_what_is_more_than_a_product_is_read_as_before():
    texts = whole_texts([[5, 6, 7, 8]] * 3, [2] * 3)
    hot = SamplingRule(temperature=2.0, top_k=None, top_p=1.0)
    for policy in (
        policy_of(torch.bfloat16, hot),
        policy_of(torch.bfloat16, logit_scale=1.0),
        policy_of(torch.float32),
    ):
        passes = CompiledPasses([policy])
        assert read_by(lambda: policy.logprobs(texts)) == set()  # noqa: B023
        passes.undo()
    policy = policy_of(torch.bfloat16)
    passes = CompiledPasses([policy])
    assert read_by(lambda: policy.logprobs_and_entropies(texts)) == set()
    passes.undo()


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.long), torch.bfloat16])
def test_a_compiled_policy_samples_by_them(dtype):
    """Its logits are as near to those in float32 as a plain policy's."""
    ours = policy_of(dtype)
    CompiledLayers(ours.trunk.layers)
    sampling = KernelSampling([ours])
    found: list[torch.Tensor] = []

    def decode() -> None:
        found[:] = decoded(ours)
        ours.draw(found[-1], torch.rand(3))

    called = called_by(decode)
    assert {"draw", "attend_one"} <= called
    assert ("multiply_packed" in called) == (UNITS and dtype == torch.bfloat16)
    for own, plain, truth in zip(found, decoded(policy_of(dtype)), decoded(policy_of(torch.float32)), strict=True):
        assert (own - truth).norm() < 1.2 * (plain - truth).norm() + 1e-5 * truth.norm()
    sampling.undo()
    assert not ours.samples_by_kernels


def test_what_is_wrong_with_the_compiler_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(RuntimeError, match=r"cannot compile the operators"):
        built_library()
    assert [path.name for path in (tmp_path / "tandem" / "kernels").iterdir()] == ["lock"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match=r"no C\+\+ compiler"):
        built_library()
