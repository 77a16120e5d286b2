"""Which compiler a device has."""

from __future__ import annotations

from lightning_accel.errors import Unsupported

_BY_INDUCTOR = ("cpu", "cuda", "mps", "xpu")
_OWN = {"tpu": "tpu"}


def backend_for(device_type: str) -> str:
    """Return the backend of `torch.compile` for a kind of device.

    Raises:
        Unsupported: Inductor has no code for it; or it compiles all by itself, as lazy XLA does.

    >>> backend_for("cpu")
    'inductor'
    """
    if device_type == "xla":
        # Blocks of their own are graphs of their own: 232 executions for 12 steps instead of 16.
        raise Unsupported(
            "XLA compiles whole steps by itself, and compiled blocks would only break them up",
            "BlockCompile on xla",
            "leave it out, in a configuration by `~callbacks.compilation`; or say backend='openxla'",
        )
    if device_type in _BY_INDUCTOR or device_type in _OWN:
        return _OWN.get(device_type, "inductor")
    if _inductor_knows(device_type):
        return "inductor"
    raise Unsupported(
        "torch.compile has no code for this device",
        f"no backend of inductor for {device_type}",
        "leave BlockCompile out, or pass `backend=` with the compiler that the device's package brings",
    )


def _inductor_knows(device_type: str) -> bool:
    from torch._inductor.codegen import common

    common.init_backend_registration()
    return common.get_scheduling_for_device(device_type) is not None
