"""The machines: GPUs, the links between them, and the text that names them.

A cluster has two levels. Inside the scale-up domain (NVLink, or the PCIe of one server) a GPU
reaches its peers over ``intra_node``; everything else goes over ``inter_node``. Ranks fill nodes
and domains in order: rank ``r`` sits on node ``r // gpus_per_node`` and in domain
``r // scale_up_domain``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from meshwright import units
from meshwright.describe.gpu import Gpu, known_gpus, load_gpu, read_hardware, stems
from meshwright.errors import ClusterError, did_you_mean

__all__ = [
    "Cluster",
    "Gpu",
    "Link",
    "build_cluster",
    "known_gpus",
    "load_cluster",
    "load_gpu",
    "parse_network",
]

MAX_GPUS: Final = 2**20
_EXAMPLE: Final = "Write 64xH100, 8x8xH100 (nodes x GPUs a node) or the path of a cluster TOML."
_STATED: Final = "stated"
_TEXT: Final = re.compile(r"\s*(?:([+-]?\d+)\s*[x*]\s*)?(?:([+-]?\d+)\s*[x*]\s*)?([a-z].*)", re.I)
_COUNT: Final = re.compile(r"(?<!\d)(\d{1,6})\s*x\s*(?=\w)", re.I)
_RATE: Final = re.compile(r"(\d+(?:\.\d+)?)\s*([GT])(b(?:ps|it/s|/s|E|it)?|B(?:ps|/s)|)(?!\w)")
_SCOPE: Final = re.compile(
    r"(?:per|/|a|each)\s*(?:(\d{1,6})[- ]?)?(gpu|node|tray|server|host)", re.I
)


@dataclass(frozen=True)
class Link:
    """What one GPU gets of a link in one direction, and what a message costs before it moves."""

    bytes_per_s: float
    latency_s: float
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """``num_gpus`` equal GPUs, ``gpus_per_node`` of them in one machine.

    ``nvlink_domain`` consecutive ranks share NVLink (1: none), ``intra_node`` is the link inside
    the scale-up domain, ``inter_node`` the network, ``host`` the link to the CPU; all are a GPU's
    share in one direction. ``nvls`` says that the switch itself can reduce. ``reserved_bytes``
    of each GPU belong to others. ``fitted`` holds measured factors, the GPU's among them.
    ``sources`` says where the links come from, ``assumed`` lists every default that was taken.
    """

    name: str
    gpu: Gpu
    num_gpus: int
    gpus_per_node: int
    nvlink_domain: int
    intra_node: Link
    inter_node: Link
    host: Link
    nvls: bool = False
    reserved_bytes: int = 0
    fitted: Mapping[str, float] = field(hash=False, default_factory=dict[str, float])
    sources: Mapping[str, str] = field(hash=False, default_factory=dict[str, str])
    assumed: tuple[str, ...] = ()

    @property
    def num_nodes(self) -> int:
        """Return the number of machines."""
        return -(-self.num_gpus // self.gpus_per_node)

    @property
    def scale_up_domain(self) -> int:
        """Return how many consecutive ranks are joined by ``intra_node``."""
        joined = self.nvlink_domain if self.nvlink_domain > 1 else self.gpus_per_node
        return min(joined, self.num_gpus)

    @property
    def capacity_bytes(self) -> int:
        """Return what one GPU offers to the job: ``hbm_bytes`` less ``reserved_bytes``."""
        return self.gpu.hbm_bytes - self.reserved_bytes


def load_cluster(text: str) -> Cluster:
    """Return the cluster that ``text`` describes.

    ``text`` is ``"64xH100"`` (GPUs), ``"8x8xH100"`` (nodes x GPUs a node) or the path of a cluster
    TOML. Raises ``ClusterError`` when the GPU is unknown or the counts cannot be.
    """
    if not isinstance(text, str) or not text.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ClusterError("cluster", text, "It names no GPUs and no file.", _EXAMPLE)
    if text.rstrip().lower().endswith(".toml") or (len(text) < 4096 and _is_file(text)):
        from meshwright.describe.cluster_document import read_cluster  # pydantic is slow to load

        return read_cluster(Path(text))
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ClusterError("cluster", text, "It names no GPUs and no file.", _EXAMPLE)
    if re.search(r"\d\s*[x*]\s*\d+\s*$", match[3], re.I):
        raise ClusterError("cluster", text, "Counts stand before the GPU.", _EXAMPLE)
    if match[1] is None:
        load_gpu(match[3])
        raise ClusterError("cluster", text, "It does not say how many GPUs.", f"Write 8x{text}.")
    first = _count(match[1], text)
    if match[2] is None:
        return build_cluster(match[3], first, name=text.strip())
    per_node = _count(match[2], text)
    return build_cluster(match[3], first * per_node, gpus_per_node=per_node, name=text.strip())


def build_cluster(
    gpu: str | Gpu,
    num_gpus: int,
    *,
    name: str = "",
    system: str = "",
    gpus_per_node: int | None = None,
    nvlink_domain: int | None = None,
    network: str = "",
    nearest: bool = False,
) -> Cluster:
    """Return a cluster from what is known of it; the rest is the system's default and is listed.

    ``system`` and ``network`` are free text ("DGX-H100", "8x400Gb NDR IB"). With ``nearest``, what
    is not known is read as the nearest that is (see ``load_gpu``), and GPUs that fill no whole
    nodes shrink the node. Raises ``ClusterError`` where that is not asked for.
    """
    card = load_gpu(gpu, nearest=nearest) if isinstance(gpu, str) else gpu
    said = list(card.assumed)
    _whole("num_gpus", num_gpus)
    facts = read_hardware(f"systems/{_system_of(card, system, nearest, said)}")
    node = _whole("gpus_per_node", _or(gpus_per_node, facts["gpus_per_node"]))
    if gpus_per_node is None and num_gpus > node:
        said.append(f"gpus_per_node = {node}: {facts['source']['default']}")
    gpus_per_node = _node_size(min(node, num_gpus), num_gpus, nearest, said)
    physical = _whole("nvlink_domain", _or(nvlink_domain, facts["nvlink_domain"]))
    domain = _used_domain(card, physical, num_gpus, gpus_per_node, int(facts["gpus_per_node"]))
    if nvlink_domain is not None and domain == 1 < min(nvlink_domain, num_gpus):
        rule = f"No NVLink is known of {card.name}."
        if not nearest:
            raise ClusterError("nvlink_domain", nvlink_domain, rule, "Leave nvlink_domain out.")
        said.append(f"nvlink_domain = 1: {rule}")
    if physical != domain and num_gpus > physical > 8:
        said.append(f"nvlink_domain = {domain}: of the {physical} GPUs of a rack a power of two")
    inter_node, origin = _inter_node(network, node, facts)
    if origin != _STATED and num_gpus > (domain if domain > 1 else gpus_per_node):
        said.append(f"inter_node = {inter_node.name}: {origin}")
    peers = Link(card.peer_bytes_per_s, _latency_s(card.peer), card.peer) if domain > 1 else None
    return Cluster(
        name=name or f"{num_gpus}x{card.name}",
        gpu=card,
        num_gpus=num_gpus,
        gpus_per_node=gpus_per_node,
        nvlink_domain=domain,
        intra_node=peers or Link(card.host_bytes_per_s, _latency_s("pcie"), card.host),
        inter_node=inter_node,
        host=Link(card.host_bytes_per_s, _latency_s("host"), card.host),
        nvls=bool(facts["nvls"]) and domain > 1,
        fitted=card.fitted,
        sources={
            "intra_node": _source(card.sources, f"{'peer' if peers else 'host'}_bytes_per_s"),
            "inter_node": origin,
            "host": _source(card.sources, "host_bytes_per_s"),
            "latency_s": str(read_hardware("networks")["source"]["latency_s"]),
            **{key: text for key, text in card.sources.items() if key.startswith("fitted.")},
        },
        assumed=tuple(said),
    )


def _inter_node(network: str, node: int, facts: Mapping[str, Any]) -> tuple[Link, str]:
    """Return the network that is stated, or else the system's, and where it comes from."""
    stated = parse_network(network, node)
    if stated is not None:
        return stated, _STATED
    usual = parse_network(str(facts["network"]), int(facts["gpus_per_node"]))
    assert usual is not None, "every file of systems states a network"
    return usual, _source(facts, "network")


