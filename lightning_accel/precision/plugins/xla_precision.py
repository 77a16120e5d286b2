"""`XlaPrecision`: bfloat16 on XLA, mixed or whole, in this process alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from lightning.fabric.plugins.precision.utils import _DtypeContextManager
from lightning.pytorch import LightningModule
from lightning.pytorch.plugins import HalfPrecision, XLAPrecision
from lightning.pytorch.plugins.precision.precision import Precision
from torch import nn
from typing_extensions import override

from lightning_accel.arguments import one_of
from lightning_accel.errors import Unsupported
from lightning_accel.precision.mistakes import misplaced, refuse_complex

_NAMES = ("bf16-true", "bf16-mixed")


class XlaPrecision(XLAPrecision):
    """Compute in bfloat16 on XLA devices, really: by autocast, or with the module converted.

    Lightning 2.6.6 sets the variable `XLA_USE_BF16`, which torch_xla reads no more since 2.6 (pytorch/xla
    #7582), so its "bf16-true" computes in float32; and it refuses "bf16-mixed" (Lightning #17927).
    "bf16-true" has bfloat16 weights and loses updates below half an ulp; prefer "bf16-mixed" for training.

    Args:
        precision: "bf16-mixed" or "bf16-true".

    Raises:
        ValueError: The precision is unknown.
        Unsupported: When a Trainer starts on another device than XLA.

    >>> XlaPrecision("bf16-mixed").precision
    'bf16-mixed'
    """

    device_type: ClassVar[str] = "xla"

    def __init__(self, precision: str = "bf16-mixed") -> None:
        # XLAPrecision.__init__ sets variables of the process, refuses "bf16-mixed" and wants torch_xla now.
        self.precision = one_of("precision", precision, _NAMES)
        self._half = HalfPrecision("bf16-true") if precision == "bf16-true" else None

    @override
    def convert_module(self, module: nn.Module) -> nn.Module:
        """Convert in place: XLA's strategies do not look at what is returned."""
        assert isinstance(module, LightningModule)
        found = module.trainer.strategy.root_device.type
        if found != self.device_type:
            raise Unsupported(
                "XlaPrecision is for XLA devices",
                f"a Trainer on {found}",
                "use `AutocastPrecision('bf16-mixed')` or `Bf16Precision()` there",
            )
        if self._half is None:
            return module
        refuse_complex(module)
        return self._half.convert_module(module)

    @override
    def convert_input(self, data: Any) -> Any:
        return data if self._half is None else self._half.convert_input(data)

    @override
    def tensor_init_context(self) -> AbstractContextManager[Any]:
        return _DtypeContextManager(torch.bfloat16 if self._half else torch.get_default_dtype())

    @override
    def module_init_context(self) -> AbstractContextManager[Any]:
        return self.tensor_init_context()

    @contextmanager
    @override
    def forward_context(self) -> Iterator[None]:
        if self._half is not None:
            with self._half.forward_context():
                yield
        else:
            with torch.autocast(self.device_type, dtype=torch.bfloat16, cache_enabled=False):
                yield

    @override
    def teardown(self) -> None:
        """Leave the process alone: Lightning's would remove variables that it did not set."""
        Precision.teardown(self)

    @property
    def state_key(self) -> str:
        """What Lightning asks of callbacks, and so raise."""
        raise misplaced(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.precision!r})"
