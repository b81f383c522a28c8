"""What a cluster is: equal GPUs, and the links between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from meshwright.describe.gpu import Gpu

MAX_GPUS: Final = 2**20
"""No cluster is larger; a larger number is a typing error."""
EXAMPLE: Final = "Write 64xH100, 8x8xH100 (nodes x GPUs a node) or the path of a cluster TOML."


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
