"""The DSR nodes that tests go through, and the weights of their representation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ide_snn.dsr import DSRIFNode, DSRLIFNode, DSRNode

KINDS: dict[str, type[DSRNode]] = {"if": DSRIFNode, "lif": DSRLIFNode}
SLOW_LIF = {"tau": 2.0, "delta_t": 0.5}  # leak 0.78: the time weights matter


def weights(node: DSRNode, steps: int) -> NDArray[np.float64]:
    w = np.array([math.exp(-(steps - 1 - t) * node.model.delta_t / node.model.tau) for t in range(steps)])
    return np.ones(steps) / steps if isinstance(node, DSRIFNode) else w / w.sum()
