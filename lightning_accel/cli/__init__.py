"""The command `lightning-accel`."""

from lightning_accel.cli.main import main

__all__ = ["main"]
