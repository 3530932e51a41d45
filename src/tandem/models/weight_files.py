"""A model's weights as safetensors files that are written as the weights come, one in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

SHARD_BYTES = 5 * 2**30
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_weights(
    folder: Path, layout: Mapping[str, Tensor], weights: Iterable[tuple[str, Tensor]], shard_bytes: int = SHARD_BYTES
) -> None:
    """Write weights under the names by which transformers finds them: one file, or several with an index.

    `layout` has a tensor of each weight's shape and type (on the meta device, say), in the order in which they come. A
    file holds at most `shard_bytes`, or a single weight.
    """
    for stale in folder.glob("model*.safetensors*"):
        stale.unlink()
    shards, coming = list(_shards(layout, shard_bytes)), iter(weights)
    files = _file_names(len(shards))
    for file, shard in zip(files, shards, strict=True):
        with (folder / file).open("wb") as opened:
            opened.write(_header(shard))
            for expected in shard:
                name, tensor = next(coming)
                if name != expected:
                    raise RuntimeError(f"saving weights: {name} came in the place of {expected}")
                opened.write(_bytes(tensor.to(shard[name].dtype)))
                del tensor
    if len(shards) > 1:
        _write_index(folder, layout, dict(zip(files, shards, strict=True)))


def _shards(layout: Mapping[str, Tensor], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """The weights of each file."""
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in layout.items():
        if shard and size + tensor.nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _header(shard: Mapping[str, Tensor]) -> bytes:
    """What stands before the tensors' bytes: its own length, then names, types, shapes and places as JSON.

    Source: the format's description, https://github.com/huggingface/safetensors.
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in shard.items():
        end = start + tensor.nbytes
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _write_index(folder: Path, layout: Mapping[str, Tensor], shards: Mapping[str, Mapping[str, Tensor]]) -> None:
    index = {
        "metadata": {
            "total_parameters": sum(tensor.numel() for tensor in layout.values()),
            "total_size": sum(tensor.nbytes for tensor in layout.values()),
        },
        "weight_map": {name: file for file, shard in shards.items() for name in shard},
    }
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
