"""Checkpoints of a run: saved in the background, whole or not at all, loaded under any layout.

PyTorch's distributed checkpoint holds weights and moments (float32) as boxes of global tensors, so
that any layout reads what it needs. A checkpoint is a folder ``step-00000100``; while it is written
it is called ``step-00000100.part``, and only the last rename makes it one.
"""

# torch annotates some functions only in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false
from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from meshwright.errors import DocumentError
from meshwright.runtime.boxes import rectangles
from meshwright.runtime.engine import Engine
from meshwright.runtime.flat_buffer import Piece

STATE = "state.json"
PART = ".part"
_COMPLETE = re.compile(r"^step-(\d+)$")


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A rectangle of a global tensor, and the local values."""

    name: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    values: Tensor

    @property
    def index(self) -> MetadataIndex:
        """How a checkpoint refers to it."""
        return MetadataIndex(self.name, torch.Size(self.offsets))

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Where it lies, in a checkpoint's words."""
        return ChunkStorageMetadata(
            offsets=torch.Size(self.offsets), sizes=torch.Size(self.values.shape)
        )


def shards_of(name: str, piece: Piece, flat: Tensor) -> list[Shard]:
    """Return the rectangles of the global tensor that a piece's flat values are; no padding."""
    box = piece.parameter.box
    found: list[Shard] = []
    for part, run in rectangles(tuple(piece.parameter.shape), piece.begin, piece.end):
        values = flat[run.start - piece.begin : run.stop - piece.begin]
        values = values.view([s.stop - s.start for s in part])
        offsets = tuple(o + s.start for o, s in zip(box.offsets, part, strict=True))
        inside = tuple(
            slice(0, max(0, min(n, whole - o)))
            for n, whole, o in zip(values.shape, box.shape, offsets, strict=True)
        )
        if all(s.stop for s in inside):
            found.append(Shard(name=name, shape=box.shape, offsets=offsets, values=values[inside]))
    return found


def engine_shards(engine: Engine, *, written: bool) -> list[Shard]:
    """Return what this rank holds of weights and moments.

    ``written``: of equal copies only the one that counts, so that each element is saved once.
    """
    found: list[Shard] = []
    for buffer in engine.dp.buffers:
        if written and buffer.replicate.index:
            continue
        for piece in buffer.pieces():
            if piece.parameter.box.counted or not written:
                found += shards_of(f"model.{piece.parameter.box.name}", piece, piece.master)
    for moments in engine.optimizer.moments:
        box, buffer = moments.piece.parameter.box, moments.piece.buffer
        if written and (buffer.replicate.index or not box.counted):
            continue
        for what in ("exp_avg", "exp_avg_sq"):
            values: Tensor = getattr(moments, what)
            found += shards_of(f"optimizer.{what}.{box.name}", moments.piece, values)
    return found


