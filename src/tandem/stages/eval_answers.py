"""What the models of an evaluation answer, one model in memory at a time, and how far the one is from the reference."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from tandem.config import EvalConfig
from tandem.data.feed import notes_on
from tandem.data.prompts import make_prompt, read_prompts
from tandem.data.rows import Row
from tandem.errors import InputError
from tandem.models.causal import CausalPolicy, SamplingRule
from tandem.models.sharing import Placement
from tandem.models.source import is_classifier, positions, read_config
from tandem.models.trunk import Trunk
from tandem.run import Progress
from tandem.stages.joint import in_parts, tokens_of
from tandem.stages.sampling import make_generator
from tandem.types import Prompt, Rollout


@dataclass(frozen=True)
class Speaker:
    """A model that answers, by its source and the recipe's name for it, with the prompts as it reads them."""

    source: str
    key: str
    tokenizer: PreTrainedTokenizerBase
    prompts: Sequence[Prompt]


@dataclass(frozen=True)
class Speakers:
    """The model in question, the baseline and the reference, which may be the baseline."""

    model: Speaker
    baseline: Speaker
    reference: Speaker
    dropped_prompts: int

    @property
    def no_kl(self) -> str | None:
        """Why no KL to the reference can be measured, or None where it can."""
        ours, theirs = self.model, self.reference
        if ours.tokenizer.get_vocab() != theirs.tokenizer.get_vocab():
            return "the reference has another tokenizer"
        if any(a.ids != b.ids for a, b in zip(ours.prompts, theirs.prompts, strict=True)):
            return "the reference reads the prompts as other tokens (another chat template, say)"
        return None


@dataclass(frozen=True)
class Answers:
    """Responses in the order of the prompts, R to each of P: of the model and the baseline; `candidates` are R * n of
    the reference, from which the best of each n is taken.

    `log_ratios` and `tokens` are [P, R] of the model's responses: log pi - log pi_ref in nats, and how many tokens it
    is summed over; None where there is no KL.
    """

    model: list[Rollout]
    baseline: list[Rollout]
    candidates: list[Rollout]
    log_ratios: Tensor | None
    tokens: Tensor


def find_speakers(config: EvalConfig, placement: Placement, progress: Progress) -> Speakers:
    """Tokenizers and prompts of all models, before any weight is read.

    Raises InputError for a model that cannot answer, or prompts that cannot be used or do not fit a model.
    """
    data = config.data
    tokenizer = _tokenizer(config.model, "model", placement)
    counts: Counter[str] = Counter()
    prompts = read_prompts(data, tokenizer, counts)
    for line in notes_on(counts, f"data.max_prompt_tokens = {data.max_prompt_tokens}", "data.prompts: "):
        progress.say(line)
    model = Speaker(config.model, "model", tokenizer, prompts)
    baseline = _reading(config.baseline, "baseline", model, placement)
    reference = baseline
    if config.reference is not None:
        reference = _reading(config.reference, "reference", model, placement)
    for speaker in (model, baseline, reference):
        _check_length(speaker, config, placement)
    return Speakers(model, baseline, reference, counts.total())


def answer(config: EvalConfig, speakers: Speakers, placement: Placement, progress: Progress) -> Answers:
    """Sample from every model, and measure the model's responses under it and the reference."""
    times, shared = config.rollout.responses_per_prompt, speakers.reference is speakers.baseline
    measured, extra = speakers.no_kl is None, times * (config.best_of_n or 0)
    ours, logprobs = _own_answers(config, speakers.model, measured, placement, progress)
    of_reference = _Asked(candidates=extra, measured=ours if measured else None)
    of_baseline = replace(of_reference if shared else _Asked(), responses=times)
    baseline = _other_answers(config, speakers.baseline, of_baseline, placement, progress)
    reference = baseline
    if not shared and (measured or extra):
        reference = _other_answers(config, speakers.reference, of_reference, placement, progress)
    log_ratios = None
    if logprobs is not None and reference.logprobs is not None:
        log_ratios = (logprobs - reference.logprobs).sum(1).reshape(-1, times)
    tokens = torch.tensor([float(len(rollout.ids)) for rollout in ours]).reshape(-1, times)
    return Answers(ours, baseline.responses, reference.candidates, log_ratios, tokens)


@dataclass(frozen=True)
class _Asked:
    """What is asked of a model while it is in memory: responses and candidates to each prompt, and the
    log-probabilities of the responses that another one gave."""

    responses: int = 0
    candidates: int = 0
    measured: Sequence[Rollout] | None = None


@dataclass(frozen=True)
class _Heard:
    responses: list[Rollout]
    candidates: list[Rollout]
    logprobs: Tensor | None


