"""Time of an all-reduce over NVLink and InfiniBand, as latency per hop and bytes over bandwidth.

Seconds and bytes throughout. A node has 8 GPUs, each with its own NIC.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NODE = 8


@dataclass(frozen=True)
class Network:
    """What a link gives in practice: published speed times an efficiency."""

    nvlink: float
    """Bytes/s of one GPU in one direction."""
    nic: float
    """Bytes/s of one GPU's NIC in one direction."""
    nvlink_hop: float
    """Seconds."""
    nic_hop: float
    launch: float
    """Seconds before the first byte moves."""


def _split(ranks: int) -> tuple[int, int]:
    local = min(ranks, NODE)
    return local, ranks // local


def ring(size: float, ranks: int, network: Network) -> float:
    """One ring through all ranks, split into as many channels as there are NICs in a node."""
    if ranks == 1:
        return 0.0
    local, nodes = _split(ranks)
    speed = network.nvlink if nodes == 1 else min(network.nvlink, local * network.nic)
    hops = 2 * nodes * (local - 1) * network.nvlink_hop
    if nodes > 1:
        hops += 2 * (nodes - 1) * network.nic_hop
    return network.launch + hops + 2 * (ranks - 1) / ranks * size / speed


def tree(size: float, ranks: int, network: Network) -> float:
    """Up and down a binary tree of nodes, a chain inside each; pipelined."""
    if ranks == 1:
        return 0.0
    local, nodes = _split(ranks)
    speed = network.nvlink if nodes == 1 else min(network.nvlink, local * network.nic)
    hops = (local - 1) * network.nvlink_hop + math.ceil(math.log2(nodes)) * network.nic_hop
    return network.launch + 2 * hops + 2 * size / speed


def hierarchical(size: float, ranks: int, network: Network) -> float:
    """Reduce-scatter inside the node, a tree over the nodes for each GPU's part, all-gather inside."""
    if ranks == 1:
        return 0.0
    local, nodes = _split(ranks)
    inside = 2 * (local - 1) * (network.nvlink_hop + size / local / network.nvlink)
    across = 2 * (math.ceil(math.log2(nodes)) * network.nic_hop + (nodes > 1) * size / local / network.nic)
    return network.launch + inside + across


ALGORITHMS = {"ring": ring, "tree": tree, "hierarchical": hierarchical}


def best(size: float, ranks: int, network: Network) -> tuple[str, float]:
    """The fastest of them: NCCL chooses by a table of the same kind."""
    times = {name: algorithm(size, ranks, network) for name, algorithm in ALGORITHMS.items()}
    name = min(times, key=lambda key: times[key])
    return name, times[name]


@dataclass(frozen=True)
class Line:
    """seconds = latency + bytes / speed."""

    latency: float
    speed: float

    def seconds(self, size: float) -> float:
        """Of one all-reduce."""
        return self.latency + size / self.speed


def fit(sizes: Sequence[float], seconds: Sequence[float]) -> Line:
    """Least squares of the relative error."""
    weight = 1.0 / np.asarray(seconds)
    terms = np.stack([weight, np.asarray(sizes) * weight], axis=1)
    (latency, slope), *_ = np.linalg.lstsq(terms, np.ones(len(weight)), rcond=None)
    return Line(float(latency), 1.0 / float(slope))
