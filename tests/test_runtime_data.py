"""Samples: corpora, blends, what is held back, datasets of text. Provenance: ours."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshwright.errors import DocumentError, JobError, MeshwrightError
from meshwright.runtime.data import (
    CorpusWriter,
    MegatronSamples,
    MockSamples,
    Samples,
    Tokens,
    read_index,
)
from meshwright.runtime.data_sources import (
    BLOCK,
    Blend,
    check_data,
    open_samples,
    open_valid_samples,
)
from meshwright.runtime.data_text import corpus_of, write_corpora
from meshwright.runtime.train_settings import DataSettings


def write_corpus(prefix: Path, documents: list[np.ndarray], dtype: str = "<i4") -> None:
    with CorpusWriter(prefix, dtype) as writer:
        for document in documents:
            writer.append(document)


def _corpus(folder: Path, name: str = "corpus") -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 50, size=n).astype(np.int32) for n in (5, 1, 40, 17, 3)]
    write_corpus(folder / name, documents)
    return documents


def _open(data: DataSettings | str, seq_len: int = 5, vocab_size: int = 50) -> Samples:
    if isinstance(data, str):
        data = DataSettings(sources=(data,))
    return open_samples(data, seq_len=seq_len, vocab_size=vocab_size, seed=0)


def test_an_epoch_of_a_corpus_holds_each_token_as_often_as_it_should(tmp_path: Path) -> None:
    documents = _corpus(tmp_path)
    samples = MegatronSamples(prefix=tmp_path / "corpus", seq_len=5, vocab_size=50, seed=1)
    count = samples.samples_per_epoch
    assert count == (66 - 1) // 5
    for epoch in range(2):
        windows = [samples.sample(epoch * count + i) for i in range(count)]
        assert all(len(w) == 6 for w in windows)
        # Windows overlap by one: put in order, they are the shuffled corpus.
        following = {int(i): w for i, w in zip(samples._epoch(epoch)[2], windows, strict=True)}
        text = np.concatenate([following[i][:-1] for i in range(count)])
        order = samples._epoch(epoch)[0]
        laid = np.concatenate([documents[d] for d in order])
        assert np.array_equal(text, laid[: 5 * count])
    assert np.array_equal(samples.sample(3), samples.sample(3))


def test_lengths_and_pointers_of_an_index_are_read(tmp_path: Path) -> None:
    documents = _corpus(tmp_path)
    lengths, pointers, dtype = read_index(tmp_path / "corpus.idx")
    assert lengths.tolist() == [len(d) for d in documents]
    assert pointers.tolist() == [0, 20, 24, 184, 252]
    assert dtype == "<i4"


@pytest.mark.parametrize("keep", [0, 5, 20, 40, 60])
def test_a_cut_index_is_named(tmp_path: Path, keep: int) -> None:
    _corpus(tmp_path)
    path = tmp_path / "corpus.idx"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DocumentError, match=r"corpus\.idx"):
        _open(str(tmp_path / "corpus"))


def test_a_cut_corpus_foreign_tokens_and_too_little_text_are_told(tmp_path: Path) -> None:
    _corpus(tmp_path)
    prefix = str(tmp_path / "corpus")
    with pytest.raises(DocumentError, match="the model has 10 words"):
        _open(prefix, vocab_size=10)
    with pytest.raises(DocumentError, match="fewer than one sample"):
        _open(prefix, seq_len=100)
    path = tmp_path / "corpus.bin"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DocumentError, match=r"corpus\.bin"):
        _open(prefix)
    with pytest.raises(DocumentError, match="no such file"):
        _open("/nowhere/corpus")


def test_mock_samples_depend_on_their_number_alone() -> None:
    samples = MockSamples(seq_len=9, vocab_size=13, seed=3)
    first = samples.sample(7)
    assert np.array_equal(first, samples.sample(7))
    assert len(set((np.diff(first) % 13).tolist())) == 1
    assert not np.array_equal(first, samples.sample(8))


class _Numbers:
    """A source whose samples are their own numbers."""

    def __init__(self, source: int) -> None:
        self.source = source

    def sample(self, number: int) -> Tokens:
        return np.array([self.source, number])


@given(st.lists(st.floats(0.01, 10), min_size=2, max_size=6), st.integers(0, 10**9))
def test_a_blend_takes_every_source_in_order_and_by_its_weight(
    weights: list[float], start: int
) -> None:
    blend = Blend(sources=tuple(map(_Numbers, range(len(weights)))), weights=tuple(weights))
    drawn = [blend.sample(start + i).tolist() for i in range(BLOCK)]
    counts = Counter(source for source, _ in drawn)
    for source, weight in enumerate(weights):
        exact = BLOCK * weight / sum(weights)
        assert abs(counts[source] - exact) <= len(weights)
        # No sample is left out or taken twice, wherever the run begins.
        numbers = [number for s, number in drawn if s == source]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
        half = sum(s == source for s, _ in drawn[: BLOCK // 2])
        assert abs(half - counts[source] / 2) <= len(weights) + 1


def test_a_blend_of_corpora_is_opened_by_its_weights(tmp_path: Path) -> None:
    for name, word in (("a", 1), ("b", 2)):
        write_corpus(tmp_path / name, [np.full(60, word, dtype=np.int32)])
    blend = _open(DataSettings(sources=(f"3:{tmp_path / 'a'}", f"1:{tmp_path / 'b'}.bin")))
    words = [int(blend.sample(i)[0]) for i in range(100)]
    assert Counter(words) == {1: 75, 2: 25}
    assert words[:8].count(2) == 2


def test_what_is_held_back_is_not_trained_on(tmp_path: Path) -> None:
    write_corpus(tmp_path / "c", [np.full(30, n, dtype=np.int32) for n in range(10)])
    data = DataSettings(sources=(str(tmp_path / "c"),), valid_fraction=0.2)
    trained, valid = _open(data), open_valid_samples(data, seq_len=5, vocab_size=50, seed=0)
    assert {int(w) for i in range(200) for w in trained.sample(i)} == set(range(8))
    assert {int(w) for i in range(200) for w in valid.sample(i)} == {8, 9}


@pytest.mark.parametrize(
    ("data", "field"),
    [
        (DataSettings(sources=("0:mock", "1:mock")), "train.data"),
        (DataSettings(sources=("",)), "train.data"),
        (DataSettings(sources=()), "train.data"),
        (DataSettings(valid=("0.5: ",)), "train.valid_data"),
        (DataSettings(valid_fraction=1.0), "train.valid_fraction"),
        (DataSettings(valid=("mock",), valid_fraction=0.5), "train.valid_fraction"),
    ],
)
def test_sources_that_cannot_be_are_refused(data: DataSettings, field: str) -> None:
    with pytest.raises(JobError) as refused:
        check_data(data)
    assert refused.value.field == field


def test_validation_without_held_back_data_is_refused(tmp_path: Path) -> None:
    _corpus(tmp_path)
    data = DataSettings(sources=(str(tmp_path / "corpus"),))
    with pytest.raises(JobError, match="no data to validate on"):
        open_valid_samples(data, seq_len=5, vocab_size=50, seed=0)


WORDS = ["<|endoftext|>", "[UNK]", *"abcdefghij"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> str:
    """A tokenizer of single letters, as ``save_pretrained`` leaves it."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return str(folder)


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep every cache inside the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


