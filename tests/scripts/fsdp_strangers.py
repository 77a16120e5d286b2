"""What users of sharded training report, on `FSDP2Strategy` and alone: `fsdp_strangers.py FOLDER [NAME ...]`; a JSON per rank."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from results import write_results
from sharded import GPT, Adam, Block, Experts, apart, data, made, trainer, weights
from torch import Tensor, nn

import lightning_accel as la
from lightning_accel.strategies import FSDP2Strategy

warnings.simplefilter("ignore")
torch.set_num_threads(1)
RANK = int(os.environ.get("LOCAL_RANK", "0"))
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")


def fit(make: Any, world: int, ckpt: Any = None, strategy: Any = None, **given: Any) -> Any:
    module = made(make)
    kind = FSDP2Strategy(**(strategy or {})) if world == 2 else "auto"
    ours = trainer(devices=world, strategy=kind, **given)
    ours.fit(module, data(RANK if world == 2 else 0, world), ckpt_path=ckpt)
    return module, ours


def both(make: Any, **given: Any) -> float:
    callbacks: Callable[[], Any] = given.pop("callbacks", list)
    return apart(
        weights(fit(make, 1, callbacks=callbacks(), **given)[0]),
        weights(fit(make, 2, callbacks=callbacks(), **given)[0]),
    )


class Preference(GPT):
    """DPO: two answers through the policy and through its frozen reference, before one backward."""

    def __init__(self) -> None:
        super().__init__()
        self.reference = nn.ModuleList(Block(8, 2) for _ in range(3)).requires_grad_(False)

    def score(self, blocks: nn.ModuleList, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in blocks:
            x = block(x)
        return self.head(self.norm(x)).log_softmax(-1).mean((1, 2))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        scores = [self.score(self.blocks, tokens) for tokens in batch]
        with torch.no_grad():
            known = [self.score(self.reference, tokens) for tokens in batch]
        return -F.logsigmoid(scores[0] - scores[1] - known[0] + known[1]).mean() + self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05)


class Assigned(GPT):
    """The forward of a part is kept in a variable, and called past all hooks."""

    def forward(self, tokens: Tensor) -> Tensor:
        x, runs = self.embed(tokens), [block.forward for block in self.blocks]
        for run in runs:
            x = run(x)
        return self.head(self.norm(x))


class Groups(GPT):
    """Groups with rates of their own, and a schedule over them."""

    def configure_optimizers(self) -> Any:
        rest = [*self.tok.parameters(), *self.pos.parameters(), *self.norm.parameters()]
        groups = [
            {"params": self.head.parameters(), "lr": 1e-2, "weight_decay": 0.0},
            {"params": self.blocks.parameters(), "lr": 1e-3},
            {"params": rest},
        ]
        optimizer = torch.optim.AdamW(groups, 3e-3, weight_decay=0.1)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


class Empty(GPT):
    """Weights with fewer rows than processes: some hold nothing of them."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Linear(8, 1)
        for block in self.blocks:
            block.gate = nn.Linear(8, 1)
            block.register_forward_hook(lambda m, a, y: y * m.gate(a[0]).sigmoid())

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + self.value(self.embed(batch[0])).mean()


class Unused(GPT):
    """A head that no step uses; decay and momentum must leave it where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(8, 8)


class TwoViews(GPT):
    """Global and local views go through the network one after another, and the smaller ones twice."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        views = [batch[0], batch[0][:, :4], batch[1][:, 4:]]
        means = [self(view).mean(1) for view in views]
        return (
            sum(F.mse_loss(m, means[0].detach() + 0.1) for m in means[1:]) + means[0].pow(2).mean()
        )


class Clamped(GPT):
    """Weights are kept in a box by hand after every batch, as in WGAN."""

    def on_train_batch_end(self, *_: Any) -> None:
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.3, 0.3)


class ByLoss(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.loss(batch).backward()
        self.optimizers().step()


def pytorch_153354() -> float:
    return both(Preference, callbacks=lambda: [la.ActivationCheckpointing()])


def weather_generator_1639() -> float:
    return both(Assigned)


def fairscale_601() -> dict[str, float]:
    whole, _ = fit(Groups, 1, max_epochs=2)
    found = {"through": apart(weights(whole), weights(fit(Groups, 2, max_epochs=2)[0]))}
    for name, strategy in {"file": {}, "folder": {"checkpoints": "sharded"}}.items():
        _, ours = fit(Groups, 2, strategy=strategy, max_epochs=1)
        path = FOLDER / f"groups-{name}"
        ours.save_checkpoint(path)
        ours.strategy.barrier()
        again, ours = fit(Groups, 2, path, strategy, max_epochs=2)
        found[name] = apart(weights(whole), weights(again))
        found[f"{name}, rates"] = float(
            ["initial_lr" in group for group in ours.optimizers[0].param_groups] != [True] * 3
        )
    return found


def transformers_48237() -> float:
    return both(Empty)


def lightning_20138() -> float:
    return both(Unused)


def torchtitan_2747() -> float:
    """A sparse mixture with weight decay: an expert that nobody used rests, as in one process."""

    class Decays(Experts):
        optimizer = staticmethod(lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.5))

    return both(Decays, gradient_clip_val=0.05)


def stable_pretraining_415() -> float:
    return both(TwoViews)


def lightning_18971() -> dict[str, float]:
    """A checkpoint after `test`, and `validate` after `fit` (#19015)."""
    values = []
    for world in (1, 2):
        module, ours = fit(Adam, world, max_epochs=1)
        loader = data(RANK if world == 2 else 0, world)
        tested = ours.test(module, loader, verbose=False)[0]["test"]
        path = FOLDER / f"tested-{world}-{RANK if world == 1 else 'both'}.ckpt"
        ours.save_checkpoint(path, weights_only=True)
        ours.strategy.barrier()
        known = ours.validate(module, loader, verbose=False)[0]["val"]
        values.append((tested, known, torch.load(path, weights_only=True)["state_dict"]))
    (a, b, one), (c, d, other) = values
    return {"test": abs(a - c), "validate": abs(b - d), "file": apart(one, other)}


def wgan() -> float:
    return both(Clamped)


def lightning_19685() -> str:
    """`loss.backward()` by hand, which no strategy sees."""
    try:
        fit(ByLoss, 2)
    except la.errors.AccelError as error:
        return str(error)
    return "nothing was said"


def pytorch_105840() -> str:
    """The first process has the weights, to be sent to the others, which are on the meta device; transformers #25686."""

    def make() -> GPT:
        with torch.device("meta" if RANK else "cpu"):
            return GPT()

    try:
        fit(make, 2)
    except la.errors.AccelError as error:
        return str(error)
    return "nothing was said"


RUNS = {
    f.__name__: f
    for f in (
        pytorch_153354, weather_generator_1639, fairscale_601, transformers_48237, lightning_20138,
        torchtitan_2747, stable_pretraining_415, lightning_18971, wgan, lightning_19685,
        pytorch_105840,
    )
}  # fmt: skip

if __name__ == "__main__":
    write_results(RUNS, sys.argv[2:], FOLDER / f"{RANK}.json")
