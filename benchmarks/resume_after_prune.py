"""Does training go on exactly after a prune? Eight nets, six optimizers, and what others do.

`python benchmarks/resume_after_prune.py [--json PATH]` prints, for each net and optimizer, the largest
difference in loss over 20 steps in float64 between the pruned network with its followed optimizer and
the dense network with the removed elements masked and the same optimizer. Beside it, the same steps
with a fresh optimizer, and with the stale one that bare torch-pruning leaves behind. Last, what
Lightning's own ModelPruning has left of its masks after a resume. Claims exact continuation, no more.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_accel.pruning import plan
from lightning_accel.surgery import Cut, Select, follow
from lightning_accel.surgery.call import Call

BEFORE, AFTER, BATCH = 30, 20, 64


class Residual(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.a, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.b = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm0(self.stem(x)))
        x = F.relu(x + self.b(F.relu(self.norm1(self.a(x)))))
        return self.head(x.mean((2, 3)))


class Depthwise(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.depth, self.norm = (
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.BatchNorm2d(width),
        )
        self.point, self.head = nn.Conv2d(width, 2 * width, 1), nn.Linear(2 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.depth(F.relu(self.stem(x)))))
        return self.head(F.relu(self.point(x)).mean((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(24), nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.a(x))
        return self.head(F.relu(self.norm(torch.cat([x, F.relu(self.b(x))], 1))).mean((2, 3)))


class Squeeze(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.down, self.up, self.head = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        gate = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))
        return self.head((x * gate).mean((2, 3)))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, padding=1, groups=4)
        self.norm, self.head = nn.BatchNorm2d(32), nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.norm(self.b(F.relu(self.a(x))))).mean((2, 3)))


class Transformer(nn.Module):
    """Rows of the image as tokens; its MLP is pruned (cutting LayerNorm's width is not a masking)."""

    def __init__(self, dim: int = 16) -> None:
        super().__init__()
        self.embed, self.norm, self.norm2 = nn.Linear(8, dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down, self.head = nn.Linear(dim, 64), nn.Linear(64, dim), nn.Linear(dim, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x[:, 0])  # (batch, rows, dim)
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.head((x + self.down(F.gelu(self.up(self.norm2(x))))).mean(1))


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = (
            nn.Linear(64, 32),
            nn.Linear(32, 64, bias=False),
            nn.Linear(64, 10),
        )
        self.c = nn.Linear(64, 32)
        self.c.weight = self.a.weight
        self.d = nn.Linear(32, 64)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.b(F.relu(self.a(x.flatten(1)))))
        return self.head(F.relu(self.d(F.relu(self.c(x)))))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
    )


NETS: dict[str, tuple[Callable[[], nn.Module], Select]] = {
    "mlp": (mlp, Select()),
    "residual": (Residual, Select()),
    "depthwise": (Depthwise, Select()),
    "concat": (Dense, Select()),
    "squeeze-excite": (Squeeze, Select()),
    "grouped": (Grouped, Select()),
    "transformer": (Transformer, Select("up")),
    "tied": (Tied, Select()),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.05, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-3),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=2e-3),
}


def digits() -> tuple[Tensor, Tensor]:
    data = load_digits()
    return torch.tensor(data.images / 16.0).unsqueeze(1), torch.tensor(data.target)


def step(
    net: nn.Module, optimizer: torch.optim.Optimizer, index: int, data: Any, cut: Cut | None = None
) -> float:
    x, y = data
    chosen = torch.randint(0, len(y), (BATCH,), generator=torch.Generator().manual_seed(index))
    optimizer.zero_grad()
    loss = F.cross_entropy(net(x[chosen]), y[chosen])
    loss.backward()
    optimizer.step()
    if cut is not None:
        cut.masked(net)
    return loss.item()