TEXTS = ["a b c", "d e", "", "f g h i j"]
IDS = [[2, 3, 4, 0], [5, 6, 0], [7, 8, 9, 10, 11, 0]]


def _tokens_of(data: DataSettings) -> list[list[int]]:
    list(write_corpora(data, data.sources))
    prefix = corpus_of(data.sources[0], data)
    lengths, _, dtype = read_index(prefix.with_name("corpus.idx"))
    whole = np.fromfile(prefix.with_name("corpus.bin"), dtype=dtype)
    return [part.tolist() for part in np.split(whole, np.cumsum(lengths)[:-1])]


@pytest.mark.parametrize("form", ["jsonl", "parquet", "arrow", "saved", "txt", "shards"])
def test_text_of_every_form_becomes_the_same_tokens(
    form: str, tokenizer: str, caches: Path
) -> None:
    import datasets

    made = datasets.Dataset.from_dict({"text": TEXTS})
    path = caches / f"text.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    elif form == "parquet":
        made.to_parquet(path)
    elif form == "txt":
        path.write_text("\n".join(TEXTS) + "\n")
    elif form == "shards":
        for number, text in enumerate(TEXTS):
            (caches / f"{number}.json").write_text(json.dumps({"text": text}))
        path = caches / "[0-9]*.json"
    else:
        made.save_to_disk(caches / "saved")
        path = next((caches / "saved").glob("*.arrow")) if form == "arrow" else caches / "saved"
    data = DataSettings(sources=(str(path),), tokenizer=tokenizer)
    assert _tokens_of(data) == IDS
    samples = _open(data, vocab_size=12)
    assert len(samples.sample(0)) == 6


