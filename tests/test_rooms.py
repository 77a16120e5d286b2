"""Where users find things: as they find Lightning's."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.plugins.environments import ClusterEnvironment
from lightning.pytorch.plugins.precision.precision import Precision

import lightning_accel
from lightning_accel import callbacks, plugins


def _public(base: type) -> set[str]:
    for module in pkgutil.walk_packages(lightning_accel.__path__, "lightning_accel."):
        if {"callbacks", "plugins", "objective"} & set(module.name.split(".")):
            importlib.import_module(module.name)
    found: set[type[Any]] = set()
    waiting = [base]
    while waiting:
        below = waiting.pop().__subclasses__()
        waiting += below
        found |= set(below)
    ours = {c for c in found if c.__module__.startswith("lightning_accel.")}
    bases = ("bridge.technique", "bridge.model_edit", "bridge.paced", "bridge.evaluation", "attach")
    return {
        c.__name__
        for c in ours
        if not c.__name__.startswith("_") and not c.__module__.endswith((*bases, "tuning.api"))
    }


def test_callbacks_and_plugins_have_a_room_each() -> None:
    assert set(callbacks.__all__) == _public(Callback)
    assert set(plugins.__all__) == _public(Precision) | _public(ClusterEnvironment)
    for room in (callbacks, plugins):
        for name in room.__all__:
            assert getattr(room, name) is getattr(lightning_accel, name)
