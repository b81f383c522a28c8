"""A cluster written as TOML: what the file may say, and how a cluster is written back.

A file starts from a known GPU and its usual system and states what is different, for instance the
network; every quantity may carry its unit (``"25 GB/s"``).
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from meshwright import units
from meshwright.describe.cluster.build import build_cluster
from meshwright.describe.cluster.fields import Cluster, Link
from meshwright.describe.cluster.network import parse_network
from meshwright.describe.gpu import Gpu, load_gpu, read_fitted
from meshwright.errors import ClusterError, DocumentError, did_you_mean

Quantity = Any  # a number in the base unit, or text with a unit: units.parse is the judge
DTYPES: Final = ("bf16", "fp16", "fp8", "fp4", "tf32", "fp32")
_LINKS: Final = ("intra_node", "inter_node", "host")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LinkDocument(_Strict):
    """What is different from the usual link; ``bytes_per_s`` of one GPU in one direction."""

    bytes_per_s: Quantity | None = None
    latency_s: Quantity | None = None
    name: StrictStr | None = None


class NetworkDocument(LinkDocument):
    """The network between nodes, in words (``network``) or as numbers."""

    network: StrictStr | None = None


class GpuDocument(_Strict):
    """What is different from the known GPU; the fields of ``Gpu``."""

    hbm_bytes: Quantity | None = None
    advertised_hbm_bytes: Quantity | None = None
    hbm_bytes_per_s: Quantity | None = None
    peak_flops_per_s: dict[str, Quantity] | None = None
    num_sms: StrictInt | None = Field(default=None, ge=1)
    l2_bytes: Quantity | None = None
    power_w: Quantity | None = None


class ClusterDocument(_Strict):
    """A cluster TOML."""

    name: StrictStr | None = None
    gpu: StrictStr
    num_gpus: StrictInt
    gpus_per_node: StrictInt | None = None
    nvlink_domain: StrictInt | None = None
    system: StrictStr = ""
    nvls: StrictBool | None = None
    reserved_bytes: Quantity = 0
    intra_node: LinkDocument = LinkDocument()
    inter_node: NetworkDocument = NetworkDocument()
    host: LinkDocument = LinkDocument()
    gpu_overrides: GpuDocument = GpuDocument()
    fitted: dict[str, Any] = {}
    source: dict[str, StrictStr] = {}


def read_cluster(path: Path) -> Cluster:
    """Return the cluster of a TOML file.

    Raises ``DocumentError`` when the file cannot be read, ``ClusterError`` for what it says wrong.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        rule = f"It cannot be read as TOML: {getattr(problem, 'strerror', None) or problem}."
        raise DocumentError("cluster", str(path), rule, "Give the path of a TOML file.") from None
    return from_document(table, name=path.stem)


def from_document(table: Mapping[str, Any], name: str = "") -> Cluster:
    """Return the cluster of a document's tables; ``name`` is used when it states none."""
    try:
        document = ClusterDocument.model_validate(table)
    except ValidationError as problem:
        raise _first_error(problem) from None
    gpu = _override(load_gpu(document.gpu), document.gpu_overrides, document.source)
    network = document.inter_node.network or ""
    if network and parse_network(network, 1) is None:
        rule, remedy = "It tells no rate.", 'Write "8x400Gb NDR IB per node", or bytes_per_s.'
        raise ClusterError("cluster.inter_node.network", network, rule, remedy)
    cluster = build_cluster(
        gpu,
        document.num_gpus,
        name=document.name or name,
        system=document.system,
        gpus_per_node=document.gpus_per_node,
        nvlink_domain=document.nvlink_domain,
        network=network,
    )
    fitted, origins = read_fitted(document.fitted, "cluster.fitted")
    reserved = round(units.parse(document.reserved_bytes, "bytes", "cluster.reserved_bytes"))
    if reserved >= gpu.hbm_bytes:
        rule = f"It must leave something of {units.format_bytes(gpu.hbm_bytes)}."
        raise ClusterError("cluster.reserved_bytes", document.reserved_bytes, rule, "Reserve less.")
    _known(document.source, (*_LINKS, *GpuDocument.model_fields), "cluster.source")
    stated = {
        key: document.source.get(key, "the cluster's file")
        for key in _LINKS
        if key in document.source or getattr(document, key).bytes_per_s is not None
    }
    links = {key: _link(cluster, key, getattr(document, key)) for key in _LINKS}
    kept = [
        line
        for line in cluster.assumed
        if not (line.startswith("inter_node") and document.inter_node.bytes_per_s is not None)
    ]
    return replace(
        cluster,
        **links,
        nvls=cluster.nvls if document.nvls is None else document.nvls,
        reserved_bytes=reserved,
        fitted={**cluster.fitted, **fitted},
        sources={**cluster.sources, **stated, **origins},
        assumed=tuple(kept),
    )


