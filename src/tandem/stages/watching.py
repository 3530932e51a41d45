"""What a joint run does about its health: say what begins and ends, and act where the recipe asks for it."""

from __future__ import annotations

from tandem.config import PpoConfig
from tandem.health import Change, Finding, Watch
from tandem.run import Progress
from tandem.stages.update import Engine

SHOWN = 2
LOWERED_SHARE = 0.5


def tell(change: Change, watch: Watch, config: PpoConfig, progress: Progress) -> None:
    """A line for each finding that began or ended with the latest step, and for what is done about it."""
    for finding in change.began:
        progress.warn(f"step {finding.last_step}: {in_a_line(finding)}")
        if config.health.act == "lower_lr" and watch.lowers_rate(finding):
            progress.say(
                f"health.act: the policy's learning rate is {rate_share(watch, config):.3g} of its schedule's."
            )
    for finding in change.ended:
        progress.say(f"step {watch.history.steps[-1]}: over after step {finding.last_step}: {finding.title}.")


def in_a_line(finding: Finding) -> str:
    """What is wrong, why it is thought so, what to change, and where to read of it."""
    return f"{finding.title}: {finding.explanation} Try {finding.remedy} ({finding.page}, {finding.rule})."


def note(watch: Watch) -> str:
    """The names of what is wrong now, for the line of progress."""
    names = [finding.rule for finding in watch.active]
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"unwell: {', '.join(names[:SHOWN])}{more}" if names else ""


def stops(watch: Watch, config: PpoConfig) -> bool:
    """Whether the recipe wants the run to end for what training does."""
    return config.health.act == "stop" and any(finding.about == "training" for finding in watch.active)


def rate_share(watch: Watch, config: PpoConfig) -> float:
    """What share of its schedule's learning rate the policy has: half for each finding that a lower rate helps."""
    if config.health.act != "lower_lr":
        return 1.0
    return float(LOWERED_SHARE ** sum(watch.lowers_rate(finding) for finding in watch.findings))


def set_rate(policy: Engine, watch: Watch, config: PpoConfig) -> None:
    """Let the policy learn at the rate that its health allows."""
    policy.set_share(rate_share(watch, config))
