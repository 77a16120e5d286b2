"""Which classes of this package a configuration may name: those that are settings of a training.

A class is public under the package itself, under its technique's folder and at its home:
`lightning_accel.Macs`, `lightning_accel.pruning.Macs`, `lightning_accel.pruning.target.Macs`. Others (stores,
reports, readers of files) are parts, whose arguments were never meant to come from a file.
"""

from __future__ import annotations

from typing import Any

import lightning_accel

_MORE = {"GreedySwapSelector": "pruning.reconstruction", "TorchPruner": "pruning.spelled"}
_PARTS = {"Bundle"}
CLASSES = {
    name: home
    for name, home in {**lightning_accel._HOMES, **_MORE}.items()
    if name[0].isupper() and name not in _PARTS
}
"""Each class and the module that defines it; functions are never named in a configuration."""


def _names(name: str, home: str) -> list[str]:
    folders = home.split(".")
    return [
        ".".join(["lightning_accel", *folders[:depth], name]) for depth in range(len(folders) + 1)
    ]


OURS = frozenset(full for name, home in CLASSES.items() for full in _names(name, home))


def is_ours(target: Any) -> bool:
    """Tell whether a `_target_` names a public class of this package.

    >>> is_ours("lightning_accel.AccelReport"), is_ours("lightning_accel.loading.tensor_store.TensorStore")
    (True, False)
    """
    return isinstance(target, str) and target in OURS
