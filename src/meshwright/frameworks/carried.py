"""What a launch says besides its plan: data, tokenizer, checkpoints, optimizer, logging, the rest.

Megatron-LM's argument names are the vocabulary. A writer's ``TRAINING`` maps those that its
framework has a counterpart for to the place where they are written; read the other way round it
says what a launch of that framework means. What has no counterpart is listed, never dropped.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final

from meshwright.errors import MeshwrightError
from meshwright.frameworks.launch import TITLES, Launch
from meshwright.frameworks.shell_words import Word
from meshwright.frameworks.words import job_of, layout_of
from meshwright.frameworks.words_model import model_of

Values = tuple[str, ...]
"""The values of one setting as text; a switch is ``true`` or ``false``."""

_FLAG: Final = re.compile(r"--[A-Za-z][\w.\-]*")
_PATH: Final = re.compile(r"[+~]{0,2}([A-Za-z_][\w]*(?:[./@][\w-]+)*)=(.*)", re.DOTALL)
_PROGRAM: Final = frozenset(
    {
        *("--recipe", "--recipe_name", "--factory", "--module", "--config", "--config-name"),
        *("--config-path", "--config_name", "--job.config_file", "recipe", "finetune"),
    }
)
"""Arguments that choose the program's own configuration: they name the model and the task."""

_INDEXED: Final = "tokens that Megatron's preprocess_data.py wrote (.bin and .idx)"
DATA: Final = {
    "megatron-lm": _INDEXED,
    "megatron-bridge": _INDEXED,
    "nemo": _INDEXED,
    "skyrl": "conversations of a Hugging Face dataset",
    "verl": "prompts in parquet files",
    "torchtitan": "text of a Hugging Face dataset, named in its Python configuration",
}
"""What each framework trains on."""

DATA_WORDS: Final = frozenset(
    {
        *("data_path", "train_data_path", "valid_data_path", "test_data_path", "split"),
        *("data_args_path", "per_split_data_args_path", "data_cache_path", "train_files"),
        *("val_files", "dataset_name", "dataset_path"),
    }
)
CHECKPOINT_WORDS: Final = frozenset({"load", "pretrained_checkpoint", "ckpt_step", "ckpt_format"})
MEGATRON_CHECKPOINTS: Final = frozenset({"megatron-lm", "megatron-bridge"})
"""Frameworks that read each other's distributed checkpoints."""


MODEL_WORDS: Final = frozenset(
    {
        *("rotary_base", "rotary_percent", "use_rope_scaling", "rope_scaling_factor", "rope_type"),
        *("layernorm_epsilon", "rotary_scaling_factor", "rotary_interleaved", "no_rope_freq"),
        *("use_rotary_position_embeddings", "mscale"),
        *("mscale_all_dim", "moe_router_topk_scaling_factor", "moe_router_num_groups"),
        *("moe_router_group_topk", "moe_router_score_function", "squared_relu"),
        *("attention_dropout", "init_method_std", "tokenizer_type", "tokenizer_model"),
    }
)
"""Facts of a model that its Hugging Face configuration states."""


@dataclass(frozen=True)
class Place:
    """What a flag or path is called, what it says alone, and how many values may follow it."""

    name: str
    bare: str = "true"
    most: int = 1


PLAN: Final = Place("plan")
"""Where a launch says its plan: sizes of the world, the strategy."""


class Unexpanded(str):
    """Text with variables in it that the shell has yet to replace."""

    __slots__ = ()


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of a program: a flag or a path, and its values."""

    key: str
    values: tuple[Word, ...]
    words: tuple[Word, ...]


@dataclass(frozen=True, kw_only=True)
class Carried:
    """What a launch says besides its plan.

    ``training`` are values by Megatron-LM's name, ``own`` arguments that stay as they are because
    the framework stays, ``program`` those that choose its configuration; ``whole``: nothing is to
    be added to them. ``env`` are the variables that the script exports, ``lost`` what is not
    carried, each with the reason.
    """

    training: Mapping[str, Values] = field(default_factory=dict[str, Values])
    own: Sequence[Sequence[str]] = ()
    whole: bool = False
    program: Mapping[str, str] = field(default_factory=dict[str, str])
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    lost: Sequence[str] = ()

    def outside(self) -> list[str]:
        """Return the variables that carried values take from outside the script."""
        lines = (*self.training.values(), *self.own)
        text = " ".join(v for values in lines for v in values)
        return sorted(set(re.findall(r"\$\{?([A-Za-z_]\w*)", text)))


def text(word: Word) -> str:
    """Return a word's text; one with variables stays marked as such."""
    return Unexpanded(word.text) if word.unknown else word.text


