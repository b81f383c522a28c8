"""Datasets of text or tokens, read with Hugging Face ``datasets`` and kept as a corpus.

Every dataset is tokenized once into a corpus in Megatron-LM's format, in a folder named after all
that decides its content; training reads that. So packing, shuffling, resuming and blending are the
same for all data, and a second run starts at once.
"""

# datasets and tokenizers are optional and annotated in part.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false, reportMissingTypeStubs=false
# pyright: reportMissingImports=false
from __future__ import annotations

import glob
import hashlib
import importlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import numpy as np

from meshwright.errors import DocumentError, JobError, MeshwrightError
from meshwright.runtime.data import CorpusWriter
from meshwright.runtime.train_settings import DataSettings

HUB = "hf:"
BUILDERS = {
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".csv": "csv",
    ".txt": "text",
}
"""Endings of files, also before ``.gz`` or ``.zst``, and the reader of ``datasets`` for them."""
FORMAT = "1"
"""Counts up when the same dataset would be tokenized otherwise."""
FACTS = "corpus.json"
ROWS = 1000
"""Rows tokenized together."""
TOKENS = "input_ids"
"""The column of datasets that are tokenized already."""
MOST_UINT16 = 2**16

Encode = Callable[[list[Any]], list[list[int]]]


def is_dataset(source: str) -> bool:
    """Whether a source is read with ``datasets``."""
    path = Path(source)
    saved = path / "state.json", path / "dataset_dict.json"
    return source.startswith(HUB) or _builder(path) is not None or any(p.is_file() for p in saved)


def corpus_of(source: str, data: DataSettings) -> Path:
    """Return the path prefix of the corpus that a dataset becomes, whether it is there or not."""
    words = [FORMAT, source, data.column, _identity(data.tokenizer)]
    for file in [] if source.startswith(HUB) else _files(source):
        try:
            found = file.stat()
        except OSError as error:
            rule = f"{error.strerror}."
            raise DocumentError("data", str(file), rule, "Give another path.") from None
        words.append(f"{file.resolve()} {found.st_size} {found.st_mtime_ns}")
    name = hashlib.sha256("\n".join(words).encode()).hexdigest()[:20]
    return _cache(data) / name / "corpus"


def check_vocabulary(source: str, prefix: Path, vocab_size: int) -> None:
    """Raise ``DocumentError`` when a corpus made here holds words that the model does not have."""
    largest = json.loads(prefix.with_name(FACTS).read_text(encoding="utf-8"))["largest_token"]
    if largest >= vocab_size:
        raise DocumentError(
            "data",
            source,
            f"Tokenized, it holds token {largest}; the model has {vocab_size} words.",
            "Use the tokenizer of the model.",
        )


def write_corpora(data: DataSettings, sources: tuple[str, ...]) -> Iterator[str]:
    """Tokenize what of ``sources`` is not in the cache, telling now and then how far it is.

    Raises ``DocumentError`` for a dataset or tokenizer that cannot be read, and
    ``MeshwrightError`` where a package is missing.
    """
    for source in sources:
        target = corpus_of(source, data).parent
        if target.is_dir():
            continue
        part = target.with_name(f"{target.name}.part-{os.getpid()}")
        try:
            part.mkdir(parents=True)
            yield from _write(source, data, part / "corpus")
            if not target.is_dir():
                os.replace(part, target)
        except OSError as error:
            reason = error.strerror or str(error)
            rule = f"It could not be tokenized into {part}: {reason}."
            raise DocumentError("data", source, rule, "Free space or name another cache.") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)


def _write(source: str, data: DataSettings, prefix: Path) -> Iterator[str]:
    dataset = _load(source)
    encode, vocabulary, end = _encoder(dataset, source, data)
    column = data.column if vocabulary else TOKENS
    done, largest = 0, 0
    with CorpusWriter(prefix, "<u2" if 0 < vocabulary <= MOST_UINT16 else "<i4") as writer:
        for batch in dataset.iter(batch_size=ROWS):
            try:
                documents = encode(batch[column])
            except (TypeError, ValueError, OverflowError):
                raise DocumentError(
                    f"data.{column}",
                    source,
                    f"One of rows {done} to {done + len(batch[column]) - 1} is not "
                    f"{'a text' if vocabulary else 'a list of tokens'}.",
                    "Name another column.",
                ) from None
            for document in filter(None, documents):
                writer.append(document)
                largest = max(largest, *document)
            done += len(documents)
            yield f"{source}: {done} of {len(dataset)} documents tokenized"
    facts = {"source": source, "documents": len(writer.lengths), "largest_token": largest}
    prefix.with_name(FACTS).write_text(json.dumps(facts), encoding="utf-8")
    yield (
        f"{source}: {len(writer.lengths)} documents, {sum(writer.lengths)} tokens, "
        f"{f'each ended by token {end}' if end is not None else 'no token between them'}; "
        f"kept for other runs"
    )


