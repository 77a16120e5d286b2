"""What is to be done as soon as a module of Lightning has been imported, which this package itself does not import.

Two things must be known to Lightning before anybody uses this package: LightningCLI knows a class by its short name
once it is loaded (`class_path: StructuredPruning`), and a Trainer knows `strategy="accel_fsdp"` once it is registered.
No way is known to do so without an import: a program that never says `import lightning_accel` writes
`class_path: lightning_accel.StructuredPruning`, and passes the strategy itself.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(name: str, do: Callable[[], None]) -> None:
    """Call `do` as soon as a module has been imported, now if it is already."""
    if name in sys.modules:
        do()
    else:
        sys.meta_path.insert(0, _Watch(name, do))


class _Watch(MetaPathFinder):
    """Waits for one import, lets the others find that module, and is gone."""

    def __init__(self, name: str, do: Callable[[], None]) -> None:
        self.name, self.do = name, do

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then_do(module: ModuleType) -> None:
                execute(module)
                self.do()

            spec.loader.exec_module = then_do  # type: ignore[method-assign]
        return spec