def joined(path: str, value: str, sign: str = "=") -> str:
    """Return ``path=value``; where the value has variables, so has the whole."""
    made = f"{path}{sign}{value}"
    return Unexpanded(made) if isinstance(value, Unexpanded) else made


def arguments_of(launch: Launch, places: Mapping[str, Place] | None = None) -> list[Argument]:
    """Return the arguments of a launch in order; what is neither flag nor path stands alone.

    A flag takes as many values as its place says; an unknown one all that follow.
    """
    words = launch.given or tuple(Word(item, 0) for item in launch.argv)
    by_path = launch.framework not in ("megatron-lm", "torchtitan")
    found: list[Argument] = []
    at = 0
    while at < len(words):
        word = words[at]
        name, sign, value = word.text.partition("=")
        override = _PATH.fullmatch(word.text) if by_path else None
        end = at + 1
        if override is not None:
            values = (Word(override[2], word.line, word.variables, word.unknown),)
            found.append(Argument(key=override[1], values=values, words=(word,)))
        elif _FLAG.fullmatch(name) is None:
            found.append(Argument(key="", values=(word,), words=(word,)))
        elif sign:
            values = (Word(value, word.line, word.variables, word.unknown),)
            found.append(Argument(key=name, values=values, words=(word,)))
        else:
            place = (places or {}).get(name)
            most = 1 if by_path else len(words) if place is None else place.most
            while end < len(words) and end - at <= most and _is_value(words[end], by_path):
                end += 1
            values = words[at + 1 : end]
            found.append(Argument(key=name, values=values, words=words[at:end]))
        at = end
    return found


def _is_value(word: Word, by_path: bool) -> bool:
    if by_path and _PATH.fullmatch(word.text):
        return False
    return not word.text.startswith("--") and not _is_list_of_words(word)


def _is_list_of_words(word: Word) -> bool:
    """Say whether a word is nothing but a variable that may hold many: ``$@``, ``$EXTRA_ARGS``."""
    return bool(word.unknown) and re.fullmatch(r"\$\{?(@|\*|\w*ARGS?\w*)\}?", word.text) is not None


class _Asked(dict[str, Any]):
    """Words that remember which of them were asked for."""

    def __init__(self, words: Mapping[str, Any]) -> None:
        super().__init__(words)
        self.seen: set[str] = set()

    def get(self, key: str, default: Any = None) -> Any:
        self.seen.add(key)
        return super().get(key, default)

    def __getitem__(self, key: str) -> Any:
        self.seen.add(key)
        return super().__getitem__(key)


def plan_words(launch: Launch) -> set[str]:
    """Return the words of a launch that its layout, job and model are made of."""
    words = _Asked(launch.words)
    with suppress(MeshwrightError):
        layout_of(words, launch.gpus)
    with suppress(MeshwrightError):
        job_of(words)
    with suppress(MeshwrightError):
        model_of(words)
    return words.seen


_READ_ONLY: Final = frozenset({"make_vocab_size_divisible_by"})
"""Words that a reader understands and no writer writes: they are carried like the rest."""


def plan_keys(launch: Launch) -> set[str]:
    """Return the arguments of a launch, and their names, that its plan came from."""
    words = plan_words(launch) - _READ_ONLY
    keys = set(words)
    for word in words & launch.settings.keys():
        for place in launch.settings[word].origin.split("; "):
            keys.add(place.partition(",")[0].strip())
    return keys


def carry(
    launch: Launch, to: str, source: Mapping[str, Place], target: Iterable[str], gbs: int
) -> Carried:
    """Return what of a launch another framework can be told, and what not.

    ``source`` says what the places of the framework that was read are called, ``target`` which
    names the one that is written has a counterpart for. ``gbs`` turns samples into iterations.
    """
    plan = plan_keys(launch) | _PROGRAM
    known = set(target)
    said: dict[str, tuple[Argument, Values]] = {}
    own: list[list[str]] = []
    lost: list[str] = []
    for argument in arguments_of(launch, source):
        place = source.get(argument.key)
        if _in_plan(argument.key, place, plan):
            continue
        unplaced = place is None or (place.name not in known and launch.framework == to)
        if unplaced and launch.framework == to != "nemo":
            own.append([text(word) for word in argument.words])
        elif place is None:
            lost.append(_shown(argument) + _why_unnamed(argument, to))
        else:
            values = tuple(map(text, argument.values)) or (place.bare,)
            said[place.name] = (argument, values)
    training = {name: values for name, (_, values) in said.items()}
    training |= counted_in_iterations(training, known, gbs)
    for name, (argument, values) in said.items():
        if (name, *values) in _USUAL:
            continue
        why = _why_not(launch.framework, to, name, known)
        if why and not _replaced(name, training, known):
            lost.append(_shown(argument) + why)
    kept = {n: v for n, v in training.items() if not _why_not(launch.framework, to, n, known)}
    same = launch.framework == to
    return Carried(
        training=kept,
        own=own,
        whole=same,
        program=_program(launch) if same else {},
        env=launch.env,
        lost=lost,
    )


