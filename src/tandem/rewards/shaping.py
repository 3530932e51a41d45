"""From what the reward says to what is paid at a response's last token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tandem.algo import RunningMoments
from tandem.config import ScoreSection
from tandem.types import Rollout, Scores


def shape_scores(
    scores: Scores, rollouts: Sequence[Rollout], settings: ScoreSection, moments: RunningMoments, max_new_tokens: int
) -> Scores:
    """Scores normalised, scaled and clipped, less the penalties; process rewards are brought to the same units.

    `moments` are those of all that responses earned so far, for `normalize = "running"`. Its mean is taken off what
    is paid at the last token.
    """
    deviation = moments.std if settings.normalize == "running" else 1.0
    mean = moments.mean if settings.normalize == "running" else 0.0
    total = (scores.total - mean) / deviation * settings.scale
    if settings.clip is not None:
        total = total.clamp(-settings.clip, settings.clip)
    process = None if scores.process is None else scores.process / deviation * settings.scale
    return replace(scores, total=total - penalties(rollouts, settings, max_new_tokens), process=process)


def penalties(rollouts: Sequence[Rollout], settings: ScoreSection, max_new_tokens: int) -> Tensor:
    """What each response loses for not ending, and for coming near the limit: [B].

    overlong_penalty * (length - overlong_from) / (max_new_tokens - overlong_from), at least 0.

    Source: Yu et al. 2025 (DAPO), equation 13, soft overlong punishment.
    """
    lost = settings.missing_eos_penalty * torch.tensor([float(not rollout.ended) for rollout in rollouts])
    if settings.overlong_from is not None:
        over = torch.tensor([float(len(rollout.ids) - settings.overlong_from) for rollout in rollouts]).clamp(min=0)
        lost += settings.overlong_penalty * over / (max_new_tokens - settings.overlong_from)
    return lost
