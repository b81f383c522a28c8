"""What one GPU offers, and how the names that people give it are understood.

Every file of ``hardware/gpus`` is one GPU; its file name is family, form and memory, and its public
name stands inside. A name is read word by word (family, form factor, memory, memory type, power
limit), so that ``H100``, ``h100-80gb``, ``NVIDIA H100 80GB HBM3`` and ``H100-SXM-80GB`` are one.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from typing import Any, Final, TypeGuard

from meshwright import units
from meshwright.errors import ClusterError, did_you_mean

HARDWARE: Final = resources.files("meshwright.describe") / "hardware"
_FORMS: Final = {"sxm": "sxm", "hgx": "sxm", "dgx": "sxm", "pcie": "pcie", "pci": "pcie"}
_EMPTY_WORDS: Final = re.compile(
    "nvidia|tesla|amd|instinct|rtx|quadro|gpus?|tensor|core|superchip|grace|hopper|blackwell"
    "|ultra|ampere|volta|ada|cdna|oam|ac|ts|hbm|gddr"
)
_WORD: Final = re.compile(
    r"(?P<memory>\d+)(?:gib|gb|g)(?![a-z])|(?P<power>\d+)w(?![a-z])|(?P<type>hbm\de?|gddr\dx?)"
    r"|(?P<form>sxm|hgx|dgx|pcie|pci)\d*|(?P<rack>nvl(?:4|8|16|36|72))(?!\d)|(?P<nvl>nvl)"
    r"|(?P<number>\d+)(?![a-z])|(?P<word>[a-z]+\d*[a-z]*)"
)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU as its data sheets state it; a process of the job owns exactly one.

    ``hbm_bytes`` is what the card offers to a process, ``advertised_hbm_bytes`` what its data sheet
    says, whose GB is often a GiB. ``peak_flops_per_s`` holds the dense matmul rate by format (bf16
    fp16 fp8 fp4 tf32 fp32; fp4 is NVFP4 or MXFP4); a format that is absent is not supported.
    ``exponentials_per_s`` is the rate of the special-function units, which softmax waits for.
    ``peer_bytes_per_s`` is the link to the other GPUs of its domain (NVLink, Infinity Fabric; 0
    where there is none) and ``host_bytes_per_s`` the link to the CPU (PCIe or C2C), both in one
    direction.
    ``sources`` says where each field comes from, under the field's name or ``default``.
    ``fitted`` holds measured factors, never facts; ``assumed`` what the name left open.
    """

    name: str
    architecture: str
    compute_capability: str
    memory_type: str
    hbm_bytes: int
    advertised_hbm_bytes: int
    hbm_bytes_per_s: float
    peak_flops_per_s: Mapping[str, float] = field(hash=False)
    num_sms: int
    exponentials_per_s: float
    l2_bytes: int
    power_w: float
    peer: str
    peer_bytes_per_s: float
    host: str
    host_bytes_per_s: float
    system: str
    sources: Mapping[str, str] = field(hash=False)
    fitted: Mapping[str, float] = field(hash=False, default_factory=dict[str, float])
    assumed: tuple[str, ...] = ()


_OPTIONAL: Final = {"peer", "peer_bytes_per_s", "fitted", "default_of_family"}
_NEEDED: Final = {f.name for f in fields(Gpu)} - {"sources", "assumed"} - _OPTIONAL | {
    "sold_as_gb",
    "source",
}
"""Keys of a GPU's file: the fields of ``Gpu``, how much memory it is sold with, and sources."""
_EXAMPLE: Final = "Write it as in hardware/gpus/h100-sxm-80gb.toml."


@dataclass(frozen=True)
class _Words:
    """The words of a GPU name, sorted by what they say."""

    family: str
    form: str = ""
    memory_gb: int = 0
    memory_type: str = ""
    power_w: float = 0.0
    unknown: tuple[str, ...] = ()


def known_gpus() -> list[str]:
    """Return the public names of all GPUs with a file, sorted."""
    return sorted(str(_read(stem)["name"]) for stem in stems("gpus"))