def parse_network(text: str, gpus_per_node: int) -> Link | None:
    """Return one GPU's share of a network told in words, or None where no rate is told.

    ``"8x400Gb NDR IB"``, ``"4x800Gb per 4-GPU tray"``, ``"1600Gb RoCE per node"`` and ``"4x
    Omni-Path links per node"`` are links of a node that its GPUs share. A single rate without "per"
    is one card a GPU, unless no card is that fast (above 800 Gbit/s) or it is plain Ethernet.
    Rates are line rates, in bits unless written with a large B; the latency is the kind's.
    """
    plain = re.sub(r"^\s*platform-default:", "", text).strip()
    words = re.findall(r"[a-z]+\d*(?:-[a-z]*\d*)?", plain.lower())
    count, scope = _COUNT.search(plain), _SCOPE.search(plain)
    rate = _rate_bytes_per_s(plain, words) * int(count[1] if count else 1)
    if not rate:
        return None
    kinds = read_hardware("networks")["kinds"].items()
    kind = next((k for k, known in kinds if _first(words, known)), "infiniband")
    if scope is not None:
        own = scope[2].lower() == "gpu" and scope[1] is None
        sharers = 1 if own else int(scope[1] or gpus_per_node)
    else:
        sharers = gpus_per_node if count or rate > 100e9 or kind == "ethernet" else 1
    return Link(rate / max(sharers, 1), _latency_s(kind), plain)


