"""Healthy and faulty joint runs of the story model: real runs of the joint stage."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from calibration.cases import Patch, Story
from tandem.config import PpoConfig
from tandem.errors import RunError
from tandem.recipe import load_config
from tandem.rollout import TorchGenerator
from tandem.run import Progress
from tandem.stages import sampling
from tandem.stages.ppo import run_ppo
from tandem.types import Prompt, Rollout, pad_tokens

STEPS = 40
STALE_STEPS = 4
RECIPE = Path(__file__).parents[1] / "ablation" / "stories.toml"
REWARDS = Path(__file__).parent / "rewards.py"
OPENING_WORDS = 10


def words_of(story: Story, seed: int, model: Path, prompts: Path, folder: Path, *, fault: bool) -> list[str]:
    """The command line of a run; of a fault the first quarter, at a constant rate."""
    words = [f"--policy.model={model}", f"--data.prompts={prompts}", f"--run.seed={seed}", f"--run.directory={folder}"]
    words += [f"--rewards.0.function={REWARDS}:{story.reward}", "--rollouts_to_save=2"]
    if fault:
        words += [f"--steps={STEPS // 4}", "--policy.schedule=constant"]
        words += [] if any("mode=head" in word for word in story.words) else ["--value.schedule=constant"]
    return [*words, *(word.format(rewards=REWARDS) for word in story.words)]


def write_prompts(source: Path, path: Path) -> Path:
    """The first words of a thousand stories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stories = [json.loads(line)["text"].split() for line in source.read_text(encoding="utf-8").splitlines()[:1000]]
    rows = "".join(json.dumps({"prompt": " ".join(story[:OPENING_WORDS])}) + "\n" for story in stories)
    path.write_text(rows, encoding="utf-8")
    return path


class PatchedGenerator(TorchGenerator):
    """A generator that is not what it says: of another arithmetic, with old weights, or of another policy."""

    patch: Patch | None = None

    def generate(self, prompts: Sequence[Prompt]) -> list[Rollout]:
        model = self._policy
        if len(prompts) < 8 or self.patch is None:
            return super().generate(prompts)
        if self.patch == "noisy":
            return [replace(one, logprobs=noised(one)) for one in super().generate(prompts)]
        weights = model.trunk.model
        now = {name: tensor.clone() for name, tensor in weights.state_dict().items()}
        self._calls = getattr(self, "_calls", 0) + 1
        if not hasattr(self, "_then") or (self.patch == "stale" and self._calls % STALE_STEPS == 1):
            self._then = now
        weights.load_state_dict(self._then)
        rollouts = super().generate(prompts)
        weights.load_state_dict(now)
        return [self._as_the_policys(one) for one in rollouts] if self.patch == "foreign" else rollouts

    @torch.no_grad()
    def _as_the_policys(self, rollout: Rollout) -> Rollout:
        """The response, said to have had the log-probabilities of the policy as it is."""
        tokens = pad_tokens([rollout.prompt.ids], [rollout.ids])
        return replace(rollout, logprobs=tuple(self._policy.logprobs(self._policy.prepare(tokens, 4096))[0].tolist()))


def noised(rollout: Rollout) -> tuple[float, ...]:
    """Log-probabilities of an arithmetic that is a tenth of a nat off."""
    random = torch.Generator().manual_seed(abs(hash(rollout.ids)) % 2**31)
    return tuple((torch.tensor(rollout.logprobs) + 0.1 * torch.randn(len(rollout.ids), generator=random)).tolist())


def run_story(story: Story, seed: int, model: Path, source: Path, folder: Path, fault: bool) -> None:
    """A run of the joint stage in its folder; one that ends in an error has left its metrics there."""
    torch.set_num_threads(1)
    prompts = write_prompts(source, folder.parent / "prompts.jsonl")
    config = load_config(PpoConfig, RECIPE, words_of(story, seed, model, prompts, folder, fault=fault))
    config = config.model_copy(update={"data": config.data.model_copy(update={"eval_prompts": None})})
    PatchedGenerator.patch = story.patch
    sampling.TorchGenerator = PatchedGenerator
    try:
        run_ppo(config, Progress(Console(quiet=True)))
    except RunError as error:
        print(error, file=sys.stderr)