def load_gpu(name: str, *, nearest: bool = False) -> Gpu:
    """Return the GPU that ``name`` means: a file's own name or any usual spelling of it.

    A word that says more than one file knows is an error; with ``nearest`` it is read as the
    nearest that is known, and ``Gpu.assumed`` says so. A power limit in the name ("500W") sets
    ``power_w``. Raises ``ClusterError`` when no family is named, with the nearest names.
    """
    words = _read_words(name)
    said: list[str] = []
    if words.unknown:
        _refuse_unless(nearest, name, f"{' '.join(words.unknown)!r} says nothing known.", words)
        said.append(f"gpu {name}: {' '.join(words.unknown)!r} is not known and not used")
    found = _candidates(words)
    kept = _narrow(found, words)
    if not kept:
        rule = f"No {words.family.upper()} of this form and memory is known."
        _refuse_unless(nearest, name, rule, words)
        kept = [min(found, key=lambda stem: (_distance(stem, words), _preference(stem)))]
        said.append(f"gpu {name} is read as {_read(kept[0])['name']}, the nearest known")
    stem = min(kept, key=_preference)
    gpu = _build(stem)
    if len(kept) > 1:
        said.append(f"gpu {name} is read as {gpu.name}")
    if words.power_w and words.power_w != gpu.power_w:
        gpu = replace(
            gpu, power_w=words.power_w, sources={**gpu.sources, "power_w": f"the name {name}"}
        )
    return replace(gpu, assumed=tuple(said))


@cache
def stems(folder: str) -> tuple[str, ...]:
    """Return the file names, without ending, of a folder of ``hardware``, sorted."""
    files = (HARDWARE / folder).iterdir()
    return tuple(sorted(f.name[:-5] for f in files if f.name.endswith(".toml")))


def read_fitted(table: Mapping[str, Any], where: str) -> tuple[dict[str, float], dict[str, str]]:
    """Return the factors of a ``[fitted]`` table and where each comes from.

    Each entry is a table of ``value`` and ``source`` (on what machine, when and how).
    Raises ``ClusterError`` for a factor that is no number or does not say where it comes from.
    """
    factors: dict[str, float] = {}
    sources: dict[str, str] = {}
    for key, entry in table.items():
        value, source = (entry.get("value"), entry.get("source")) if _is_table(entry) else (0, "")
        if not _is_factor(value) or not isinstance(source, str) or not source:
            raise ClusterError(
                f"{where}.{key}",
                entry,
                "A fitted factor needs a finite number >= 0 and where it comes from.",
                'Write { value = 0.75, source = "machine, date, how" }.',
            )
        factors[key], sources[f"fitted.{key}"] = float(value), source
    return factors, sources


def _is_factor(value: object) -> TypeGuard[float]:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value < math.inf


def _is_table(value: object) -> TypeGuard[Mapping[str, object]]:
    return isinstance(value, Mapping)


@cache
def read_hardware(path: str) -> Mapping[str, Any]:
    """Return one TOML file of ``hardware`` as it is written; ``path`` has no ending."""
    return tomllib.loads((HARDWARE / f"{path}.toml").read_text(encoding="utf-8"))


@cache
def _read(stem: str) -> Mapping[str, Any]:
    """Return what the file of a GPU says.

    Raises ``ClusterError`` for a key that is missing, unknown, or without a source.
    """
    facts = read_hardware(f"gpus/{stem}")
    for key in sorted(_NEEDED - facts.keys()):
        raise ClusterError(f"gpus.{stem}.{key}", None, "This key is needed.", _EXAMPLE)
    for key in sorted(facts.keys() - _NEEDED - _OPTIONAL):
        remedy = did_you_mean(key, _NEEDED | _OPTIONAL)
        raise ClusterError(f"gpus.{stem}.{key}", facts[key], "There is no such key.", remedy)
    if "default" not in facts["source"]:
        rule = "This key is needed: where the numbers come from that state no source of their own."
        raise ClusterError(f"gpus.{stem}.source.default", None, rule, _EXAMPLE)
    return facts