def test_tokens_are_taken_as_they_are_and_a_second_run_starts_at_once(caches: Path) -> None:
    path = caches / "tokens.jsonl"
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in IDS))
    data = DataSettings(sources=(str(path),))
    assert _tokens_of(data) == IDS
    assert list(write_corpora(data, data.sources)) == []
    path.write_text(json.dumps({"input_ids": [1, 2]}) + "\n")
    os.utime(path, ns=(1, 1))
    assert _tokens_of(data) == [[1, 2]]
    with pytest.raises(DocumentError, match="holds token 2; the model has 2 words"):
        _open(data, vocab_size=2)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tokenizer": None}, "train.tokenizer"),
        ({"column": "body"}, "has the columns text"),
        ({"tokenizer": "/nowhere/tokenizer.json"}, "There is no such file"),
        ({"sources": ("/nowhere/text.jsonl",)}, "No such file"),
        ({"sources": ("/nowhere/*.jsonl",)}, "No file has such a name"),
    ],
)
def test_what_is_missing_of_a_dataset_is_told(
    changes: dict[str, object], told: str, tokenizer: str, caches: Path
) -> None:
    path = caches / "text.jsonl"
    path.write_text(json.dumps({"text": "a"}) + "\n")
    given = {"sources": (str(path),), "tokenizer": tokenizer} | changes
    data = DataSettings(**given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(MeshwrightError, match=told):
        _tokens_of(data)


@pytest.mark.parametrize(
    "content", ['{"text": ["no", "text"]}\n', '{"text": "a"}\n{"text"', "", "\x00\x01"]
)
def test_a_damaged_dataset_is_told_and_leaves_nothing_behind(
    content: str, tokenizer: str, caches: Path
) -> None:
    path = caches / "text.jsonl"
    path.write_text(content)
    data = DataSettings(sources=(str(path),), tokenizer=tokenizer)
    with pytest.raises(DocumentError, match=r"text\.jsonl"):
        _tokens_of(data)
        _open(data)
    assert not list((caches / "cache").rglob("*.part*"))


def test_a_package_that_is_missing_is_named(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = caches / "text.jsonl"
    path.write_text('{"input_ids": [1]}\n')
    monkeypatch.setattr("meshwright.runtime.data_text.find_spec", lambda name: None)
    with pytest.raises(MeshwrightError, match=r"meshwright\[data\]"):
        _tokens_of(DataSettings(sources=(str(path),)))


def test_a_token_below_zero_is_the_one_that_is_told(tmp_path: Path) -> None:
    with CorpusWriter(tmp_path / "corpus") as writer:
        writer.append(np.array([1, -1, 2, 3, 4, 5, 6, 7], dtype=np.int32))
    data = DataSettings(sources=(str(tmp_path / "corpus"),))
    with pytest.raises(DocumentError, match="holds token -1; the model has 12 words"):
        _open(data, vocab_size=12).sample(0)
    (tmp_path / "corpus.bin").unlink()
    with pytest.raises(DocumentError, match="no such file") as told:
        _open(data, vocab_size=12).sample(0)
    assert told.value.remedy