def _own_answers(
    config: EvalConfig, speaker: Speaker, measured: bool, placement: Placement, progress: Progress
) -> tuple[list[Rollout], Tensor | None]:
    """The responses of the model in question, and their log-probabilities [B, T] under the rule that sampled them."""
    policy = CausalPolicy(_load(speaker, placement, progress), _rule(config))
    rollouts = _sampled(policy, speaker, "answers", config.rollout.responses_per_prompt, config, 0, progress)
    return rollouts, _logprobs(policy, rollouts, placement) if measured else None


def _other_answers(
    config: EvalConfig, speaker: Speaker, asked: _Asked, placement: Placement, progress: Progress
) -> _Heard:
    """What is asked of the baseline or the reference.

    It measures with its whole support, as the joint stage's reference does: truncated by top-k or top-p, it would give
    tokens that the model sampled no probability at all.
    """
    give_memory_back()
    trunk = _load(speaker, placement, progress)
    policy, choosing = CausalPolicy(trunk, _rule(config)), f"answers for the best of {config.best_of_n}"
    whole = CausalPolicy(trunk, replace(policy.rule, top_k=None, top_p=1.0))
    return _Heard(
        _sampled(policy, speaker, "answers", asked.responses, config, 1, progress),
        _sampled(policy, speaker, choosing, asked.candidates, config, 2, progress),
        None if asked.measured is None else _logprobs(whole, asked.measured, placement),
    )


def _tokenizer(source: str, key: str, placement: Placement) -> PreTrainedTokenizerBase:
    """Raises InputError where the source holds a classifier, as which reward and value models are saved."""
    if is_classifier(source, key, placement.trust_remote_code):
        raise InputError(
            f"{key} = {source!r} is a sequence classifier, such as a reward or value model, and gives no responses; "
            "give a causal language model (a reward model judges: --rewards.0.model)."
        )
    return placement.tokenizer(source, key)


def _reading(source: str, key: str, model: Speaker, placement: Placement) -> Speaker:
    """Another speaker with the very prompts of the model, as its own tokenizer reads them."""
    tokenizer = _tokenizer(source, key, placement)
    rows = [Row(prompt.row, f"prompt {number}, for {key}") for number, prompt in enumerate(model.prompts, start=1)]
    return Speaker(source, key, tokenizer, [make_prompt(row.text("prompt"), tokenizer, row) for row in rows])


def _check_length(speaker: Speaker, config: EvalConfig, placement: Placement) -> None:
    """Raises InputError where prompt and response together are more than the model reads."""
    limit = positions(read_config(speaker.source, speaker.key, placement.trust_remote_code))
    longest = max(len(prompt.ids) for prompt in speaker.prompts)
    if limit is not None and longest + config.rollout.max_new_tokens > limit:
        raise InputError(
            f"the longest prompt has {longest} tokens and rollout.max_new_tokens is {config.rollout.max_new_tokens}, "
            f"together more than the {limit} that {speaker.key} reads; lower data.max_prompt_tokens with "
            'data.too_long = "drop", or rollout.max_new_tokens.'
        )


def _rule(config: EvalConfig) -> SamplingRule:
    return SamplingRule(config.rollout.temperature, config.rollout.top_k, config.rollout.top_p)


def _load(speaker: Speaker, placement: Placement, progress: Progress) -> Trunk:
    with progress.console.status(f"loading {speaker.source}"):
        return placement.trunk(speaker.source, speaker.key)


def give_memory_back() -> None:
    """Have what was freed at the disposal of the next model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _sampled(
    policy: CausalPolicy,
    speaker: Speaker,
    doing: str,
    times: int,
    config: EvalConfig,
    stream: int,
    progress: Progress,
) -> list[Rollout]:
    """So many responses to each prompt; `stream` keeps the random numbers of several speakers apart."""
    if times == 0:
        return []
    random = torch.Generator(device=policy.device).manual_seed((config.run.seed + stream) % 2**32)
    generator = make_generator(policy, speaker.tokenizer, config.rollout, random)
    asked = [prompt for prompt in speaker.prompts for _ in range(times)]
    size, rollouts = config.rollout.sequences_per_batch, list[Rollout]()
    with progress.stage(f"{speaker.key} {doing}", len(asked)) as shown:
        for start in range(0, len(asked), size):
            rollouts += generator.generate(asked[start : start + size])
            shown.advance(steps=len(asked[start : start + size]))
    return rollouts


@torch.no_grad()
def _logprobs(policy: CausalPolicy, rollouts: Sequence[Rollout], placement: Placement) -> Tensor:
    """[B, T] of a model's own forward, on the processor's memory, zero where masked."""
    tokens = policy.prepare(tokens_of(rollouts), placement.tokens_per_microbatch)
    return in_parts(policy.logprobs, tokens, placement.tokens_per_microbatch).cpu()
