"""Random numbers between the layers that make split units and those that read them: each process has its own there.

With one random state for all, the units of two processes would be dropped together; with a state of its own for each,
what all processes compute alike would come apart. So within a region a process draws from a state that follows from the
common one, and outside the common one goes on, as Megatron-LM does it.
"""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import torch
from torch import nn

_PRIME = 1_000_003


class _Opened(NamedTuple):
    region: int
    outer: list[Any]
    inner: list[Any]
    device: torch.device


class OwnDraws:
    """Gives the regions in which random numbers are drawn a state of their own.

    Args:
        rank: Number of this process in its group.

    Attributes:
        regions: Those in which it was seen that numbers are drawn.
        watches: Whether all regions are tried.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.regions: set[int] = set()
        self.watches = False
        self._opened: _Opened | None = None

    def begin(self, region: int, module: nn.Module) -> None:
        """Go over to this process's own state, unless a region is open."""
        if self._opened is not None or not (self.watches or region in self.regions):
            return
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        outer = _states(device)
        seed = zlib.crc32(b"".join(s.numpy().tobytes() for s in outer), region)
        torch.default_generator.manual_seed(seed + self._rank * _PRIME)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed + self._rank * _PRIME)
        self._opened = _Opened(region, outer, _states(device), device)

    def end(self, region: int) -> None:
        """Go back to the common state, one draw later if there were any."""
        if self._opened is None or self._opened.region != region:
            return
        _, outer, inner, device = self._opened
        self._opened = None
        drew = not all(map(torch.equal, inner, _states(device)))
        torch.default_generator.set_state(outer[0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(outer[1], device)
        if drew:
            self.regions.add(region)
            torch.rand(1)
            if device.type == "cuda":
                torch.rand(1, device=device)

    def reset(self) -> None:
        """Close what is open."""
        if self._opened is not None:
            self.end(self._opened.region)


def _states(device: torch.device) -> list[torch.Tensor]:
    states = [torch.default_generator.get_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states
