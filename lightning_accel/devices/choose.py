"""The accelerator that a configuration names, as a Trainer finds it on this machine; what is not there is refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.accelerators import CUDAAccelerator, MPSAccelerator, XLAAccelerator

from lightning_accel.devices.torch_accelerator import NAME
from lightning_accel.errors import Unsupported
from lightning_accel.precision.plugins.xla_precision import XlaPrecision


def accelerator_of(name: Any) -> Any:
    """Return what to tell Lightning for an accelerator: a TPU comes by torch_xla, or by `torch.accelerator`.

    Raises:
        Unsupported: It is not there.

    >>> accelerator_of("cpu")
    'cpu'
    """
    if name == "tpu" and not _has_xla():
        if _kind() != "tpu":
            raise Unsupported(
                "accelerator=tpu wants a TPU that torch_tpu or torch_xla finds, and neither does",
                f"torch {torch.__version__} on this machine, and {_kind() or 'no other device'}",
                "on a TPU machine `pip install torch_tpu`, which goes with this torch; elsewhere say accelerator=auto",
            )
        return NAME
    if name == "gpu" and not (CUDAAccelerator.is_available() or MPSAccelerator.is_available()):
        kind = _kind()
        raise Unsupported(
            "accelerator=gpu wants a GPU of NVIDIA, AMD or Apple that torch finds, and there is none",
            f"torch {torch.__version__} on this machine, and {kind or 'no other device'}",
            f"say accelerator={NAME}, which takes the {kind}" if kind else "say accelerator=auto",
        )
    return name


def precision_on_xla(node: Mapping[str, Any]) -> XlaPrecision | None:
    """Return what computes as a Trainer's arguments ask on XLA: Lightning's refuses "bf16-mixed", and has no "bf16-true".

    >>> precision_on_xla({"accelerator": "tpu", "precision": "bf16-mixed"})
    XlaPrecision('bf16-mixed')
    """
    asked = node.get("precision")
    if node.get("accelerator") != "tpu" or asked not in ("bf16-mixed", "bf16-true"):
        return None
    return XlaPrecision(asked)


def _kind() -> str:
    found = torch.accelerator.current_accelerator(check_available=True)
    return found.type if found is not None else ""


def _has_xla() -> bool:
    try:
        return bool(XLAAccelerator.is_available())
    except (
        TypeError,
        OSError,
    ):  # torch_xla asks a server of Google's, and trips over what it does not say
        return False
