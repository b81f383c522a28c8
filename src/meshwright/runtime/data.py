"""Training samples by number: the same sample for the same number under every layout.

A sample is ``seq_len + 1`` tokens. Which numbers make a step depends on the samples seen before
it alone, so a run resumes exactly and may change its layout.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import IO, Protocol

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import DocumentError

Tokens = NDArray[np.int64]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, number of sequences, number of document boundaries."""
DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
"""The codes of Megatron-LM's ``indexed_dataset.DType``."""


class Samples(Protocol):
    """A source of samples."""

    def sample(self, number: int) -> Tokens:
        """Return the tokens of a sample."""
        ...


@dataclass(frozen=True, kw_only=True)
class MockSamples:
    """Arithmetic progressions modulo the vocabulary: nothing to read, and yet learnable."""

    seq_len: int
    vocab_size: int
    seed: int

    def sample(self, number: int) -> Tokens:
        """Return ``(start + step * i) mod V`` with start and step drawn from the number."""
        rng = np.random.default_rng((self.seed, number))
        start = int(rng.integers(self.vocab_size))
        step = int(rng.integers(1, min(8, self.vocab_size) + 1))
        return (start + step * np.arange(self.seq_len + 1, dtype=np.int64)) % self.vocab_size


@dataclass(frozen=True, kw_only=True)
class MegatronSamples:
    """Samples of a tokenized corpus in Megatron-LM's ``.bin`` / ``.idx`` format, memory-mapped.

    Each epoch shuffles the documents, lays them end to end and cuts windows of ``seq_len + 1``
    tokens that overlap by one; the windows are shuffled too. ``part`` is the range of the corpus,
    from 0 to 1, whose documents are used. ``name`` is what errors call it, else its path.
    """

    prefix: Path
    seq_len: int
    vocab_size: int
    seed: int
    part: tuple[float, float] = (0.0, 1.0)
    name: str = ""

    @cached_property
    def _index(self) -> tuple[NDArray[np.int32], NDArray[np.int64], str]:
        lengths, pointers, dtype = read_index(self.prefix.with_name(self.prefix.name + ".idx"))
        here = slice(*(round(end * len(lengths)) for end in self.part))
        return lengths[here], pointers[here], dtype

    @cached_property
    def _tokens(self) -> NDArray[np.generic]:
        path = self.prefix.with_name(self.prefix.name + ".bin")
        lengths, pointers, dtype = self._index
        item = np.dtype(dtype).itemsize
        needed = int((pointers + lengths.astype(np.int64) * item).max(initial=0))
        try:
            size = path.stat().st_size
        except OSError:
            remedy = "Copy it again: .bin and .idx belong together."
            raise DocumentError("data", str(path), "There is no such file.", remedy) from None
        if size < needed or size % item:
            raise DocumentError(
                "data",
                str(path),
                f"It has {size} bytes; its index needs {needed}.",
                "Copy it again: .bin and .idx belong together.",
            )
        return np.memmap(path, dtype=dtype, mode="r")

    @cached_property
    def samples_per_epoch(self) -> int:
        """Windows in one pass over the corpus."""
        total = int(self._index[0].sum(dtype=np.int64))
        count = (total - 1) // self.seq_len
        if count < 1:
            raise DocumentError(
                "data",
                self.name or str(self.prefix),
                f"{_of_part(self.part)} has {total} tokens, fewer than one sample of "
                f"{self.seq_len + 1}.",
                "Use a shorter seq_len or more data.",
            )
        return count

    def sample(self, number: int) -> Tokens:
        """Return a window of the epoch that the number falls into."""
        epoch, place = divmod(number, self.samples_per_epoch)
        order, starts, windows = self._epoch(epoch)
        begin = int(windows[place]) * self.seq_len
        found = self._read(order, starts, begin, begin + self.seq_len + 1)
        low, high = int(found.min()), int(found.max())
        if high >= self.vocab_size or low < 0:
            wrong = low if low < 0 else high
            raise DocumentError(
                "data",
                self.name or str(self.prefix),
                f"It holds token {wrong}; the model has {self.vocab_size} words.",
                "Use the tokenizer of the model.",
            )
        return found

    def _epoch(self, epoch: int) -> tuple[NDArray[np.int64], Tokens, NDArray[np.int64]]:
        """Return the order of documents, where each begins in the epoch, the order of windows."""
        held = self.__dict__.setdefault("_epochs", {})
        if epoch not in held:
            rng = np.random.default_rng((self.seed, epoch))
            lengths = self._index[0]
            order = rng.permutation(len(lengths)).astype(np.int64)
            ends = np.cumsum(lengths[order], dtype=np.int64)
            starts = np.concatenate([np.zeros(1, dtype=np.int64), ends])
            held.clear()
            held[epoch] = order, starts, rng.permutation(self.samples_per_epoch)
        return held[epoch]

    def _read(self, order: NDArray[np.int64], starts: Tokens, begin: int, end: int) -> Tokens:
        _, pointers, dtype = self._index
        item = np.dtype(dtype).itemsize
        parts: list[Tokens] = []
        at = int(np.searchsorted(starts, begin, side="right")) - 1
        while begin < end:
            stop = min(end, int(starts[at + 1]))
            first = int(pointers[order[at]]) // item + begin - int(starts[at])
            parts.append(self._tokens[first : first + stop - begin].astype(np.int64))
            begin, at = stop, at + 1
        return np.concatenate(parts)


