"""A language model of half the depth learns from a larger one, block by block, and the same without it."""

from argparse import ArgumentParser

from data.pydoc import Pydoc
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from models.gpt import GPT

from lightning_accel import Distillation


def bits_per_byte(model: LightningModule, data: Pydoc, epochs: int, *callbacks: Callback) -> float:
    """Train, and return how many bits the model needs for a byte of unseen text."""
    trainer = Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(model, data)
    return trainer.test(model, data, verbose=False)[0]["test/bits_per_byte"]


ArgumentParser(description=__doc__).parse_args()  # no words: what to change stands here
seed_everything(0)
teacher = GPT(context=64, dim=64, depth=4)
known = bits_per_byte(teacher, Pydoc(context=64, num_windows=1600), 4)

distillation = Distillation(
    teacher,
    {
        "kd": {"weight": 0.9, "temperature": 1.0},
        "fitnet": {
            "weight": 1.0,
            "layers": "blocks.*",
        },  # block 0 from block 1, block 1 from block 3
    },
    task_weight=0.1,
)
found = {}
for name, callbacks in (("alone", []), ("and teacher", [distillation])):
    seed_everything(1)  # both start from the same weights and see the same text
    few = Pydoc(context=64, num_windows=320, seed=1)
    found[name] = bits_per_byte(GPT(context=64, dim=64, depth=2), few, 8, *callbacks)

print(f"bits per byte of the teacher, which saw 100 kB of text: {known:.3f}")
for name, bits in found.items():
    print(f"student {name}, 20 kB: {bits:.3f}")
