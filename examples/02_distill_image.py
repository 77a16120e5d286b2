"""A tiny network learns digits from a hundred images and a larger network, and the same without it."""

from argparse import ArgumentParser

from data.digits import Digits
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from models.resnet import ResNet

from lightning_accel import Distillation


def accuracy(model: LightningModule, data: Digits, epochs: int, *callbacks: Callback) -> float:
    """Train, and return the share of the test part that is right."""
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data)
    return trainer.test(model, data, verbose=False)[0]["test/acc"]


ArgumentParser(description=__doc__).parse_args()  # no words: what to change stands here
seed_everything(0)
teacher = ResNet(widths=(32, 64))
known = accuracy(teacher, Digits(), 6)

alone: list[float] = []
taught: list[float] = []
for seed in range(3):
    for found, callbacks in ((alone, []), (taught, [Distillation(teacher, "kd", task_weight=0.1)])):
        seed_everything(seed)  # both start from the same weights and see the same images
        few = Digits(batch_size=50, num_train=100, seed=seed)
        found.append(accuracy(ResNet(widths=(8, 16), depth=1), few, 30, *callbacks))

print(f"test accuracy of the teacher, which saw all images: {known:.3f}")
for name, found in (("alone", alone), ("and teacher", taught)):
    each = ", ".join(f"{value:.3f}" for value in found)
    print(f"student {name}, 100 images: {sum(found) / len(found):.3f} ({each})")
