"""Manual optimization of a sharded module: three places at which FSDP2 waits for an event that never comes.

FSDP2 does its work around forward. A manual step runs backward and optimizers before `training_step`, the forward of
the root, has returned. Without the repairs below gradients of the root's own weights are not averaged, later parts of
the step compute with weights from before the optimizer's step, and toggled weights learn or rest at the wrong time;
none of it raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_accel.errors import AccelError
from lightning_accel.parallel.write_back import WriteBack

_TOGGLES = ("toggle_optimizer", "untoggle_optimizer")


class Manual:
    """Stands around backward, step and toggles of a sharded module.

    The weights of the root are gathered when one of their modules is called, and let go by each backward, so that
    gradients can be read, scaled and clipped between backward and step.

    Args:
        root: The user's module, sharded.
        units: Names of the modules that are gathered by themselves.
        write_back: Keeps what the step writes into its weights.
    """

    def __init__(self, root: LightningModule, units: Sequence[str], write_back: WriteBack) -> None:
        assert isinstance(root, FSDPModule)
        self._root: Any = root
        self._write_back = write_back
        self._seen = 0
        """Backward passes that went through the strategy."""
        self.stands = False
        below = tuple(f"{name}." for name in units)
        self._handles = [
            module.register_forward_pre_hook(self._before_call, prepend=True)
            for name, module in root.named_modules()
            if name and name not in units and not name.startswith(below)
            and any(True for _ in module.parameters(recurse=False))
        ]  # fmt: skip

    def begin(self) -> None:
        """Let toggles reach the gathered weights too, which take `requires_grad` over only when gathered."""
        self.stands = True
        for name in _TOGGLES:
            object.__setattr__(self._root, name, self._around(getattr(self._root, name)))

    def _around(self, method: Any) -> Any:
        def toggle(*args: Any, **kwargs: Any) -> Any:
            self._write_back.let_go()
            try:
                return method(*args, **kwargs)
            finally:
                self._gather()

        return toggle

    def _before_call(self, *_: Any) -> None:
        if self._root.training and torch.is_grad_enabled():
            self._gather()

    def before_backward(self, loss: Tensor) -> Tensor:
        """Hook the loss, since no output of the root has been hooked yet."""
        self._seen += 1
        return self._root._get_fsdp_state()._register_pre_backward_hook(loss)

    def before_step(self, *, closes: bool) -> None:
        """Refuse a step after a backward that went past the strategy.

        Args:
            closes: The optimizer runs backward itself, in a closure.

        Raises:
            AccelError: There was none by `manual_backward` yet.
        """
        if not self._seen and not closes:
            raise AccelError(
                "gradients of a sharded module are averaged in `manual_backward`",
                "an optimizer step after none",
                "call `self.manual_backward(loss)` in place of `loss.backward()`",
            )

    def after_step(self) -> None:
        """Gather what the optimizer has just changed."""
        self._gather()

    def _gather(self) -> None:
        if self._write_back.is_let_go:
            self._root.unshard()
            self._write_back.begin()

    def end(self) -> None:
        """Give the module its own methods back."""
        for handle in self._handles:
            handle.remove()
        for name in _TOGGLES:
            vars(self._root).pop(name, None)
