"""From resource lines to places: a cluster, and in it one bundle of resources for each process."""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from tandem.cluster.library import ray
from tandem.config import ClusterSection
from tandem.errors import InputError

Role = Literal["trainer", "generator", "reward worker"]
Bundle = Mapping[str, float]
PLACED_WITHIN_SECONDS = 120
_KNOCK_SECONDS = 10


@dataclass(frozen=True)
class Placed:
    """A placement group, and which of its bundles belong to whom."""

    group: Any
    bundles: Sequence[Bundle]
    roles: Sequence[Role]

    def options(self, role: Role, number: int) -> dict[str, Any]:
        """Where Ray is to put the process of a role with this number, and what it takes there."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        index = self.roles.index(role) + number
        return {
            "num_cpus": self.bundles[index]["CPU"],
            "num_gpus": self.bundles[index].get("GPU", 0),
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=index),
        }


def lines(settings: ClusterSection, trainers: int) -> list[tuple[Role, Bundle]]:
    """A bundle for each process; so many train together."""

    def bundle(cpus: int, gpus: float) -> Bundle:
        return {"CPU": float(cpus)} | ({"GPU": gpus} if gpus else {})

    generator = bundle(settings.generator_cpus, settings.generator_gpus)
    scorer = bundle(settings.reward_cpus, settings.reward_gpus)
    trainer = bundle(settings.trainer_cpus, settings.trainer_gpus)
    placed: list[tuple[Role, Bundle]] = [("trainer", trainer) for _ in range(trainers)]
    placed += [("generator", generator) for _ in range(settings.generators)]
    placed += [("reward worker", scorer) for _ in range(settings.reward_workers)]
    return placed


@contextmanager
def placed(settings: ClusterSection, trainers: int) -> Iterator[Placed]:
    """A cluster with a place for every process, so many of which train; what was started here ends with it.

    Raises InputError where there is no such cluster, or it has not what the resource lines ask for.
    """
    roles, bundles = zip(*lines(settings, trainers), strict=True)
    _connect(settings.address, sum(bundle["CPU"] for bundle in bundles))
    try:
        _check_room(bundles)
        group = ray().util.placement_group(list(bundles), strategy="PACK")
        if not group.wait(PLACED_WITHIN_SECONDS):
            raise InputError(
                f"the cluster had no room for {_shown(_total(bundles))} within {PLACED_WITHIN_SECONDS} s; `ray status` "
                "says who holds it. Wait for that, or ask for less in [cluster]."
            )
        yield Placed(group, bundles, roles)
    finally:
        ray().shutdown()


def _connect(address: str | None, cpus: float) -> None:
    """Join a cluster, or start one on this machine, which listens on loopback alone and wants a token.

    Its CPUs are as many as are asked for: processes may share the machine's cores, as they do without a cluster.
    """
    quiet = {"log_to_driver": False, "logging_level": "error"}
    if address is not None:
        try:
            _knock(address)
            ray().init(address=address, **quiet)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(
                f"cluster.address = {address!r}: no Ray cluster answers there ({str(error).splitlines()[0]}); start "
                "one by `ray start --head`, or leave the address out for a cluster on this machine."
            ) from error
        return
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Ray's own switch for keeping to the loopback address, named after the systems where that is its default.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    ray().init(address="local", num_cpus=max(int(cpus), os.cpu_count() or 1), include_dashboard=False, **quiet)


def _knock(address: str) -> None:
    """Raises OSError or ValueError where nobody listens at HOST:PORT; Ray itself would try for minutes."""
    if address != "auto":
        host, _, port = address.rpartition(":")
        socket.create_connection((host, int(port)), timeout=_KNOCK_SECONDS).close()


def _check_room(bundles: Sequence[Bundle]) -> None:
    """Raises InputError where the machines that are there could not hold the bundles even if they were idle."""
    nodes = [node["Resources"] for node in ray().nodes() if node["Alive"]]
    there, needed = _total(nodes), _total(bundles)
    held = all(needed[name] <= there.get(name, 0.0) for name in needed)
    if not held or not all(any(_fits(bundle, node) for node in nodes) for bundle in bundles):
        raise InputError(
            f"[cluster] asks for {_shown(needed)}, each process on one machine, and the cluster has "
            f"{'; '.join(_shown(node) for node in nodes)}; ask for less, or add machines."
        )


def _fits(bundle: Bundle, node: Mapping[str, float]) -> bool:
    return all(count <= node.get(name, 0.0) for name, count in bundle.items())


def _total(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(part.get(name, 0.0) for part in parts) for name in ("CPU", "GPU")}


def _shown(resources: Mapping[str, float]) -> str:
    return ", ".join(f"{resources.get(name, 0.0):g} {name}s" for name in ("CPU", "GPU"))
