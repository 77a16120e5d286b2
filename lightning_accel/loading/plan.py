"""A way of making batches, as plain data: what `choose` takes, what is stored, and what `FastLoading` is given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning_accel.arguments import flag, whole
from lightning_accel.errors import explain


class LoadingPlan(NamedTuple):
    """How batches are made; what is `None` stays as the DataLoader has it.

    Attributes:
        in_memory: Whether they are looked up in tensors instead of read.
        num_workers: How many processes read them.
        pin_memory: Whether they come in pinned memory.

    >>> LoadingPlan(num_workers=2, pin_memory=True).label, LoadingPlan().label
    ('workers=2, pinned', 'as is')
    """

    in_memory: bool = False
    num_workers: int | None = None
    pin_memory: bool | None = None

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> LoadingPlan:
        """Read `to_dict`'s form.

        Raises:
            TypeError: A value is of another kind.
            ValueError: A name is unknown, a number negative, or nothing is asked for.

        >>> LoadingPlan.from_dict({"num_workers": 2}) == LoadingPlan(num_workers=2)
        True
        """
        odd = sorted(str(name) for name in plain if name not in cls._fields)
        if odd or not plain:
            found = ", ".join(odd) or "nothing"
            raise ValueError(
                explain("this is no way of loading", found, f"use {list(cls._fields)}")
            )
        plan = cls(**plain)
        flag("in_memory", plan.in_memory)
        whole("num_workers", plan.num_workers, least=0, none=True)
        flag("pin_memory", plan.pin_memory, none=True)
        return plan

    def to_dict(self) -> dict[str, Any]:
        """Return what is asked for.

        >>> LoadingPlan(in_memory=True).to_dict()
        {'in_memory': True}
        """
        plain = self._asdict()
        plain["in_memory"] = self.in_memory or None
        return {name: value for name, value in plain.items() if value is not None}

    @property
    def label(self) -> str:
        """The plan in words."""
        if self.in_memory:
            return "resident"
        workers = [] if self.num_workers is None else [f"workers={self.num_workers}"]
        return ", ".join([*workers, *(["pinned"] if self.pin_memory else [])]) or "as is"

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `FastLoading` that ask for it.

        >>> LoadingPlan(num_workers=2, pin_memory=True).arguments()
        {'resident': False, 'num_workers': 2, 'pin_memory': True}
        """
        if self.in_memory:  # where it is another dataset, nobody vouches for it
            return {"num_workers": False, "pin_memory": False}
        asked = {"num_workers": self.num_workers, "pin_memory": self.pin_memory}
        return {"resident": False, **{name: v for name, v in asked.items() if v is not None}}


AS_IS = LoadingPlan()
"""What the DataLoader does by itself."""
