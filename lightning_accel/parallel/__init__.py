"""Many devices: any LightningModule sharded as it is, equal to one process."""

from typing import TYPE_CHECKING

from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel.parallel.sharding import Sharded, shard
    from lightning_accel.parallel.strategies.accel_ddp_strategy import AccelDDPStrategy
    from lightning_accel.parallel.strategies.fsdp2_strategy import FSDP2Strategy
    from lightning_accel.parallel.units import Units, find_units
    from lightning_accel.parallel.uses import Uses, uses_of

__all__ = [
    "AccelDDPStrategy",
    "FSDP2Strategy",
    "Sharded",
    "Units",
    "Uses",
    "find_units",
    "shard",
    "uses_of",
]

__getattr__ = lazily(
    __name__,
    {
        "Sharded": "sharding",
        "shard": "sharding",
        "AccelDDPStrategy": "strategies.accel_ddp_strategy",
        "FSDP2Strategy": "strategies.fsdp2_strategy",
        "Units": "units",
        "find_units": "units",
        "Uses": "uses",
        "uses_of": "uses",
    },
)
