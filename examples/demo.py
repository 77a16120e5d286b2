"""The main job in one go, on real handwritten digits, and what it gave, measured.

A dense network is trained as the yardstick. Then the same module is trained under mixed precision,
loses more than half of its arithmetic in mid-training, is interrupted, comes back from its checkpoint
in a fresh Trainer, and recovers. `make demo` runs this; the report lands in outputs/demo/.
"""

from __future__ import annotations

import logging
import time
import warnings
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from data.digits import Digits
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from models.resnet import ResNet

from lightning_accel import AccelReport, AutocastPrecision, StructuredPruning
from lightning_accel.pruning.target import Macs

EPOCHS, PRUNE_BEFORE, INTERRUPT_AFTER = 20, 8, 10
OUTPUT = Path("outputs/demo")


class Narrator(Callback):
    """One line per epoch."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = float(trainer.callback_metrics["val/acc"])
        print(f"  epoch {trainer.current_epoch:2d}  validation accuracy {accuracy:.3f}", flush=True)

    def on_model_edit_end(self, trainer: Trainer, pl_module: LightningModule, receipt: Any) -> None:
        print(f"  -- pruned: {len(receipt.changes)} tensors are smaller now --", flush=True)


class Interrupt(Callback):
    """Stop a fit early, as a preempted machine would."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == INTERRUPT_AFTER


def trainer(*callbacks: Callback, **kwargs: Any) -> Trainer:
    return Trainer(
        accelerator="auto",
        devices=1,
        max_epochs=EPOCHS,
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=OUTPUT,
        callbacks=[Narrator(), *callbacks],
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        **kwargs,
    )


def accelerated(*callbacks: Callback) -> Trainer:
    checkpoint = ModelCheckpoint(OUTPUT, filename="last", enable_version_counter=False)
    pruning = StructuredPruning(target=Macs(0.45), when=PRUNE_BEFORE)
    return trainer(pruning, checkpoint, *callbacks, plugins=[AutocastPrecision("auto")])


def main() -> None:
    ArgumentParser(description=__doc__).parse_args()  # no words
    warnings.filterwarnings("ignore", module="lightning")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    started = time.perf_counter()

    print("1. The yardstick: a dense network, trained plainly")
    seed_everything(0, verbose=False)
    dense, data, plain = ResNet(), Digits(), trainer()
    plain.fit(dense, data)
    yardstick = {k: float(v) for k, v in plain.test(dense, data, verbose=False)[0].items()}

    print(f"2. The same module under mixed precision, pruned before epoch {PRUNE_BEFORE}")
    seed_everything(0, verbose=False)
    accelerated(Interrupt()).fit(ResNet(), Digits())

    print("3. Interrupted. A fresh module and a fresh Trainer go on from the checkpoint")
    model, data = ResNet(), Digits()
    last = accelerated(AccelReport(OUTPUT / "report.json", dense_metrics=yardstick))
    last.fit(model, data, ckpt_path=OUTPUT / "last.ckpt")
    last.test(model, data, verbose=False)

    print((OUTPUT / "report.md").read_text())
    print(f"{OUTPUT / 'report.json'}, in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
