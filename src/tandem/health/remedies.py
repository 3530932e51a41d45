"""Recipe lines as remedies: each fits the recipe that it is for, so that it can be used as it stands."""

from __future__ import annotations

from functools import reduce
from typing import Any

from tandem.config import PpoConfig
from tandem.health.history import History
from tandem.health.rule import Remedy


def line(name: str, value: Any) -> str:
    """A line of a recipe, `policy.lr = 1e-05`."""
    if isinstance(value, bool):
        return f"{name} = {str(value).lower()}"
    if isinstance(value, float):
        short = f"{value:.2g}"
        return f"{name} = {short}" if "e" in short or "." in short else f"{name} = {value:.1f}"
    return f'{name} = "{value}"' if isinstance(value, str) else f"{name} = {value}"


def override(remedy: str) -> str:
    """The same for the command line: `--policy.lr=1e-05`."""
    name, _, value = remedy.partition(" = ")
    return f"--{name}={value}"


def setting(config: PpoConfig, name: str) -> Any:
    """A setting by its dotted name."""
    return reduce(getattr, name.split("."), config)


def times(name: str, factor: float) -> Remedy:
    """Multiply a setting that is a number above zero."""
    return lambda _history, config: line(name, setting(config, name) * factor)


def hold_nearer(_history: History, config: PpoConfig) -> str:
    """A KL that has a price, and a gradient; then a dearer one, or a nearer target where one sets the price."""
    kl = config.kl
    if kl.coefficient == 0:
        return line("kl.coefficient", 0.05)
    if kl.placement == "loss" and kl.estimator == "k1":
        return line("kl.placement", "reward")
    if kl.target is not None:
        return line("kl.target", kl.target / 3)
    return line("kl.coefficient", kl.coefficient * 3)


def smaller_updates(_history: History, config: PpoConfig) -> str:
    """A lower learning rate; with several epochs, first a bound on how far they may go."""
    if config.policy.epochs > 1 and config.policy.max_approx_kl is None:
        return line("policy.max_approx_kl", 0.02)
    return line("policy.lr", config.policy.lr / 3)


def more_value_learning(_history: History, config: PpoConfig) -> str:
    """More passes while the value model explains little; a faster head, where one pass serves both losses."""
    if config.sharing.mode == "head":
        return line("value.head_lr", (config.value.head_lr or config.value.lr) * 5)
    if config.value.adaptive is not None:
        return line("value.adaptive.max_epochs", config.value.adaptive.max_epochs * 2)
    return line("value.adaptive.max_epochs", max(8, config.value.epochs * 4))


def longer_warmup(_history: History, config: PpoConfig) -> str:
    warmup = config.value.warmup
    return line("value.warmup.steps", 20 if warmup is None else warmup.steps * 2)
