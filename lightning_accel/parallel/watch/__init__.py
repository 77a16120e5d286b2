"""Processes that work together, and what to do when one of them is dead or stopped."""

from lightning_accel.parallel.watch.processes import Member, Sight, look, myself, ranks
from lightning_accel.parallel.watch.verdict import Lost, Silence, judge
from lightning_accel.parallel.watch.watch import Watch

__all__ = ["Lost", "Member", "Sight", "Silence", "Watch", "judge", "look", "myself", "ranks"]
