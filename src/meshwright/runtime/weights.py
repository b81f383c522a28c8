"""Hugging Face checkpoints: ``config.json`` and safetensors, read and written under any layout.

A rank reads only its own boxes of each tensor; ``checkpoint_names`` says where they lie.
Refs: safetensors format; file naming of ``transformers`` (model.safetensors.index.json).
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportUnknownLambdaType=false
from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from meshwright.errors import DocumentError
from meshwright.runtime.boxes import rectangles
from meshwright.runtime.checkpoint_names import Stored, stored
from meshwright.runtime.collectives import receive, send
from meshwright.runtime.engine import Engine
from meshwright.runtime.parameters import Box, ShardedParameter
from meshwright.runtime.read_shape import text_part
from meshwright.runtime.shape import ModelShape

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MOST_FILE_BYTES = 5 * 10**9
"""A file of written weights is closed at this size, as ``transformers`` does."""
_QUANTISED = ("_scale_inv", "_blocks", "_scale", "_packed")
"""What stands behind a name where the tensor is in 8 or 4 bit: FP8 by blocks, MXFP4 and others."""

_WHOLE_NUMBERS = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")
"""Dtypes, in the words of safetensors, that weights have only when they are quantised."""


class Checkpoint:
    """The tensors of a folder of safetensors, opened when first read.

    Of a multimodal checkpoint the text decoder's, under the names that they have alone.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, Any] = {}
        self.file_of = self._index()
        self.name_of = {_text_name(name): name for name in self.file_of}

    def _index(self) -> Mapping[str, str]:
        index, single = self.folder / INDEX, self.folder / SINGLE
        if index.is_file():
            try:
                found = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
                if not all(isinstance(x, str) for pair in found.items() for x in pair):
                    raise TypeError
            except (OSError, ValueError, KeyError, TypeError):
                raise DocumentError(
                    "weights", str(index), "It is not an index of safetensors.", "Copy it again."
                ) from None
            return cast("Mapping[str, str]", found)
        if single.is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        raise DocumentError(
            "weights",
            str(self.folder),
            f"The folder holds neither {SINGLE} nor {INDEX}.",
            "Give the folder of a Hugging Face checkpoint in safetensors format.",
        )

    def _open(self, name: str) -> Any:
        if name not in self.files:
            try:
                self.files[name] = safe_open(self.folder / name, framework="pt")
            except (OSError, SafetensorError) as error:
                raise DocumentError(
                    "weights",
                    str(self.folder / name),
                    f"It cannot be read: {error}.",
                    "Copy the file again.",
                ) from None
        return self.files[name]

    def read(self, place: Stored, part: tuple[slice, ...]) -> Tensor:
        """Return a part of a matrix (or vector) of ours."""
        name = self._found(place.name)
        file = self.file_of[name]
        try:
            found = self._open(file).get_slice(name)
        except SafetensorError:
            rule = f"The index says that {file} holds it, which it does not."
            raise DocumentError("weights", name, rule, "Copy both again.") from None
        if found.get_dtype() in _WHOLE_NUMBERS:
            raise _quantised(name)
        if tuple(found.get_shape()) != place.shape:
            raise DocumentError(
                "weights",
                name,
                f"Its shape is {tuple(found.get_shape())}, the config says {place.shape}.",
                "Give the config.json that belongs to the weights.",
            )
        where = place.place(part)
        # Slices of safetensors have no steps.
        near = cast("Tensor", found[tuple(slice(w.start, w.stop) for w in where)])
        return place.ours(near[tuple(slice(None, None, w.step) for w in where)])

    def _found(self, name: str) -> str:
        """Return what the checkpoint calls a tensor."""
        if any(f"{name}{mark}" in self.name_of for mark in _QUANTISED):
            raise _quantised(name)
        if name in self.name_of:
            return self.name_of[name]
        raise DocumentError(
            "weights",
            name,
            "The checkpoint does not hold it.",
            "Set num_nextn_predict_layers to 0 in the config."
            if "eh_proj" in name or "enorm" in name
            else "Give the config.json that belongs to the weights.",
        )