def _load(source: str) -> Any:
    datasets = _package("datasets")
    datasets.disable_progress_bars()
    path = Path(source)
    try:
        if source.startswith(HUB):
            name, _, rest = source.removeprefix(HUB).partition(":")
            config, _, split = rest.partition(":")
            found = datasets.load_dataset(name, config or None, split=split or "train")
        elif path.is_dir():
            found = datasets.load_from_disk(str(path))
            found = found["train"] if isinstance(found, Mapping) else found
        elif path.suffix == ".arrow":
            found = datasets.Dataset.from_file(str(path))
        else:
            files = [str(file) for file in _files(source)]
            found = datasets.load_dataset(_builder(path), data_files=files, split="train")
    except Exception as error:  # Every reader of datasets has errors of its own.
        reason = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        remedy = "Give a file of json, parquet or arrow, a saved dataset, or hf:NAME:CONFIG:SPLIT."
        raise DocumentError("data", source, f"It cannot be read: {reason}.", remedy) from None
    return found


def _encoder(dataset: Any, source: str, data: DataSettings) -> tuple[Encode, int, int | None]:
    """Return how rows become tokens, the size of the vocabulary (0: unknown), the end token."""
    columns = cast("list[str]", dataset.column_names)
    if data.tokenizer is None and TOKENS in columns:
        return _as_tokens, 0, None
    if data.column not in columns:
        known = f"{source} has the columns {', '.join(columns)}."
        raise DocumentError("train.column", data.column, known, "Name one that holds text.")
    if data.tokenizer is None:
        rule = f"{source} holds text."
        remedy = "Give a tokenizer.json, its folder or the name of one."
        raise JobError("train.tokenizer", None, rule, remedy)
    tokenizer, end = load_tokenizer(data.tokenizer)
    last = [] if end is None else [end]

    def encode(texts: list[Any]) -> list[list[int]]:
        # A list of two texts would pass as a pair of sentences.
        if not all(isinstance(text, str) for text in texts):
            raise TypeError
        found = tokenizer.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids + last for encoding in found if encoding.ids]

    return encode, int(tokenizer.get_vocab_size()), end


def _as_tokens(rows: list[Any]) -> list[list[int]]:
    made = [np.asarray(row) for row in rows]
    if any(row.ndim != 1 or (row.size and row.dtype.kind not in "iu") for row in made):
        raise TypeError
    return [row.tolist() for row in made]


def load_tokenizer(text: str) -> tuple[Any, int | None]:
    """Return a tokenizer and the token that ends a document (none if it does not say).

    ``text`` is a ``tokenizer.json``, a folder that holds one, or the name of one on the hub; the
    end is ``eos_token`` of the ``tokenizer_config.json`` beside it, or a usual spelling of it.
    """
    kind = _package("tokenizers").Tokenizer
    file = _tokenizer_file(text)
    try:
        found = kind.from_pretrained(text) if file is None else kind.from_file(str(file))
    except Exception as error:  # tokenizers raises Exception itself.
        rule = f"It cannot be read: {' '.join(str(error).split())[:300]}."
        remedy = "Give a tokenizer.json, as save_pretrained of transformers writes it."
        raise DocumentError("train.tokenizer", text, rule, remedy) from None
    return found, next((t for w in _ends(file) if (t := found.token_to_id(w)) is not None), None)


def _ends(file: Path | None) -> list[str]:
    usual = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[EOS]"]
    beside = None if file is None else file.with_name("tokenizer_config.json")
    if beside is None or not beside.is_file():
        return usual
    try:
        told = json.loads(beside.read_text(encoding="utf-8")).get("eos_token")
    except (OSError, ValueError, AttributeError):
        raise DocumentError("train.tokenizer", str(beside), "It is not JSON.", "") from None
    word = told.get("content") if isinstance(told, dict) else told
    return [word] if isinstance(word, str) else usual


def _tokenizer_file(text: str) -> Path | None:
    path = Path(text)
    path = path / "tokenizer.json" if path.is_dir() else path
    if path.exists():
        return path
    if text.endswith(".json") or text.startswith((".", "/", "~")) or text.count("/") > 1:
        rule = "There is no such file."
        raise DocumentError("train.tokenizer", text, rule, "Give a tokenizer.json or its folder.")
    return None


def _files(source: str) -> list[Path]:
    """Return the files of a folder, a pattern with ``*`` or a path, in the order of their names."""
    path = Path(source)
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    if "*" not in source:
        return [path]
    found = sorted(Path(name) for name in glob.glob(source, recursive=True))
    if not found:
        raise DocumentError("data", source, "No file has such a name.", "Give another pattern.")
    return found


def _identity(tokenizer: str | None) -> str:
    file = None if tokenizer is None else _tokenizer_file(tokenizer)
    if file is None:
        return str(tokenizer)
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest() + " ".join(_ends(file))
    except OSError as error:
        rule = f"{error.strerror}."
        raise DocumentError("train.tokenizer", str(file), rule, "Give another path.") from None


def _builder(path: Path) -> str | None:
    stem = path.with_suffix("") if path.suffix in (".gz", ".zst") else path
    return BUILDERS.get(stem.suffix)


def _cache(data: DataSettings) -> Path:
    if data.cache is not None:
        return Path(data.cache)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "meshwright" / "data"


def _package(name: str) -> Any:
    if find_spec(name) is None:
        rule = "Reading datasets needs this package."
        raise MeshwrightError(name, None, rule, "pip install 'meshwright[data]'")
    return importlib.import_module(name)
