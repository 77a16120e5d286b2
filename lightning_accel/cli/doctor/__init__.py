"""`lightning-accel doctor`: what slows a training, with numbers, and what to do first.

    lightning-accel doctor mymodels.lit:build
    lightning-accel doctor --config conf/config.yaml --allow models. --allow data. model=vit --json
    lightning-accel doctor --parallel --devices 2

`build()` returns a LightningModule and its data, or a LightningModule that has its own `train_dataloader`. For about a
minute steps of a copy are followed from batch to batch: data, device, forward, backward, optimizer; lines that wait or
print; graphs; memory; precision; cores. Nothing is trained, searched or written. Both run the code that they name.
"""

from lightning_accel.cli.doctor.command import add, run

__all__ = ["add", "run"]
