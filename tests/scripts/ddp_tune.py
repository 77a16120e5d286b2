"""Two processes that tune: `ddp_tune.py FOLDER CASE`, a JSON file per rank.

CASE is `takes` (the first process picks settings, the second follows, and a resumed run too), `fails` (the
module cannot be copied on the first process), `gathers` (the step calls a collective), or `real` (a search).
"""

from __future__ import annotations

import json
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AutoTune
from lightning_accel.measure.race import Ratio
from lightning_accel.tuning import Settings, in_trainer
from lightning_accel.tuning.report import WaterfallStep
from lightning_accel.tuning.search import SearchResult

warnings.simplefilter("ignore")
torch.set_num_threads(1)

MANY = Settings(precision="bf16-mixed", matmul_precision="medium", fused_optimizer="fused")


class Net(LightningModule):
    def __init__(self, case: str) -> None:
        super().__init__()
        self.net, self.case = nn.Linear(8, 4), case

    def on_train_start(self) -> None:
        self.runs = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.case == "gathers":
            self.gathered = self.all_gather(loss.detach()).tolist()
        self.log("loss", loss, sync_dist=True)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), 0.01)


class Picks:
    """Runs two candidates, and picks."""

    searches = 0

    def __init__(self, build: Any, **_: Any) -> None:
        self.build = build

    def run(self, contests: Any, skipped: Any) -> SearchResult:
        Picks.searches += 1
        for settings in (Settings(), MANY):
            replica = self.build(settings)
            replica.gradients(0)
            replica.first_step()
        bars = [WaterfallStep("plain", 2.0), WaterfallStep("+ all", 1.0, 2.0, 1.9, 2.1, 2.0)]
        return SearchResult(MANY, [], bars, Ratio(1.0, 1.0, 1.0), [])


class Looks(Callback):
    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.plugin = type(trainer.precision_plugin).__name__
        self.matmul = torch.get_float32_matmul_precision()
        self.fused = [g["fused"] for o in trainer.optimizers for g in o.param_groups]


def run(folder: Path, case: str, epochs: int, path: Path | None = None) -> dict[str, Any]:
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64, 8), torch.arange(64) % 4), 4, shuffle=True)
    tuning, looks = AutoTune(budget_s=0.2, budget_share=1e9, cache=False), Looks()
    if case == "real":
        tuning = AutoTune(
            budget_s=0.2, budget_share=1e9, cache=folder / "answers", techniques="fused_optimizer",
            report=folder / "tuned.yaml",
        )  # fmt: skip
    trainer = Trainer(
        accelerator="cpu", devices=2, max_epochs=epochs, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, callbacks=[tuning, looks],
        strategy=DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=900)),
    )  # fmt: skip
    model = Net(case)
    if case == "fails" and trainer.global_rank == 0:
        model.numbers = (i for i in range(3))  # which cannot be copied
    trainer.fit(model, data, ckpt_path=path)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")
    assert tuning.report is not None
    return {
        "weights": model.net.weight.tolist(), "settings": tuning.settings.to_dict(),
        "notes": list(tuning.report.notes), "plugin": looks.plugin, "matmul": looks.matmul,
        "fused": looks.fused, "after": torch.get_float32_matmul_precision(),
        "callbacks": len(trainer.callbacks), "gathered": getattr(model, "gathered", None),
        "metrics": {k: float(v) for k, v in trainer.callback_metrics.items()},
    }  # fmt: skip


if __name__ == "__main__":
    folder, case = Path(sys.argv[1]), sys.argv[2]
    if case != "real":
        in_trainer.Search = Picks  # type: ignore[attr-defined,misc,assignment]
        in_trainer.choose_loading = lambda *_: ("plain", 1.0, [])  # would ask a real clock
    found = {"whole": run(folder, case, 2)}
    if case == "takes":
        run(folder, case, 1)
        found["resumed"] = run(folder, case, 2, folder / "1.ckpt")
    if case == "real":
        found["again"] = run(folder, case, 2)
    found["searches"] = {"count": Picks.searches}
    rank = torch.distributed.get_rank()
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