def _quantised(name: str) -> DocumentError:
    return DocumentError(
        "weights",
        name,
        "Its values are quantised and stored beside their scales.",
        "Save it in bfloat16 with transformers (dequantize=True) and read that.",
    )


def _text_name(name: str) -> str:
    name = name.removeprefix("language_model.")
    return name.replace("model.language_model.", "model.", 1)


def load_weights(engine: Engine, folder: Path) -> None:
    """Replace every parameter by that of a Hugging Face checkpoint.

    Raises ``DocumentError`` naming the file or tensor that is missing, damaged or of other shape.
    """
    checkpoint = Checkpoint(folder)

    def values(member: ShardedParameter) -> Tensor:
        box = member.box
        out = torch.zeros(tuple(member.shape), dtype=member.dtype)
        places = stored(box, engine.shape)
        if box.expert:
            for row in range(member.shape[0]):
                part = _part(box.offsets[1:], box.shape[1:], tuple(member.shape[1:]))
                place = places[box.offsets[0] + row]
                out[row] = checkpoint.read(place, part).to(member.dtype)
            return out
        part = _part(box.offsets, box.shape, tuple(member.shape))
        found = checkpoint.read(places[0], part).to(member.dtype)
        out[tuple(slice(0, n) for n in found.shape)] = found
        return out

    for buffer in engine.dp.buffers:
        if not buffer.box.adapter:
            buffer.fill(values)


def _part(
    offsets: tuple[int, ...], shape: tuple[int, ...], local: tuple[int, ...]
) -> tuple[slice, ...]:
    return tuple(
        slice(min(o, whole), min(o + n, whole))
        for o, whole, n in zip(offsets, shape, local, strict=True)
    )


@dataclass(frozen=True, kw_only=True)
class _Held:
    """Where a piece that a rank holds lies."""

    box: Box
    local_shape: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int
    rank: int


