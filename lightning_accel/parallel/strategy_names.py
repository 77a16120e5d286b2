"""The names by which a Trainer knows our strategies: `Trainer(strategy="accel_fsdp", devices=2)`."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import StrategyRegistry


def register() -> None:
    """Tell Lightning the names; a second time changes nothing."""
    for name, make, description in (
        ("accel_auto", _auto, "copies where they fit into memory, else shards, by a plan"),
        ("accel_ddp", _ddp, "DDP that finds by itself whether weights are unused"),
        ("accel_fsdp", _fsdp, "FSDP2 of any LightningModule, without a change to it"),
        ("accel_tensor", _tensor, "layers split over all devices of a node, found in the network"),
        ("accel_fsdp_tensor", _fsdp_tensor, "layers split over two devices, FSDP2 over the others"),
    ):
        StrategyRegistry.register(name, make, description, override=True)


def _auto(**given: Any) -> Any:
    from lightning_accel.parallel.strategies.auto_strategy import AutoStrategy

    return AutoStrategy(**given)


def _ddp(**given: Any) -> Any:
    from lightning_accel.parallel.strategies.accel_ddp_strategy import AccelDDPStrategy

    return AccelDDPStrategy(**given)


def _fsdp(**given: Any) -> Any:
    from lightning_accel.parallel.strategies.fsdp2_strategy import FSDP2Strategy

    return FSDP2Strategy(**given)


def _tensor(**given: Any) -> Any:
    from lightning_accel.parallel.strategies.tensor_parallel_strategy import TensorParallelStrategy

    return TensorParallelStrategy(**given)


def _fsdp_tensor(**given: Any) -> Any:
    return _tensor(**{"tensor_parallel_size": 2, **given})