_USUAL: Final = frozenset(
    {
        ("lr_decay_style", "cosine"),
        ("tokenizer_type", "HuggingFaceTokenizer"),
        ("optimizer", "adam"),
    }
)
"""What every writer does anyway: no loss where there is no setting for it."""


def _program(launch: Launch) -> dict[str, str]:
    found = (a for a in arguments_of(launch) if a.key in _PROGRAM and a.values)
    return {a.key: text(a.values[0]) for a in found}


def _in_plan(key: str, place: Place | None, plan: set[str]) -> bool:
    path = re.sub(r"\.no_", ".", key.lstrip("-").replace("-", "_"))
    named = place is not None and (place is PLAN or place.name in plan)
    return named or key in plan or path in plan


def _shown(argument: Argument) -> str:
    return " ".join(w.text for w in argument.words)[:100] + ": "


def _why_unnamed(argument: Argument, to: str) -> str:
    if not argument.key:
        return "only a running shell knows what it stands for."
    return f"{TITLES[to]} has no counterpart that is known here."


def _why_not(source: str, to: str, name: str, known: set[str]) -> str:
    """Return why a setting is not carried, or nothing when it is."""
    if name in DATA_WORDS and DATA[source] != DATA[to]:
        return f"{TITLES[source]} trains on {DATA[source]}, {TITLES[to]} on {DATA[to]}."
    if name in CHECKPOINT_WORDS and not {source, to} <= MEGATRON_CHECKPOINTS:
        return f"{TITLES[to]} reads no checkpoint of {TITLES[source]}: convert it first."
    if name in MODEL_WORDS and to in ("skyrl", "verl", "torchtitan") and name not in known:
        return f"{TITLES[to]} takes it from the model's own configuration."
    return "" if name in known else f"{TITLES[to]} has no counterpart that is known here."


_SAMPLES: Final = {
    "train_samples": "train_iters",
    "lr_decay_samples": "lr_decay_iters",
    "lr_warmup_samples": "lr_warmup_iters",
}


def counted_in_iterations(
    training: Mapping[str, Values], known: set[str], gbs: int
) -> dict[str, Values]:
    """Return counts of samples and fractions as iterations where only those have a counterpart.

    iterations = ceil(samples / gbs); a warm-up fraction is one of the decay's iterations.
    """
    made: dict[str, Values] = {}
    for name, iterations in _SAMPLES.items():
        samples = _number(training, name)
        if samples is not None and name not in known and iterations in known:
            made[iterations] = (str(math.ceil(samples / gbs)),)
    fraction = _number(training, "lr_warmup_fraction")
    if fraction is not None and "lr_warmup_fraction" not in known and "lr_warmup_iters" in known:
        merged = {**training, **made}
        over = _number(merged, "lr_decay_iters") or _number(merged, "train_iters")
        if over is not None:
            made["lr_warmup_iters"] = (str(round(fraction * over)),)
    return made


def _replaced(name: str, training: Mapping[str, Values], known: set[str]) -> bool:
    """Say whether a count is carried as the count of another unit."""
    other = "lr_warmup_iters" if name == "lr_warmup_fraction" else _SAMPLES.get(name, "")
    return other in known and other in training


def _number(training: Mapping[str, Values], name: str) -> float | None:
    given = training.get(name)
    if given is None or len(given) != 1 or isinstance(given[0], Unexpanded):
        return None
    try:
        return float(given[0])
    except ValueError:
        return None


_GROUPS: Final = (
    {"train_iters", "train_samples"},
    {"lr_warmup_iters", "lr_warmup_fraction", "lr_warmup_samples"},
    {"tokenizer_model", "vocab_file"},
    {"data_path", "train_data_path", "data_args_path", "per_split_data_args_path", "mock_data"},
    {"split", "train_data_path", "per_split_data_args_path"},
)
"""Settings that stand for each other: where one is carried, the others keep no default."""


def training_of(carried: Carried, defaults: Mapping[str, str]) -> dict[str, Values]:
    """Return the defaults of a writer, replaced and joined by what is carried."""
    given = carried.training
    if carried.whole:
        return dict(given)
    kept = {
        name: (value,)
        for name, value in defaults.items()
        if not any(name in group and group & given.keys() for group in _GROUPS)
        and not (name == "min_lr" and "lr" in given)
    }
    return {**kept, **given}
