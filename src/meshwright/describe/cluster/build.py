"""A cluster from what is known of it; the rest is the system's default and is listed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

from meshwright.describe.cluster.fields import EXAMPLE, MAX_GPUS, Cluster, Link
from meshwright.describe.cluster.network import latency_s, parse_network
from meshwright.describe.gpu import Gpu, load_gpu, read_hardware, stems
from meshwright.errors import ClusterError, did_you_mean

_STATED: Final = "stated"


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
    peers = Link(card.peer_bytes_per_s, latency_s(card.peer), card.peer) if domain > 1 else None
    return Cluster(
        name=name or f"{num_gpus}x{card.name}",
        gpu=card,
        num_gpus=num_gpus,
        gpus_per_node=gpus_per_node,
        nvlink_domain=domain,
        intra_node=peers or Link(card.host_bytes_per_s, latency_s("pcie"), card.host),
        inter_node=inter_node,
        host=Link(card.host_bytes_per_s, latency_s("host"), card.host),
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
    raise ClusterError(name, value, rule, EXAMPLE)