def _build(stem: str) -> Gpu:
    facts = dict(_read(stem))
    facts.pop("default_of_family", None)
    facts.pop("sold_as_gb")
    sources = dict[str, str](facts.pop("source"))
    fitted, origins = read_fitted(facts.pop("fitted", {}), f"gpus.{stem}.fitted")
    peaks = facts.pop("peak_flops_per_s")
    numbers: dict[str, Any] = {
        key: units.parse(value, unit, f"gpus.{stem}.{key}")
        for key, value in facts.items()
        if (unit := units.unit_of(key)) is not None
    }
    for key in ("hbm_bytes", "advertised_hbm_bytes", "l2_bytes"):
        numbers[key] = round(numbers[key])
    stated: dict[str, Any] = {"peer": "", "peer_bytes_per_s": 0.0, **facts, **numbers}
    return Gpu(
        **stated,
        peak_flops_per_s={
            dtype: units.parse(value, "flops_per_s", f"gpus.{stem}.peak_flops_per_s.{dtype}")
            for dtype, value in peaks.items()
        },
        fitted=fitted,
        sources={**sources, **origins},
    )


def _read_words(name: str) -> _Words:
    if not isinstance(name, str) or not name.strip() or len(name) > 200:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ClusterError("gpu", name, "It must be the name of a GPU.", _nearest_names(""))
    found: dict[str, str] = {}
    unknown: list[str] = []
    for chunk in re.findall(r"[a-z0-9]+", name.lower()):
        rest = chunk
        family = next((f for f in _families() if chunk.startswith(f)), "")
        if family and "family" not in found and not chunk[len(family) :][:1].isdigit():
            found["family"], rest = family, chunk[len(family) :]
        _sort_words(rest, found, unknown)
    if "family" not in found:
        raise ClusterError("gpu", name, "There is no GPU of this name.", _nearest_names(name))
    return _Words(
        family=found["family"],
        form="nvl" if "nvl" in found else _FORMS.get(found.get("form", ""), ""),
        memory_gb=int(found.get("memory") or found.get("number") or 0),
        memory_type=found.get("type", "").upper().replace("E", "e"),
        power_w=float(found.get("power", 0)),
        unknown=tuple(unknown),
    )


def _sort_words(text: str, found: dict[str, str], unknown: list[str]) -> None:
    """Sort the words that stand in ``text`` without a gap."""
    for match in _WORD.finditer(text):
        kind, word = str(match.lastgroup), match[str(match.lastgroup)]
        if kind == "word":
            if not _EMPTY_WORDS.fullmatch(word):
                unknown.append(word)
        else:
            found.setdefault(kind, word)


@cache
def _families() -> tuple[str, ...]:
    return tuple(sorted({stem.split("-")[0] for stem in stems("gpus")}, key=len, reverse=True))


def _candidates(words: _Words) -> list[str]:
    return [stem for stem in stems("gpus") if stem.split("-")[0] == words.family]


def _narrow(found: Iterable[str], words: _Words) -> list[str]:
    """Return those of ``found`` that contradict no word."""
    kept: list[str] = []
    for stem in found:
        facts, form = _read(stem), _form(stem)
        if (
            (not words.form or not form or form == words.form)
            and (not words.memory_gb or words.memory_gb in facts["sold_as_gb"])
            and (not words.memory_type or facts["memory_type"] == words.memory_type)
        ):
            kept.append(stem)
    return kept


def _form(stem: str) -> str:
    return next((word for word in stem.split("-") if word in ("sxm", "pcie", "nvl")), "")


def _distance(stem: str, words: _Words) -> tuple[bool, float, bool]:
    """Return how far a GPU is from ``words``: form first, then memory, then memory type."""
    facts = _read(stem)
    far = min(abs(gb - words.memory_gb) for gb in facts["sold_as_gb"]) if words.memory_gb else 0
    wrong_form = bool(words.form) and _form(stem) not in ("", words.form)
    return wrong_form, far, words.memory_type not in ("", facts["memory_type"])


def _preference(stem: str) -> tuple[bool, bool, int]:
    """Return the order in which a name that fits several GPUs is read."""
    facts = _read(stem)
    return "default_of_family" not in facts, _form(stem) == "pcie", -max(facts["sold_as_gb"])


def _nearest_names(name: str) -> str:
    known = {*known_gpus(), *(family.upper() for family in _families())}
    return did_you_mean(re.sub(r"(?i)nvidia|tesla|\s", "", name), known)


def _refuse_unless(nearest: bool, name: str, rule: str, words: _Words) -> None:
    if not nearest:
        kinds = [str(_read(stem)["name"]) for stem in _candidates(words)]
        raise ClusterError("gpu", name, rule, f"Choose from {', '.join(sorted(kinds))}.")