def save_weights(engine: Engine, folder: Path, config: Mapping[str, Any]) -> None:
    """Write ``config.json`` and safetensors, in the dtype that each is held in; rank 0 writes.

    Low-rank changes are added to the weights that they belong to. Tensors travel to rank 0 one by
    one. Files appear under their names when complete.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = {
        (piece.parameter.box.name, piece.parameter.box.offsets, piece.begin): piece
        for piece in engine.dp.pieces(frozen=True)
    }
    plan = _plan(engine)
    writer = _Writer(folder) if engine.context.groups.rank == 0 else None
    for name in sorted(plan):
        whole: Tensor | None = None
        for held in plan[name]:
            key = (name, held.box.offsets, held.begin)
            mine = own[key].master if held.rank == engine.context.groups.rank else None
            found = _bring(held, mine, engine)
            if writer is not None and found is not None:
                if whole is None:
                    whole = torch.zeros(held.box.shape, dtype=held.dtype)
                _place(whole, held, found)
        if writer is not None and whole is not None:
            _write(writer, plan[name][0].box, whole, engine.shape)
    if writer is not None:
        writer.close(dict(text_part(config)))
    if engine.context.groups.world.handle is not None:
        dist.barrier()


def _write(writer: _Writer, box: Box, whole: Tensor, shape: ModelShape) -> None:
    if box.adapter:
        writer.adapters[box.name] = whole
        return
    stem = box.name.removesuffix(".weight")
    # Sorted by name, a layer's adapters come before its weight.
    a = writer.adapters.pop(f"{stem}.lora_A.weight", None)
    b = writer.adapters.pop(f"{stem}.lora_B.weight", None)
    if a is not None and b is not None:
        change = b.float() @ a.float() * (shape.lora_alpha / shape.lora_rank)
        whole = (whole.float() + change).to(whole.dtype)
    parts = whole.unbind(0) if box.expert else (whole,)
    for place, part in zip(stored(box, shape), parts, strict=True):
        writer.put(place, part)


def _plan(engine: Engine) -> dict[str, list[_Held]]:
    """Return, per parameter, which rank gives which piece; the lowest of those that hold it."""
    groups = engine.context.groups
    own = [
        _Held(
            box=piece.parameter.box,
            local_shape=tuple(piece.parameter.shape),
            dtype=piece.parameter.dtype,
            begin=piece.begin,
            end=piece.end,
            rank=groups.rank,
        )
        for piece in engine.dp.pieces(frozen=True)
    ]
    everyone: list[Any] = [own]
    if groups.world.handle is not None:
        everyone = [None] * groups.world.size
        dist.all_gather_object(everyone, own)
    plan: dict[str, dict[tuple[object, ...], _Held]] = {}
    for held in (piece for pieces in everyone for piece in cast("list[_Held]", pieces)):
        plan.setdefault(held.box.name, {}).setdefault((held.box.offsets, held.begin), held)
    return {name: list(pieces.values()) for name, pieces in plan.items()}


def _bring(held: _Held, mine: Tensor | None, engine: Engine) -> Tensor | None:
    """Return the piece on rank 0, sending it there if another rank holds it."""
    rank = engine.context.groups.rank
    if held.rank == 0:
        return mine
    if rank == held.rank and mine is not None:
        send(mine, 0)
    elif rank == 0:
        wide = torch.float64 if engine.settings.dtype == torch.float64 else torch.float32
        found = torch.empty(held.end - held.begin, dtype=wide, device=engine.settings.device)
        return receive(found, held.rank)
    return None


def _place(whole: Tensor, held: _Held, values: Tensor) -> None:
    for box_part, flat_part in rectangles(held.local_shape, held.begin, held.end):
        target = tuple(
            slice(o + s.start, min(o + s.stop, n))
            for o, s, n in zip(held.box.offsets, box_part, whole.shape, strict=True)
        )
        source = values[flat_part.start - held.begin : flat_part.stop - held.begin]
        source = source.view([s.stop - s.start for s in box_part])
        kept = tuple(slice(0, max(0, t.stop - t.start)) for t in target)
        if all(k.stop for k in kept):
            whole[target] = source[kept].to(whole.dtype)


@dataclass
class _Writer:
    """Collects tensors into files of bounded size."""

    folder: Path
    pending: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    pending_bytes: int = 0
    adapters: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    fused: dict[str, tuple[Tensor, int]] = field(default_factory=dict[str, tuple[Tensor, int]])
    written: list[list[str]] = field(default_factory=list[list[str]])
    total_bytes: int = 0

    def put(self, place: Stored, part: Tensor) -> None:
        """Take a matrix (or vector) of ours; tensors of several are complete with the last."""
        if part.shape == place.shape:
            self.add(place.name, part)
            return
        fresh = (part.new_zeros(place.shape), math.prod(place.shape))
        tensor, missing = self.fused.pop(place.name, fresh)
        where = place.place(tuple(slice(0, n) for n in part.shape))
        place.ours(tensor[where]).copy_(part)
        missing -= part.numel()
        if missing:
            self.fused[place.name] = (tensor, missing)
        else:
            self.add(place.name, tensor)

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor; write a file when enough is there."""
        size = tensor.numel() * tensor.element_size()
        if self.pending and self.pending_bytes + size > MOST_FILE_BYTES:
            self._flush()
        self.pending[name] = tensor.contiguous()
        self.pending_bytes += size
        self.total_bytes += size

    def _flush(self) -> None:
        number = len(self.written) + 1
        path = self.folder / f"model-{number:05d}.part"
        save_file(self.pending, path, metadata={"format": "pt"})
        self.written.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def close(self, config: dict[str, Any]) -> None:
        """Write what is left, the index and the config, then give the files their names."""
        if self.pending:
            self._flush()
        count = len(self.written)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        if count == 1:
            names = [SINGLE]
        # Of an earlier checkpoint here; readers differ in which of the two they look for first.
        (self.folder / (INDEX if count == 1 else SINGLE)).unlink(missing_ok=True)
        for number, name in enumerate(names, start=1):
            os.replace(self.folder / f"model-{number:05d}.part", self.folder / name)
        if count > 1:
            weight_map = {
                tensor: name
                for tensors, name in zip(self.written, names, strict=True)
                for tensor in tensors
            }
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
            write_json(self.folder / INDEX, index)
        write_json(self.folder / "config.json", config)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)