def read_index(path: Path) -> tuple[NDArray[np.int32], NDArray[np.int64], str]:
    """Return lengths (tokens), pointers (bytes into ``.bin``) and dtype of an ``.idx`` file.

    Raises ``DocumentError`` when the file is missing, cut off or something else.
    """
    try:
        raw = path.read_bytes()
    except OSError:
        raise DocumentError(
            "data", str(path), "There is no such file.", "Give the path without .bin or .idx."
        ) from None
    remedy = "Write the corpus again with Megatron-LM's preprocess_data.py."
    if len(raw) < HEADER.size or not raw.startswith(MAGIC):
        raise DocumentError("data", str(path), "It is not a Megatron-LM index.", remedy)
    _, version, code, sequences, documents = HEADER.unpack_from(raw)
    if version != 1 or code not in DTYPES or DTYPES[code][-2] == "f":
        rule = f"Version {version}, dtype code {code}: version 1 with integer tokens is read."
        raise DocumentError("data", str(path), rule, remedy)
    needed = HEADER.size + 12 * sequences + 8 * documents
    if len(raw) < needed:
        rule = f"It has {len(raw)} bytes of at least {needed}: it is cut off."
        raise DocumentError("data", str(path), rule, "Copy it again.")
    lengths = np.frombuffer(raw, dtype="<i4", count=sequences, offset=HEADER.size)
    pointers = np.frombuffer(raw, dtype="<i8", count=sequences, offset=HEADER.size + 4 * sequences)
    if sequences and (lengths.min() < 0 or pointers.min() < 0):
        raise DocumentError("data", str(path), "It holds negative sizes.", remedy)
    return lengths, pointers, DTYPES[code]


def _of_part(part: tuple[float, float]) -> str:
    return "It" if part == (0.0, 1.0) else f"The part from {part[0]:g} to {part[1]:g} of it"


class CorpusWriter:
    """Writes tokenized documents, one after another, as a corpus that Megatron-LM reads too.

    ``<u2`` tokens are for vocabularies up to 65,536, ``<i4`` for all.
    """

    def __init__(self, prefix: Path, dtype: str = "<i4") -> None:
        self.prefix, self.dtype = prefix, np.dtype(dtype)
        self.code = next(code for code, name in DTYPES.items() if name == dtype)
        self.lengths: list[int] = []
        self.file: IO[bytes] = prefix.with_name(prefix.name + ".bin").open("wb")

    def __enter__(self) -> CorpusWriter:
        return self

    def append(self, document: NDArray[np.int32] | list[int]) -> None:
        """Write a document."""
        self.file.write(np.asarray(document, dtype=self.dtype).tobytes())
        self.lengths.append(len(document))

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.file.close()
        if kind is not None:
            return
        lengths = np.array(self.lengths, dtype="<i4")
        ends = np.cumsum(lengths.astype("<i8") * self.dtype.itemsize)
        pointers = (ends - lengths.astype("<i8") * self.dtype.itemsize).astype("<i8")
        count = len(lengths)
        self.prefix.with_name(self.prefix.name + ".idx").write_bytes(
            HEADER.pack(MAGIC, 1, self.code, count, count + 1)
            + lengths.tobytes()
            + pointers.tobytes()
            + np.arange(count + 1, dtype="<i8").tobytes()
        )
