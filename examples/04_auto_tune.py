"""Let a Trainer find out what makes it faster here: the same GPT, trained plainly and tuned.

The search takes seconds and is remembered, so the second run of this script starts at once.
"""

import time
from argparse import ArgumentParser

from data.pydoc import Pydoc
from lightning.pytorch import Callback, Trainer, seed_everything
from models.gpt import GPT

from lightning_accel import AutoTune


def train(*callbacks: Callback) -> float:
    """Train one epoch, and return the seconds."""
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=1, callbacks=[*callbacks], logger=False, enable_checkpointing=False
    )
    start = time.perf_counter()
    trainer.fit(GPT(), Pydoc())
    return time.perf_counter() - start


ArgumentParser(description=__doc__).parse_args()  # no words: what to change stands here
# So short a run does not repay a search; by default AutoTune would leave it alone and say so.
tune = AutoTune(budget_s=8, budget_share=1.0, report=["tuned.yaml", "tuned.svg"])
plain_s, tuned_s = train(), train(tune)
assert tune.report is not None
print(tune.report.to_text())
searched_s = 0.0 if tune.report.cached else tune.report.seconds
print(
    f"one epoch: {plain_s:.0f} s plainly, {tuned_s:.0f} s tuned, of which {searched_s:.0f} s to search"
)