def one(name: str, optimizer_name: str, data: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    build, select = NETS[name]
    make = OPTIMIZERS[optimizer_name]
    net = build().double()
    optimizer = make(net.parameters())
    for index in range(BEFORE):
        step(net, optimizer, index, data)
    calls = (Call("", (data[0][:2],), {}),)
    cut = plan(net, calls=calls, ratio=0.4, select=select)

    dense, fresh_net, stale_net = (copy.deepcopy(net) for _ in range(3))
    dense_optimizer = make(dense.parameters())
    dense_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    cut.masked(dense)
    before = sum(p.numel() for p in net.parameters())
    follow(optimizer, cut.apply(net))
    cut.apply(fresh_net)
    fresh = make(fresh_net.parameters())
    stale = make(stale_net.parameters())  # then each parameter is replaced, as torch-pruning does
    cut.apply(stale_net)
    for module in stale_net.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[leaf] = nn.Parameter(parameter.detach().clone())

    steps = range(100, 100 + AFTER)
    exact = [
        (step(net, optimizer, i, data), step(dense, dense_optimizer, i, data, cut)) for i in steps
    ]
    return {
        "net": name,
        "optimizer": optimizer_name,
        "params_left": sum(p.numel() for p in net.parameters()) / before,
        "followed": max(abs(a - b) for a, b in exact),
        "fresh": max(
            abs(step(fresh_net, fresh, i, data) - b) for i, (_, b) in zip(steps, exact, strict=True)
        ),
        "stale": max(
            abs(step(stale_net, stale, i, data) - b) for i, (_, b) in zip(steps, exact, strict=True)
        ),
    }


def lightning_model_pruning() -> dict[str, float]:
    """Sparsity at the end of a run with Lightning's ModelPruning, uninterrupted and resumed."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
    from torch.utils.data import DataLoader, TensorDataset

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    x, y = digits()
    data = DataLoader(TensorDataset(x.float(), y), 64)

    def run(folder: str, ckpt: str | None = None) -> float:
        torch.manual_seed(0)
        model = Module()
        trainer = Trainer(
            max_epochs=4,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[
                ModelPruning("l1_unstructured", amount=0.5, apply_pruning=lambda epoch: epoch == 1),
                ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1),
            ],
        )
        trainer.fit(model, data, ckpt_path=ckpt)
        weights = [p for p in model.parameters() if p.dim() > 1]
        return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)

    with tempfile.TemporaryDirectory() as folder:
        whole = run(folder)
        return {"uninterrupted": whole, "resumed": run(folder + "/b", f"{folder}/epoch=2.ckpt")}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows here as well")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    data = digits()
    print("largest difference in loss to the masked dense run over 20 steps, float64")
    print(f"{'net':16}{'optimizer':10}{'params':>8}{'followed':>12}{'fresh':>12}{'stale':>12}")
    rows = []
    for name in NETS:
        for optimizer in OPTIMIZERS:
            row = one(name, optimizer, data)
            rows.append(row)
            print(
                f"{name:16}{optimizer:10}{row['params_left']:8.0%}"
                f"{row['followed']:12.1e}{row['fresh']:12.1e}{row['stale']:12.1e}",
                flush=True,
            )
    masks = lightning_model_pruning()
    worst = {k: max(row[k] for row in rows) for k in ("followed", "fresh", "stale")}
    median = {k: statistics.median(row[k] for row in rows) for k in worst}
    print(f"worst of {len(rows)}: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items()))
    print(f"median of {len(rows)}: " + ", ".join(f"{k} {v:.1e}" for k, v in median.items()))
    print(
        f"Lightning ModelPruning, share of zeros: {masks['uninterrupted']:.3f} uninterrupted, "
        f"{masks['resumed']:.3f} resumed"
    )
    if arguments.json:
        result = {"rows": rows, "worst": worst, "median": median, "lightning_model_pruning": masks}
        arguments.json.write_text(json.dumps(result, indent=1))
    if worst["followed"] > 1e-12:
        raise SystemExit("the followed optimizer is not exact")


if __name__ == "__main__":
    main()
