"""Which samples a run sees: sources, their weights, what is held back for validation.

A source is ``mock``, the path prefix of a ``.bin/.idx`` corpus, or a dataset of text or tokens
(``data_text``), which becomes such a corpus before the first step. ``0.3:SOURCE`` gives it a weight
among several.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from meshwright.errors import DocumentError, JobError
from meshwright.runtime.data import MegatronSamples, MockSamples, Samples, Tokens
from meshwright.runtime.data_text import check_vocabulary, corpus_of, is_dataset
from meshwright.runtime.train_settings import DataSettings

BLOCK = 4096
"""Samples after which a blend repeats; weights are rounded to one part of it."""

_WEIGHTED = re.compile(r"^(\d+\.?\d*|\.\d+):(.+)$", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Blend:
    """Samples of several sources, mixed evenly: of every block each source has its share.

    Source k has q_k of ``BLOCK`` samples, the nearest to its weight and at least one; its j-th
    stands at (j + 1/2) / q_k of the block. So what a number means needs no counting, and a run
    resumes anywhere.
    """

    sources: tuple[Samples, ...]
    weights: tuple[float, ...]

    @cached_property
    def _block(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Return the shares, and for each place of a block its source and number there."""
        shares = _shares(self.weights)
        source = np.repeat(np.arange(len(shares)), shares)
        number = np.arange(BLOCK) - np.repeat(np.cumsum(shares) - shares, shares)
        order = np.argsort((number + 0.5) / shares[source], kind="stable")
        return shares, source[order].astype(np.int64), number[order].astype(np.int64)

    def sample(self, number: int) -> Tokens:
        """Return the tokens of a sample."""
        shares, source, within = self._block
        block, place = divmod(number, BLOCK)
        chosen = int(source[place])
        return self.sources[chosen].sample(block * int(shares[chosen]) + int(within[place]))


def _shares(weights: Sequence[float]) -> NDArray[np.int64]:
    """Return whole numbers that add up to ``BLOCK``, as near to the weights as can be."""
    exact = np.array(weights) / sum(weights) * BLOCK
    shares = np.maximum(1, np.floor(exact)).astype(np.int64)
    while (gap := BLOCK - int(shares.sum())) != 0:
        far = exact - shares
        at = int(np.argmax(far)) if gap > 0 else int(np.argmin(np.where(shares > 1, far, np.inf)))
        shares[at] += 1 if gap > 0 else -1
    return shares


def split_weight(source: str) -> tuple[float, str]:
    """Return the weight of a source (1 where none is written) and the rest of its text."""
    found = _WEIGHTED.match(source)
    return (float(found[1]), found[2]) if found else (1.0, source)


def check_data(data: DataSettings) -> None:
    """Raise ``JobError`` for sources, weights or parts that cannot be."""
    for name, sources in (("data", data.sources), ("valid_data", data.valid)):
        for source in sources:
            weight, text = split_weight(source)
            if not text.strip() or weight <= 0 or not math.isfinite(weight):
                rule = "A source is mock, a path or hf:NAME, with a weight above 0 before it."
                raise JobError(f"train.{name}", source, rule, "Write 0.3:corpus/web.")
    if not data.sources or len(data.sources) > BLOCK // 2:
        rule = f"A run has from 1 to {BLOCK // 2} sources."
        raise JobError("train.data", len(data.sources), rule, "Give --data.")
    if not 0 <= data.valid_fraction < 1:
        rule = "It is a part of the training documents, from 0 to 1."
        raise JobError("train.valid_fraction", data.valid_fraction, rule, "Use 0.01.")
    if data.valid and data.valid_fraction:
        raise JobError(
            "train.valid_fraction",
            data.valid_fraction,
            "Documents are held back where there is no other data to validate on.",
            "Give either valid data or a fraction.",
        )


def open_samples(data: DataSettings, *, seq_len: int, vocab_size: int, seed: int) -> Samples:
    """Return the samples to train on.

    Raises ``DocumentError`` when a source is missing, damaged, too short or of another tokenizer.
    """
    part = (0.0, 1.0 - data.valid_fraction)
    return _blend(data, data.sources, part, seq_len, vocab_size, seed)


def open_valid_samples(data: DataSettings, *, seq_len: int, vocab_size: int, seed: int) -> Samples:
    """Return the samples to validate on: always the same, whatever was trained on.

    Raises what ``open_samples`` raises, and ``JobError`` where nothing is held back.
    """
    sources, part = data.valid or data.sources, (0.0, 1.0)
    if not data.valid:
        if not data.valid_fraction and any(split_weight(s)[1] != "mock" for s in sources):
            rule = "There is no data to validate on."
            raise JobError("train.valid_every", "", rule, "Give valid data or a fraction.")
        part = (1.0 - data.valid_fraction, 1.0)
    # Mock data has no documents to hold back; another seed draws other sequences.
    return _blend(data, sources, part, seq_len, vocab_size, seed + 1)


def _blend(
    data: DataSettings,
    sources: tuple[str, ...],
    part: tuple[float, float],
    seq_len: int,
    vocab_size: int,
    seed: int,
) -> Samples:
    opened: list[Samples] = []
    for number, (_, text) in enumerate(map(split_weight, sources)):
        if text == "mock":
            opened.append(MockSamples(seq_len=seq_len, vocab_size=vocab_size, seed=seed + number))
            continue
        if is_dataset(text):
            prefix = corpus_of(text, data)
            check_vocabulary(text, prefix, vocab_size)
        else:
            prefix = _prefix(text)
        corpus = MegatronSamples(
            prefix=prefix, seq_len=seq_len, vocab_size=vocab_size, seed=seed, part=part, name=text
        )
        corpus.sample(0)
        opened.append(corpus)
    weights = tuple(split_weight(source)[0] for source in sources)
    return opened[0] if len(opened) == 1 else Blend(sources=tuple(opened), weights=weights)


def _prefix(text: str) -> Path:
    path = Path(text)
    if path.suffix in (".bin", ".idx"):
        path = path.with_suffix("")
    if path.is_dir():
        raise DocumentError(
            "data",
            text,
            "The folder holds no dataset that save_to_disk wrote.",
            "Give the path of a corpus without .bin or .idx, or a file of json, parquet or arrow.",
        )
    return path
