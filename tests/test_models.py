"""Sharing, switching and saving, for several architectures."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from conftest import ARCHITECTURES
from tandem.algo import Histogram
from tandem.config import AdapterSection, HistogramSection, ValueSection
from tandem.errors import InputError
from tandem.models.causal import FULL_DISTRIBUTION, CausalPolicy, SamplingRule
from tandem.models.loading import load_causal, load_scalar, load_tokenizer
from tandem.models.saving import load_adapter, save_policy, save_scalar
from tandem.models.scalar import ScalarModel, as_scalar, load_body, zero_head
from tandem.models.scoring import ClassifierScorer, DecoderScorer
from tandem.models.sharing import histogram_of, value_head
from tandem.models.trunk import Trunk
from tandem.models.weight_files import write_weights
from tandem.types import pad_tokens, split_by_tokens, whole_texts

CPU = torch.device("cpu")
LORA = AdapterSection(rank=4, alpha=8, upper_layers=2)


def load(path, dtype=torch.float32):
    return load_causal(str(path), "model", dtype, CPU)


def some_tokens():
    return pad_tokens([[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16], [1]])


def stir(trunk: Trunk, *names: str) -> None:
    """Give adapters weights that matter."""
    torch.manual_seed(3)
    for name in names:
        for parameter in trunk.adapter_parameters(name):
            torch.nn.init.normal_(parameter, std=0.1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logprobs_are_the_models_own(tiny, architecture):
    model = load(tiny(architecture))
    tokens = some_tokens()
    found = CausalPolicy(Trunk(model), FULL_DISTRIBUTION).logprobs(tokens)
    for row, (prompt, response) in enumerate(
        zip([[5, 6, 7], [8], [9, 10]], [[11, 12], [13, 14, 15, 16], [1]], strict=True)
    ):
        ids = torch.tensor([prompt + response])
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
        expected = [logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(response)]
        assert found[row, : len(response)].tolist() == pytest.approx(expected, abs=1e-4)
        assert (found[row, len(response) :] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_lower_trunk_changes_nothing(tiny, architecture):
    trunk = Trunk(load(tiny(architecture)))
    for name in ("policy", "value"):
        trunk.add_adapter(name, LORA)
    trunk.add_adapter("reward", AdapterSection(rank=4))
    trunk.share_below("policy")
    stir(trunk, "policy", "value", "reward")
    plain = some_tokens()
    shared = trunk.prepare(plain, 6)
    assert shared.activations is not None
    for adapter in (None, "policy", "value", "reward"):
        gap = (trunk.hidden(shared, adapter) - trunk.hidden(plain, adapter)).abs().amax(-1)
        exists = torch.arange(plain.ids.shape[1])[None] < plain.lengths[:, None]
        assert gap[exists].max() < 1e-4


def test_reference_is_the_trunk_with_adapters_off(tiny):
    before = CausalPolicy(Trunk(load(tiny())), FULL_DISTRIBUTION).logprobs(some_tokens())
    trunk = Trunk(load(tiny()))
    trunk.add_adapter("policy", LORA)
    policy, reference = (
        CausalPolicy(trunk, FULL_DISTRIBUTION, "policy"),
        CausalPolicy(trunk, FULL_DISTRIBUTION),
    )
    assert torch.equal(policy.logprobs(some_tokens()), before)
    stir(trunk, "policy")
    assert torch.equal(reference.logprobs(some_tokens()), before)
    assert not torch.allclose(policy.logprobs(some_tokens()), before, atol=1e-3)


def test_gradients_reach_one_adapter_only(tiny):
    trunk = Trunk(load(tiny()))
    policy = trunk.add_adapter("policy", LORA)
    value = trunk.add_adapter("value", LORA)
    stir(trunk, "policy", "value")
    CausalPolicy(trunk, FULL_DISTRIBUTION, "policy").logprobs(some_tokens()).sum().backward()
    assert all(parameter.grad is not None for parameter in policy)
    assert all(parameter.grad is None for parameter in value)
    assert not any(p.requires_grad for name, p in trunk.model.named_parameters() if ".lora_" not in name)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_policy_is_saved_for_transformers_and_peft(tiny, tmp_path, architecture):
    source = tiny(architecture)
    trunk = Trunk(load(source))
    trunk.add_adapter("policy", LORA)
    stir(trunk, "policy")
    tokens = some_tokens()
    expected = CausalPolicy(trunk, FULL_DISTRIBUTION, "policy").logprobs(tokens)
    save_policy(trunk, "policy", load_tokenizer(str(source), "model"), tmp_path / "out")
    merged = Trunk(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert torch.allclose(CausalPolicy(merged, FULL_DISTRIBUTION).logprobs(tokens), expected, atol=1e-4)
    by_peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "out" / "adapter")
    ids = torch.tensor([[5, 6, 7, 11, 12]])
    logprobs = by_peft(input_ids=ids).logits[0].log_softmax(-1)
    assert logprobs[2, 11].item() == pytest.approx(expected[0, 0].item(), abs=1e-4)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("adapter", [None, "value"])
def test_scalar_model_is_saved_as_a_classifier(tiny, tmp_path, architecture, adapter):
    source = tiny(architecture)
    trunk = Trunk(load(source))
    if adapter:
        trunk.add_adapter(adapter, LORA)
        stir(trunk, adapter)
    head = zero_head(32, CPU)
    torch.nn.init.normal_(head.weight)
    model = ScalarModel(trunk, head, adapter)
    texts = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
    expected = DecoderScorer(model, 64).score(texts)
    save_scalar(model, load_tokenizer(str(source), "model"), tmp_path / "out")
    loaded = load_scalar(str(tmp_path / "out"), "rewards.model", torch.float32, CPU)
    assert torch.allclose(DecoderScorer(as_scalar(loaded), 64).score(texts), expected, atol=1e-4)
    by_transformers = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    for text, score in zip(texts, expected.tolist(), strict=True):
        assert by_transformers(input_ids=torch.tensor([text])).logits[0, 0].item() == pytest.approx(score, abs=1e-4)
    assert torch.allclose(ClassifierScorer(loaded, 2, 64).score(texts), expected, atol=1e-4)
    if adapter:
        other = Trunk(load(source))
        head = load_adapter(other, "reward", LORA, tmp_path / "out" / "adapter")
        assert torch.allclose(DecoderScorer(ScalarModel(other, head, "reward"), 64).score(texts), expected, atol=1e-4)


def test_a_large_model_is_saved_in_several_files(tiny, tmp_path):
    model = load(tiny("qwen2"), torch.bfloat16)
    weights = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    (tmp_path / "model.safetensors").write_bytes(b"of an earlier model")
    model.save_pretrained(tmp_path, state_dict={})
    write_weights(tmp_path, weights, weights.items(), shard_bytes=20_000)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 25_000 for file in files)
    found = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in model.state_dict().items())


def test_values_in_other_units_are_saved_in_those_of_the_reward(tiny, tmp_path):
    start = zero_head(32, CPU)
    torch.nn.init.normal_(start.weight)
    model = ScalarModel(Trunk(load(tiny())), value_head(ValueSection(normalize=True), start))
    before = model.values(some_tokens())
    model.rescale(3.0, 4.0)
    torch.nn.init.constant_(model.head.bias, 0.25)
    save_scalar(model, load_tokenizer(str(tiny()), "model"), tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    add = json.loads((tmp_path / "value.json").read_text())["add"]
    assert add == pytest.approx(3.0 + 4.0 * 0.25)
    found = loaded(input_ids=torch.tensor([[5, 6, 7]])).logits.item() + add
    assert found == pytest.approx(model.values(some_tokens())[0, 0].item(), abs=1e-4)
    assert found == pytest.approx(before[0, 0].item() + 3.0 + 1.0, abs=1e-4)


def test_a_categorical_head_starts_at_zero_and_is_saved_with_its_bins(tiny, tmp_path):
    settings = ValueSection(loss="hl_gauss", histogram=HistogramSection(low=-1.0, high=9.0, bins=40))
    model = ScalarModel(Trunk(load(tiny())), value_head(settings, zero_head(32, CPU)), histogram=histogram_of(settings))
    tokens = some_tokens()
    assert model.values(tokens)[:, 0].abs().max() < 0.1
    torch.nn.init.normal_(model.head.weight)
    save_scalar(model, load_tokenizer(str(tiny()), "model"), tmp_path)
    note = json.loads((tmp_path / "value.json").read_text())
    logits = AutoModelForSequenceClassification.from_pretrained(tmp_path)(input_ids=torch.tensor([[5, 6, 7]])).logits
    found = Histogram(**note["histogram"]).mean(logits + torch.tensor(note["add"]))
    assert found.item() == pytest.approx(model.values(tokens)[0, 0].item(), abs=1e-3)


def test_values_stand_before_each_token_and_after_the_last(tiny):
    trunk = Trunk(load(tiny()))
    head = zero_head(32, CPU)
    torch.nn.init.normal_(head.weight)
    tokens = some_tokens()
    values = ScalarModel(trunk, head).values(tokens)
    hidden = trunk.hidden(tokens)
    assert values.shape == (3, 5)
    for row, (prompt, response) in enumerate([(3, 2), (1, 4), (2, 1)]):
        expected = head(hidden[row, prompt - 1 : prompt + response]).squeeze(-1)
        assert torch.allclose(values[row, : response + 1], expected, atol=1e-5)
        assert (values[row, response + 1 :] == 0).all()


def test_a_new_value_model_answers_zero(tiny):
    model = load_body(str(tiny()), "model", torch.float32, CPU, False, print)
    assert (model.values(some_tokens()) == 0).all()


@pytest.mark.parametrize("rule", [SamplingRule(0.7, None, 1.0), SamplingRule(1.0, 5, 1.0), SamplingRule(1.3, 20, 0.8)])
def test_logprobs_follow_the_sampling_rule(tiny, rule):
    trunk = Trunk(load(tiny()))
    tokens = pad_tokens([[5, 6]], [[7]])
    logits = trunk.model(input_ids=torch.tensor([[5, 6]])).logits[0, -1] / rule.temperature
    probabilities = logits.softmax(-1)
    order = probabilities.argsort(descending=True)
    order = order[: rule.top_k] if rule.top_k else order
    inside = probabilities[order] / probabilities[order].sum()
    nucleus = order[: int((inside.cumsum(0) < rule.top_p).sum()) + 1] if rule.top_p < 1 else order
    kept = set(nucleus.tolist()) | {7}
    expected = logits[7] - logits[sorted(kept)].logsumexp(0)
    assert CausalPolicy(trunk, rule).logprobs(tokens).item() == pytest.approx(expected.item(), abs=1e-4)


def test_every_row_is_in_one_group_that_fits():
    lengths = torch.tensor([3, 9, 1, 4, 4, 20, 2])
    groups = split_by_tokens(lengths, 12)
    assert sorted(torch.cat(groups).tolist()) == list(range(7))
    assert all(len(rows) == 1 or len(rows) * int(lengths[rows].max()) <= 12 for rows in groups)


def test_groups_are_few_and_of_like_size():
    assert [len(rows) for rows in split_by_tokens(torch.full((64,), 96), 2048)] == [16] * 4, "not 21, 21, 21 and 1"
    assert [len(rows) for rows in split_by_tokens(torch.tensor([90] * 12 + [20] * 30), 1000)] == [6, 6, 30]


def test_bfloat16_models_compute_close_to_float32(tiny):
    exact = CausalPolicy(Trunk(load(tiny())), FULL_DISTRIBUTION).logprobs(some_tokens())
    rough = CausalPolicy(Trunk(load(tiny(), torch.bfloat16)), FULL_DISTRIBUTION).logprobs(some_tokens())
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_computes_what_the_policy_computes_in_bfloat16(tiny, architecture):
    policy = CausalPolicy(Trunk(load(tiny(architecture), torch.bfloat16)), FULL_DISTRIBUTION)
    tokens = whole_texts([list(range(5, 60))])
    with torch.no_grad():
        hidden, of_copy = (one.trunk.hidden(tokens) for one in (policy, policy.own_copy()))
    assert torch.equal(hidden, of_copy)


def test_more_adapted_layers_than_the_model_has_are_refused(tiny):
    with pytest.raises(InputError, match="upper_layers = 9"):
        Trunk(load(tiny())).add_adapter("policy", AdapterSection(upper_layers=9))


def test_whole_texts_may_be_one_token():
    tokens = whole_texts([[5], [6, 7]])
    assert tokens.lengths.tolist() == [1, 2]
