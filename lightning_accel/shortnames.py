"""Short names in the yaml of a LightningCLI: `class_path: StructuredPruning`.

LightningCLI knows a class by its short name once it is loaded, and this package loads none before it is
used. So all are loaded as soon as both have been imported, Lightning's command line and this package, in
whichever order. No way is known to do so without an import: a program that never says
`import lightning_accel` writes `class_path: lightning_accel.StructuredPruning`.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_CLI = "lightning.pytorch.cli"


def load_beside_cli(load: Callable[[], None]) -> None:
    """Call `load` as soon as `lightning.pytorch.cli` has been imported, now if it is already."""
    if _CLI in sys.modules:
        load()
    else:
        sys.meta_path.insert(0, _Watch(load))


class _Watch(MetaPathFinder):
    """Waits for one import, lets the others find that module, and is gone."""

    def __init__(self, load: Callable[[], None]) -> None:
        self.load = load

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _CLI:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_load(module: ModuleType) -> None:
                execute(module)
                self.load()

            spec.loader.exec_module = then_load  # type: ignore[method-assign]
        return spec
