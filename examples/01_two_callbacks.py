"""Add two callbacks to a plain Trainer: prune in mid-training, and report what it gave."""

from argparse import ArgumentParser

from data.digits import Digits
from lightning.pytorch import Trainer, seed_everything
from models.resnet import ResNet

from lightning_accel import AccelReport, StructuredPruning

ArgumentParser(description=__doc__).parse_args()  # no words: what to change stands here
seed_everything(0)
callbacks = [StructuredPruning(ratio=0.5, when=8), AccelReport("outputs/report.json")]
trainer = Trainer(max_epochs=20, callbacks=callbacks, logger=False, enable_checkpointing=False)
trainer.fit(model := ResNet(), data := Digits())
trainer.test(model, data)
