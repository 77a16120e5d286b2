"""A fit on two devices that Lightning does not know, by DDP: `toy_ranks.py FOLDER LIBRARY`, judged by test_devices.py."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import tiny
import torch
from lightning.pytorch import Trainer
from toy import device

warnings.simplefilter("ignore")
folder, library = map(Path, sys.argv[1:3])
sys.argv[1:3] = [str(library), ""]
import toy_fits  # noqa: E402

device.register_wires()
torch.manual_seed(0)
module = toy_fits.Module()
given = {**tiny.silent(folder), "accelerator": "accel", "devices": 2, "strategy": "accel_ddp"}
trainer = Trainer(**given)
trainer.fit(module, toy_fits.data())
torch.manual_seed(0)
alone = toy_fits.Module()
Trainer(**tiny.silent(folder)).fit(alone, toy_fits.data(8))
found = {
    "alone": toy_fits.weights(alone),
    "backend": torch.distributed.get_backend(),
    "root": str(trainer.strategy.root_device),
    "seen": sorted(module.seen),
    "weights": toy_fits.weights(module),
}
(folder / f"{os.environ['LOCAL_RANK']}.json").write_text(json.dumps(found))
