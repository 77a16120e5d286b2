"""What accelerators have, from the data sheets of their makers: for estimates, and never for a claim.

NVIDIA: data sheets of A100, H100, H200 and B200 (SXM; dense bf16). Google: Cloud TPU documentation of v5e, v5p and v6e.
"""

from __future__ import annotations

from typing import NamedTuple

GIB = 2**30


class Accelerator(NamedTuple):
    """One device.

    Attributes:
        memory: Bytes.
        flops: bf16 operations per second, dense.
        near: Bytes per second to devices of the same node, one direction.
        far: Bytes per second to other nodes, one direction.
    """

    memory: int
    flops: float
    near: float
    far: float


ACCELERATORS = {
    "a100": Accelerator(80 * GIB, 312e12, 300e9, 25e9),
    "h100": Accelerator(80 * GIB, 989e12, 450e9, 50e9),
    "h200": Accelerator(141 * GIB, 989e12, 450e9, 50e9),
    "b200": Accelerator(180 * GIB, 2250e12, 900e9, 50e9),
    "v5e": Accelerator(16 * GIB, 197e12, 200e9, 200e9),
    "v5p": Accelerator(95 * GIB, 459e12, 600e9, 600e9),
    "v6e": Accelerator(32 * GIB, 918e12, 448e9, 448e9),
}

USED = 0.4
"""The share of these operations that large networks reach (torchtitan: 0.33 to 0.58)."""


def seconds(
    device: Accelerator, *, operations: float, beside: int, between: int, is_near: bool
) -> float:
    """Return about how long a step takes: sums of shards beside computing, those of split layers between.

    Args:
        device: Each one.
        operations: Of a step on one device.
        beside: Bytes that it sends while it computes.
        between: Bytes for which it waits.
        is_near: Whether all devices are of one node.

    >>> round(seconds(ACCELERATORS["h100"], operations=989e12, beside=0, between=0, is_near=True), 1)
    2.5
    """
    computing = operations / (device.flops * USED)
    return max(computing, beside / (device.near if is_near else device.far)) + between / device.near
