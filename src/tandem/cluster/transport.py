"""Weights through the object store: put there once in buckets, fetched by every process that is behind."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor

from tandem.cluster.library import ray, signals_held

_BUCKET_BYTES = 2**26


@dataclass(frozen=True)
class Packed:
    """A tensor as bytes, which the object store shares without a copy."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    content: Any


@dataclass(frozen=True)
class Sent:
    """Weights as references to buckets of packed tensors; each sending has a number of its own."""

    number: int
    buckets: Sequence[Any]


def send(weights: Iterable[tuple[str, Tensor]], number: int) -> Sent:
    """Put weights into the object store; of a model that is larger than memory allows twice, a bucket at a time."""
    references = []
    for bucket in buckets(weights):
        with signals_held():
            references.append(ray().put(bucket))
    return Sent(number, references)


def buckets(weights: Iterable[tuple[str, Tensor]]) -> Iterator[list[Packed]]:
    """Weights packed together up to some 64 MiB, as they come."""
    bucket: list[Packed] = []
    size = 0
    for name, tensor in weights:
        flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy()
        bucket.append(Packed(name, tensor.dtype, tuple(tensor.shape), flat))
        size += flat.nbytes
        if size >= _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


def receive(sent: Sent) -> Iterator[tuple[str, Tensor]]:
    """The weights one by one, each good until the next."""
    for reference in sent.buckets:
        for packed in ray().get(reference):
            content = torch.from_numpy(numpy.array(packed.content))
            yield packed.name, content.view(packed.dtype).reshape(packed.shape)