class _SavePlanner(DefaultSavePlanner):
    """Writes shards as they lie."""

    def __init__(self, shards: list[Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.values = {shard.index: shard.values for shard in shards}
        self.shards = shards

    def create_local_plan(self) -> SavePlan:
        """Return one item per shard."""
        items = [
            WriteItem(
                index=shard.index,
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=shard.chunk,
                    properties=TensorProperties.create_from_tensor(shard.values),
                    size=torch.Size(shard.shape),
                ),
            )
            for shard in self.shards
        ]
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """Return the values of an item."""
        return self.values[write_item.index]


class _LoadPlanner(DefaultLoadPlanner):
    """Reads into shards where they lie."""

    def __init__(self, shards: list[Shard]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.values = {shard.index: shard.values for shard in shards}
        self.by_name: dict[str, list[Shard]] = {}
        for shard in shards:
            self.by_name.setdefault(shard.name, []).append(shard)

    def create_local_plan(self) -> LoadPlan:
        """Return the reads whose boxes overlap ours."""
        assert self.metadata is not None
        items: list[ReadItem] = []
        for name, shards in self.by_name.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if not isinstance(saved, TensorStorageMetadata) or saved.size != torch.Size(
                shards[0].shape
            ):
                raise DocumentError(
                    "checkpoint",
                    name,
                    f"The checkpoint holds {getattr(saved, 'size', 'no such tensor')}, "
                    f"the model needs {shards[0].shape}.",
                    "Resume with the model that was trained.",
                )
            chunks = [shard.chunk for shard in shards]
            items += create_read_items_for_chunk_list(name, saved, chunks)
        return LoadPlan(items)

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return the part of ours that an item fills."""
        index = read_item.dest_index
        target = self.values[MetadataIndex(index.fqn, index.offset)]
        for dim, (start, length) in enumerate(
            zip(read_item.dest_offsets, read_item.lengths, strict=True)
        ):
            target = target.narrow(dim, start, length)
        return target

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Nothing is left to do: the read wrote into our storage."""


class Checkpointer:
    """Saves in a thread with a process group of its own; one save at a time."""

    def __init__(self, folder: Path, engine: Engine, *, keep: int = 0) -> None:
        self.folder, self.engine, self.keep = folder, engine, keep
        self.alone = _is_alone(engine)
        group = None if self.alone else dist.new_group(backend="gloo")
        assert not isinstance(group, int)
        self.group = group
        self.thread: threading.Thread | None = None
        self.failure: BaseException | None = None

    def path(self, step: int) -> Path:
        """Return the folder that the checkpoint of a step has when it is whole."""
        return self.folder / f"step-{step:08d}"

    def save(self, step: int, state: Mapping[str, Any]) -> Path:
        """Begin to save; returns once the values are copied. Waits for the save before it."""
        self.wait()
        shards = [
            Shard(
                name=shard.name,
                shape=shard.shape,
                offsets=shard.offsets,
                values=shard.values.detach().to("cpu", copy=True),
            )
            for shard in engine_shards(self.engine, written=True)
        ]
        self.thread = threading.Thread(target=self._write, args=(step, dict(state), shards))
        self.thread.start()
        return self.path(step)

    def wait(self) -> None:
        """Wait for the save under way. Raises ``DocumentError`` if it failed."""
        if self.thread is not None:
            self.thread.join()
            self.thread = None
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise DocumentError(
                "checkpoint",
                str(self.folder),
                f"It could not be written: {_reason(failure)}.",
                "Free space or name another folder; the checkpoints before it are whole.",
            ) from failure

    def _write(self, step: int, state: dict[str, Any], shards: list[Shard]) -> None:
        target = self.path(step)
        part = target.with_name(target.name + PART)
        first = self.engine.context.groups.rank == 0
        try:
            self._make(part)
            save(
                {},
                storage_writer=FileSystemWriter(part),
                planner=_SavePlanner(shards),
                process_group=self.group,
                no_dist=self.alone,
            )
            if first:
                _write_durably(part / STATE, json.dumps(state))
                shutil.rmtree(target, ignore_errors=True)
                os.replace(part, target)
                _sync(self.folder)
                self._prune()
        except BaseException as error:
            if first:
                shutil.rmtree(part, ignore_errors=True)
            self.failure = error

    def _make(self, part: Path) -> None:
        """Make the folder, and remove what broken saves left; every rank learns if it fails."""
        told = [""]
        if self.engine.context.groups.rank == 0:
            try:
                for left in self.folder.glob(f"step-*{PART}"):
                    shutil.rmtree(left, ignore_errors=True)
                part.mkdir(parents=True)
            except OSError as error:
                told = [f"rank 0: {error}"]
        if self.group is not None:
            dist.broadcast_object_list(told, src=0, group=self.group)
        if told[0]:
            raise OSError(told[0])

    def _prune(self) -> None:
        if self.keep:
            for old in complete_checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)


def _write_durably(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    _sync(path.parent)


def _sync(folder: Path) -> None:
    """Bring the names in a folder to the disk, so that a rename outlives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_alone(engine: Engine) -> bool:
    """Whether there are no peers; then PyTorch need not say that it assumes so."""
    alone = engine.context.groups.world.handle is None
    if alone:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    return alone


def _reason(failure: BaseException) -> str:
    inner = cast("Mapping[int, Any]", getattr(failure, "failures", None) or {})
    for rank, wrapped in inner.items():
        cause = wrapped[0] if isinstance(wrapped, tuple) else wrapped
        return f"rank {rank}: {_first_words(cause)}"
    return _first_words(failure)


def _first_words(cause: object) -> str:
    """Return what an error says before it explains itself; its kind if it says nothing."""
    lines = str(cause).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".") if lines else type(cause).__name__


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder that were finished, oldest first."""
    if not folder.is_dir():
        return []
    found = {int(m[1]): p for p in folder.iterdir() if (m := _COMPLETE.match(p.name))}
    return [found[step] for step in sorted(found) if (found[step] / STATE).is_file()]


def load_checkpoint(engine: Engine, path: Path) -> dict[str, Any]:
    """Load weights and moments into an engine of any layout; return the saved state.

    Raises ``DocumentError`` when the checkpoint is damaged or of another model.
    """
    try:
        state = _read_state(path)
        reader = FileSystemReader(path)
        # PyTorch would print a traceback before it raises.
        reader.read_metadata()
        load(
            {},
            storage_reader=reader,
            planner=_LoadPlanner(engine_shards(engine, written=False)),
            no_dist=_is_alone(engine),
        )
    except DocumentError:
        raise
    except (
        OSError,
        ValueError,
        RuntimeError,
        EOFError,
        AttributeError,
        LookupError,
        pickle.UnpicklingError,
        CheckpointException,
    ) as error:
        raise DocumentError(
            "checkpoint",
            str(path),
            f"It is damaged: {_reason(error)}.",
            "Remove this folder; the checkpoint before it will be used.",
        ) from None
    engine.optimizer.steps = state["optimizer_steps"]
    engine.dp.publish(frozen=True)
    return state


def _read_state(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of the run. Raises ``ValueError`` if it does not."""
    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    known = cast("dict[str, Any]", state if isinstance(state, dict) else {})
    for key in ("step", "samples", "optimizer_steps"):
        value = known.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ValueError(f"{STATE} has {key} = {value!r}, which is no count")
    return known
