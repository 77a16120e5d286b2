"""Files of a trained network that run without its code, proved against it and measured beside it."""

from typing import TYPE_CHECKING

from lightning_accel.export.bundle import Bundle, load_bundle
from lightning_accel.export.deploy import deploy
from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel.export.callbacks.deploy import Deploy

__all__ = ["Bundle", "Deploy", "deploy", "load_bundle"]


__getattr__ = lazily(__name__, {"Deploy": "callbacks.deploy"})
