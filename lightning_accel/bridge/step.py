"""Work that stands around a method of the user's module, on this one instance, until it is taken off.

`training_step` and `manual_backward` are the only places where the user's loss can be added to: Lightning
looks them up on the instance within the forward of DDP, so that the reducer sees all of the graph. Copies
and pickles of the module have the user's own method.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule


class Around:
    """Calls `work(method, *args, **kwargs)` in place of a method of a module.

    Args:
        pl_module: The user's module.
        name: The method's name.
        work: Gets the method as its first argument.
    """

    def __init__(self, pl_module: LightningModule, name: str, work: Callable[..., Any]) -> None:
        self.__wrapped__ = getattr(pl_module, name)  # Lightning reads its signature
        self._own = vars(pl_module).get(name)
        self._module, self._name, self._work = pl_module, name, work
        vars(pl_module)[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._work(self.__wrapped__, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.__wrapped__, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self._module, self._name)

    def remove(self) -> None:
        """Give the module its method back; later wrappers of others stay."""
        if vars(self._module).get(self._name) is not self:
            self._work = _plainly
        elif self._own is None:
            del vars(self._module)[self._name]
        else:
            vars(self._module)[self._name] = self._own


def _plainly(method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return method(*args, **kwargs)
