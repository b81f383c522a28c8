"""A cluster from the text that names it, or from its file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from meshwright.describe.cluster.build import build_cluster
from meshwright.describe.cluster.fields import EXAMPLE, MAX_GPUS, Cluster
from meshwright.describe.gpu import load_gpu
from meshwright.errors import ClusterError

_TEXT: Final = re.compile(r"\s*(?:([+-]?\d+)\s*[x*]\s*)?(?:([+-]?\d+)\s*[x*]\s*)?([a-z].*)", re.I)


def load_cluster(text: str) -> Cluster:
    """Return the cluster that ``text`` describes.

    ``text`` is ``"64xH100"`` (GPUs), ``"8x8xH100"`` (nodes x GPUs a node) or the path of a cluster
    TOML. Raises ``ClusterError`` when the GPU is unknown or the counts cannot be.
    """
    if not isinstance(text, str) or not text.strip():  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ClusterError("cluster", text, "It names no GPUs and no file.", EXAMPLE)
    if text.rstrip().lower().endswith(".toml") or (len(text) < 4096 and _is_file(text)):
        from meshwright.describe.cluster.document import read_cluster  # pydantic is slow to load

        return read_cluster(Path(text))
    match = _TEXT.fullmatch(text)
    if match is None:
        raise ClusterError("cluster", text, "It names no GPUs and no file.", EXAMPLE)
    if re.search(r"\d\s*[x*]\s*\d+\s*$", match[3], re.I):
        raise ClusterError("cluster", text, "Counts stand before the GPU.", EXAMPLE)
    if match[1] is None:
        load_gpu(match[3])
        raise ClusterError("cluster", text, "It does not say how many GPUs.", f"Write 8x{text}.")
    first = _count(match[1], text)
    if match[2] is None:
        return build_cluster(match[3], first, name=text.strip())
    per_node = _count(match[2], text)
    return build_cluster(match[3], first * per_node, gpus_per_node=per_node, name=text.strip())


def _count(digits: str, text: str) -> int:
    """Return a count written in a cluster's ``text``."""
    value = int(digits) if len(digits) < 12 else MAX_GPUS + 1
    if not 1 <= value <= MAX_GPUS:
        rule = f"Each count must be a whole number from 1 to {MAX_GPUS:,}."
        raise ClusterError("cluster", text, rule, EXAMPLE)
    return value


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False
