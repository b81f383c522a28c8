"""The machines: GPUs, the links between them, and the text that names them.

A cluster has two levels. Inside the scale-up domain (NVLink, or the PCIe of one server) a GPU
reaches its peers over ``intra_node``; everything else goes over ``inter_node``. Ranks fill nodes
and domains in order: rank ``r`` sits on node ``r // gpus_per_node`` and in domain
``r // scale_up_domain``. ``fields`` says what a cluster is, ``build`` makes one of what is known
(``network`` reads what is told of links), ``document`` reads and writes its file, ``load`` reads
any of its names.
"""

from meshwright.describe.cluster.build import build_cluster
from meshwright.describe.cluster.fields import MAX_GPUS, Cluster, Link
from meshwright.describe.cluster.load import load_cluster
from meshwright.describe.cluster.network import parse_network
from meshwright.describe.gpu import Gpu, known_gpus, load_gpu

__all__ = [
    "MAX_GPUS",
    "Cluster",
    "Gpu",
    "Link",
    "build_cluster",
    "known_gpus",
    "load_cluster",
    "load_gpu",
    "parse_network",
]