def to_document(cluster: Cluster) -> dict[str, Any]:
    """Return the document that ``from_document`` reads as an equal cluster, save ``assumed``."""
    known = load_gpu(cluster.gpu.name)
    different = {
        item: getattr(cluster.gpu, item)
        for item in GpuDocument.model_fields
        if getattr(cluster.gpu, item) != getattr(known, item)
    }
    table: dict[str, Any] = {
        "name": cluster.name,
        "gpu": cluster.gpu.name,
        "num_gpus": cluster.num_gpus,
        "gpus_per_node": cluster.gpus_per_node,
        "nvlink_domain": cluster.nvlink_domain,
        "nvls": cluster.nvls,
        "reserved_bytes": cluster.reserved_bytes,
    }
    for key in _LINKS:
        link: Link = getattr(cluster, key)
        table[key] = {f.name: getattr(link, f.name) for f in fields(link)}
    if different:
        table["gpu_overrides"] = different
    if cluster.fitted:
        table["fitted"] = {
            key: {"value": value, "source": cluster.sources.get(f"fitted.{key}", "the GPU's file")}
            for key, value in cluster.fitted.items()
        }
    origins = {key: cluster.gpu.sources.get(key, "stated") for key in different}
    table["source"] = {key: cluster.sources[key] for key in _LINKS} | origins
    return table


def to_toml(table: Mapping[str, Any], prefix: str = "") -> str:
    """Return nested tables as TOML; plain values first, as TOML wants them."""
    inner: dict[str, dict[str, Any]] = {k: v for k, v in table.items() if isinstance(v, dict)}
    lines = [f"{_key(k)} = {json.dumps(v)}" for k, v in table.items() if k not in inner]
    for key, value in inner.items():
        path = f"{prefix}{_key(key)}"
        lines += ["", f"[{path}]", to_toml(value, f"{path}.")]
    return "\n".join(lines)


def _key(key: str) -> str:
    """Return ``key`` as TOML writes it: bare where it can be."""
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


def _override(gpu: Gpu, document: GpuDocument, source: Mapping[str, str]) -> Gpu:
    """Return ``gpu`` with the stated fields in the place of the data sheet's."""
    given: dict[str, Any] = document.model_dump(exclude_none=True)
    for key, value in given.items():
        where = f"cluster.gpu_overrides.{key}"
        if key == "peak_flops_per_s":
            _known(value, DTYPES, where)
            peaks = {
                k: _positive(units.parse(v, "flops_per_s", f"{where}.{k}"), f"{where}.{k}")
                for k, v in value.items()
            }
            given[key] = {**gpu.peak_flops_per_s, **peaks}
        elif (unit := units.unit_of(key)) is not None:
            number = _positive(units.parse(value, unit, where), where)
            given[key] = round(number) if unit == "bytes" else number
    origins = {key: source.get(key, "the cluster's file") for key in given}
    return replace(gpu, **given, sources={**gpu.sources, **origins})


def _link(cluster: Cluster, key: str, document: LinkDocument) -> Link:
    """Return the link that the cluster has, with what the document states of it."""
    link: Link = getattr(cluster, key)
    where = f"cluster.{key}"
    if document.bytes_per_s is not None:
        rate = units.parse(document.bytes_per_s, "bytes_per_s", f"{where}.bytes_per_s")
        link = replace(link, bytes_per_s=_positive(rate, f"{where}.bytes_per_s"), name="stated")
    if document.latency_s is not None:
        latency = units.parse(document.latency_s, "s", f"{where}.latency_s")
        link = replace(link, latency_s=latency)
    return link if document.name is None else replace(link, name=document.name)


def _known(table: Iterable[str], known: Iterable[str], where: str) -> None:
    """Refuse the first key of ``table`` that is not known."""
    names = tuple(known)
    for key in table:
        if key not in names:
            rule = "There is no such key."
            raise ClusterError(f"{where}.{key}", key, rule, did_you_mean(key, names))


def _positive(value: float, where: str) -> float:
    if value <= 0:
        raise ClusterError(where, value, "It must be above zero.", "Leave it out for the default.")
    return value


_FORM: Final = "Write it as in examples/cluster-h100-ethernet.toml."


def _first_error(problem: ValidationError) -> ClusterError:
    """Return what a document says wrong first, as an error that carries its remedy."""
    error = problem.errors(include_url=False)[0]
    path = [str(part) for part in error["loc"]]
    where = ".".join(["cluster", *path])
    if error["type"] == "extra_forbidden":
        tables: dict[str, type[BaseModel]] = {
            **dict.fromkeys(_LINKS, LinkDocument),
            "inter_node": NetworkDocument,
            "gpu_overrides": GpuDocument,
        }
        table = tables.get(path[0], ClusterDocument) if len(path) > 1 else ClusterDocument
        remedy = did_you_mean(path[-1], table.model_fields)
        return ClusterError(where, error["input"], "There is no such key.", remedy)
    if error["type"] == "missing":
        remedy = 'Write gpu = "H100" and num_gpus = 64 at the top of the file.'
        return ClusterError(where, None, "This key is needed.", remedy)
    return ClusterError(where, error["input"], f"{error['msg']}.", _FORM)
