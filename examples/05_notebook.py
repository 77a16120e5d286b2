# %% [markdown]
# # Prune a network, and see what that gave
#
# A notebook as a script: cells begin with `# %%`, which VS Code, Jupyter (by jupytext) and Spyder know.
# In a notebook the last line of a cell is shown, and what this package returns shows itself as a table.

# %%
"""A notebook as a script: prune a network by hand and in a fit, and look at receipts, reports and charts."""

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AccelReport, StructuredPruning, prune

try:  # where there is a notebook, its own function
    from IPython.display import display
except ImportError:

    def display(*shown: Any) -> None:
        """Print what a notebook would draw."""
        print(*(one.table().to_text() if hasattr(one, "table") else one for one in shown))


if __name__ == "__main__" and "get_ipython" not in globals():
    ArgumentParser(description=__doc__).parse_args()  # no words: what to change stands here
_ = seed_everything(0, verbose=False)

# %% [markdown]
# ## By hand
#
# An editing verb works in place and returns a receipt: every change, and what was left alone and why.

# %%
network = nn.Sequential(
    nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)
)
receipt = prune(network, example=torch.randn(8, 32), ratio=0.5)
display(receipt)

# %% [markdown]
# ## In a fit
#
# The report measures the network as it was against the network as it is, side by side.


# %%
class Classifier(LightningModule):
    """Written by someone who knows nothing of pruning."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(32, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4)
        )

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        """Return the loss of a batch."""
        x, y = batch
        output = self.net(x)
        self.log("train/acc", (output.argmax(1) == y).float().mean(), on_step=False, on_epoch=True)
        return nn.functional.cross_entropy(output, y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)


x = torch.randn(512, 32)
y = (x @ torch.randn(32, 4)).argmax(1)
data = DataLoader(TensorDataset(x, y), batch_size=64)
report = AccelReport("notebook/report.json", budget_s=0.5)
trainer = Trainer(
    accelerator="cpu",
    max_epochs=6,
    callbacks=[StructuredPruning(ratio=0.5, when=3), report],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
    enable_model_summary=False,
)
trainer.fit(Classifier(), data)
display(report.report)

# %% [markdown]
# ## As a page
#
# `notebook/report.html` shows all of it: what was done, the metric over time, the width of each layer. Every chart is a
# file too, for a paper or a slide.

# %%
from lightning_accel.pages import read_run  # noqa: E402
from lightning_accel.pages.page import drawings  # noqa: E402

charts = drawings([read_run("notebook")])
Path("notebook/layers.svg").write_text(charts["layers"].to_svg(), encoding="utf-8")
print(f"charts: {', '.join(sorted(charts))}")
