"""Between the techniques and Lightning's Trainer."""

from lightning_accel.bridge.example import batches_of, find_example
from lightning_accel.bridge.model_edit import ModelEdit, commit
from lightning_accel.bridge.restore import load_from_checkpoint, pristine
from lightning_accel.bridge.technique import Context, Technique
from lightning_accel.surgery.call import Call

__all__ = [
    "Call",
    "Context",
    "ModelEdit",
    "Technique",
    "batches_of",
    "commit",
    "find_example",
    "load_from_checkpoint",
    "pristine",
]
