"""Manual optimization of a sharded module: three places at which FSDP2 waits for an event that never comes.

FSDP2 does its work around forward. A manual step runs backward and optimizers before `training_step`, the forward of
the root, has returned. Without the repairs below gradients of the root's own weights are not averaged, later parts of
the step compute with weights from before the optimizer's step, and toggled weights learn or rest at the wrong time;
none of it raises.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_accel.errors import AccelError
from lightning_accel.parallel.write_back import WriteBack

_TOGGLES = ("toggle_optimizer", "untoggle_optimizer")


class Manual:
    """Stands around backward, step and toggles of a sharded module.

    Args:
        root: The user's module, sharded.
        write_back: Keeps what the step writes into its weights.
    """

    def __init__(self, root: LightningModule, write_back: WriteBack) -> None:
        assert isinstance(root, FSDPModule)
        self._root: Any = root
        self._write_back = write_back
        self._seen = 0
        """Backward passes that went through the strategy."""
        self.stands = False

    def begin(self) -> None:
        """Let toggles reach the gathered weights too, which take `requires_grad` over only when gathered."""
        self.stands = True
        for name in _TOGGLES:
            object.__setattr__(self._root, name, self._around(getattr(self._root, name)))

    def _around(self, method: Any) -> Any:
        def toggle(*args: Any, **kwargs: Any) -> Any:
            self._write_back.commit()
            self._root.reshard()
            try:
                return method(*args, **kwargs)
            finally:
                self._gather()

        return toggle

    def before_backward(self, loss: Tensor) -> Tensor:
        """Hook the loss, since no output of the root has been hooked yet."""
        self._seen += 1
        return self._root._get_fsdp_state()._register_pre_backward_hook(loss)

    def after_backward(self) -> None:
        """Gather the root's own weights again for the rest of the step."""
        self._gather()

    def before_step(self) -> None:
        """Keep what was written by hand, and refuse a step after a backward that went past the strategy.

        Raises:
            AccelError: There was none by `manual_backward` yet.
        """
        self._write_back.commit()
        if not self._seen:
            raise AccelError(
                "gradients of a sharded module are averaged in `manual_backward`",
                "an optimizer step after none",
                "call `self.manual_backward(loss)` in place of `loss.backward()`",
            )

    def after_step(self) -> None:
        """Gather what the optimizer has just changed."""
        self._root.reshard()
        self._gather()

    def _gather(self) -> None:
        self._root.unshard()
        self._write_back.begin()

    def end(self) -> None:
        """Give the module its own methods back."""
        for name in _TOGGLES:
            vars(self._root).pop(name, None)