def _rate_bytes_per_s(text: str, words: list[str]) -> float:
    """Return the rate of one link, as written or as its generation has it; 0 where none is told."""
    match = _RATE.search(text)
    if match is not None:
        letter = "B" if match[3].startswith("B") else "bit"
        return units.parse(f"{match[1]} {match[2]}{letter}/s", "bytes_per_s", "network")
    rates = read_hardware("networks")["rates"]
    return units.parse(rates.get(_first(words, rates), 0), "bytes_per_s", "network")


def _first(words: Iterable[str], known: Iterable[str]) -> str | None:
    """Return the first of ``known`` with which one of ``words`` begins."""
    return next((k for k in known if any(word.startswith(k) for word in words)), None)


def _latency_s(kind: str) -> float:
    """Return the latency of the kind of link that ``kind`` begins with."""
    key = re.sub(r"\s*\d.*", "", kind.lower()).replace(" ", "-").removesuffix("-c2c")
    return units.parse(read_hardware("networks")["latency_s"][key], "s", f"latency_s.{key}")


def _source(table: Mapping[str, Any], key: str) -> str:
    sources: Mapping[str, str] = table.get("source", table)
    return sources.get(key, sources["default"])


def _system_of(card: Gpu, text: str, nearest: bool, said: list[str]) -> str:
    """Return the file of the system that ``text`` names; the GPU's usual one if it names none."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower())
    names = {
        name: stem
        for stem in stems("systems")
        for name in (stem, *read_hardware(f"systems/{stem}").get("names", ()))
    }
    named = max((name for name in names if name in plain), key=len, default=None)
    if named is not None:
        return names[named]
    if text and not nearest:
        remedy = did_you_mean(plain, names)
        raise ClusterError("system", text, "There is no system of this name.", remedy)
    if text:
        said.append(f"system {text} is read as {card.system}, the usual one of {card.name}")
    return card.system


def _or(stated: int | None, default: object) -> object:
    return default if stated is None else stated


def _used_domain(card: Gpu, physical: int, num_gpus: int, per_node: int, system_node: int) -> int:
    """Return how many consecutive ranks share NVLink.

    A rack of 72 is used whole by a job that fits into it or fills whole racks; else the largest
    power of two in it, because the degrees of a layout seldom divide by nine.
    """
    if not card.peer_bytes_per_s or physical == 1:
        return 1
    if physical <= system_node:
        return min(physical, per_node, num_gpus)
    power = 1 << (physical.bit_length() - 1)
    if num_gpus <= physical:
        return num_gpus
    return physical if num_gpus % physical == 0 and num_gpus % power else power


def _node_size(per_node: int, num_gpus: int, nearest: bool, said: list[str]) -> int:
    """Return ``per_node`` if whole nodes make up ``num_gpus``; else refuse, or shrink the node."""
    if num_gpus % per_node == 0:
        return per_node
    if nearest:
        fitting = max(n for n in range(1, per_node + 1) if num_gpus % n == 0)
        said.append(f"gpus_per_node = {fitting}: {num_gpus} GPUs fill no whole nodes of {per_node}")
        return fitting
    below = num_gpus // per_node * per_node
    near = " or ".join(str(n) for n in (below, below + per_node) if n)
    raise ClusterError(
        "num_gpus",
        num_gpus,
        f"It must be a whole number of nodes of {per_node} GPUs.",
        f"Choose {near} GPUs, or state smaller nodes, as in 3x4xH100.",
    )


def _whole(name: str, value: object) -> int:
    """Return ``value`` if it can be a number of GPUs."""
    if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_GPUS:
        return value
    rule = f"It must be a whole number from 1 to {MAX_GPUS:,}."
    raise ClusterError(name, value, rule, _EXAMPLE)


def _count(digits: str, text: str) -> int:
    """Return a count written in a cluster's ``text``."""
    value = int(digits) if len(digits) < 12 else MAX_GPUS + 1
    if not 1 <= value <= MAX_GPUS:
        rule = f"Each count must be a whole number from 1 to {MAX_GPUS:,}."
        raise ClusterError("cluster", text, rule, _EXAMPLE)
    return value


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False
