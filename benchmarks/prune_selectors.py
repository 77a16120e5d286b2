"""Does choosing channels together help? Magnitude, greedy, greedy + swap and an annealer, side by side.

`python benchmarks/prune_selectors.py [--seeds 8] [--epochs 6] [--json PATH]` trains conv 64 -> conv 96 -> linear
on scikit-learn's digits, removes half of the channels of both convolutions by each criterion, and prints
the accuracy right after the cut (with and without compensation) and after some epochs of training on,
each paired with greedy over the same seeds (mean +- standard error). The reconstruction error is relative
to greedy + swap. "annealed" needs the extra `[quantum]`; it runs on a simulator, and no speed-up is claimed.
After training on, all criteria are close on digits: the column right after the cut tells them apart.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_accel.pruning.compensation import compensate
from lightning_accel.pruning.graph import Group, Member
from lightning_accel.pruning.qubo import QuboSelector
from lightning_accel.pruning.reconstruction import GreedySwapSelector, energy, grams, greedy
from lightning_accel.surgery.call import Call

TRAIN, BATCH, CALIBRATION = 1000, 64, 256
REFERENCE = "greedy"
Choice = Callable[[Tensor, Tensor, int], list[int]]
"""Of a group's weights, its gram matrix and how many: the channels to remove."""


class Net(nn.Module):
    def __init__(self, first: int = 64, second: int = 96) -> None:
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first)
        self.b = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.norm_b, self.head = nn.BatchNorm2d(second), nn.Linear(second, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm_a(self.a(x))), 2)
        return self.head(F.relu(self.norm_b(self.b(x))).mean((2, 3)))


def choices(seed: int) -> dict[str, Choice]:
    found: dict[str, Choice] = {
        "magnitude": lambda weight, _, count: (
            weight.abs().flatten(1).sum(1).argsort()[:count].sort().values.tolist()
        ),
        "greedy": lambda _, gram, count: greedy(gram, count),
        "greedy + swap": lambda _, gram, count: GreedySwapSelector()(gram, count),
    }
    try:
        annealer = QuboSelector(seed=seed)
    except ImportError as error:
        print(f"no row for the annealer: {error}\n")
        return found
    return found | {"annealed": lambda _, gram, count: annealer(gram, count)}


def groups_of(net: Net) -> list[Group]:
    """The two groups by hand, so that the comparison hangs on nothing but the choice."""
    found = []
    for name, norm, reader in (("a", "norm_a", "b.weight"), ("b", "norm_b", "head.weight")):
        units = net.get_submodule(name).out_channels
        each = torch.arange(units)[:, None]
        own = [Member(f"{norm}.{leaf}", 0, "own", each) for leaf in ("weight", "bias")]
        members = (
            Member(f"{name}.weight", 0, "out", each),
            *own,
            Member(reader, 1, "in", each),
        )
        found.append(Group(name, "channels", units, members, (name,), units))
    return found


def cut(net: Net, gone: dict[str, list[int]]) -> Net:
    a, b = (
        torch.tensor([i for i in range(net.get_submodule(n).out_channels) if i not in set(gone[n])])
        for n in ("a", "b")
    )
    small = Net(len(a), len(b)).eval()
    state = net.state_dict()
    for name, value in state.items():
        if name.startswith(("a.", "norm_a")) and value.dim():
            state[name] = value[a]
        elif name.startswith(("b.", "norm_b")) and value.dim():
            state[name] = value[b][:, a] if name == "b.weight" else value[b]
    state["head.weight"] = state["head.weight"][:, b]
    small.load_state_dict(state)
    return small


def train(net: Net, x: Tensor, y: Tensor, *, epochs: int, lr: float, seed: int) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(seed)
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    net.eval()


@torch.no_grad()
def accuracy(net: Net, x: Tensor, y: Tensor) -> float:
    return float((net(x).argmax(1) == y).float().mean())


def one_seed(seed: int, epochs: int) -> dict[str, dict[str, float]]:
    torch.manual_seed(seed)
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(digits.images / 16, dtype=torch.float32)[order, None]
    y = torch.tensor(digits.target)[order]
    seen, unseen = (x[:TRAIN], y[:TRAIN]), (x[TRAIN:], y[TRAIN:])
    net = Net()
    train(net, *seen, epochs=12, lr=3e-3, seed=seed)
    groups = groups_of(net)
    calls = [(Call("", (part,), {}),) for part in seen[0][:CALIBRATION].split(BATCH)]
    found = grams(net, groups, calls).of
    rows: dict[str, dict[str, float]] = {"dense": {"cut": accuracy(net, *unseen)}}
    for name, choose in choices(seed).items():
        gone = {
            g.name: choose(net.get_submodule(g.name).weight.detach(), found[g.name], g.units // 2)
            for g in groups
        }
        small = cut(net, gone)
        row = {f"error_{n}": energy(found[n], removed) for n, removed in gone.items()}
        row["cut"] = accuracy(small, *unseen)
        solved = copy.deepcopy(small)
        fix = compensate(net, small, groups=groups, gone=gone, batches=calls)
        solved.load_state_dict(fix.values, strict=False)
        row["compensated"] = accuracy(solved, *unseen)
        for key, start in (("tuned", small), ("both", solved)):
            train(start, *seen, epochs=epochs, lr=2e-3, seed=seed)
            row[key] = accuracy(start, *unseen)
        rows[name] = row
    return rows


def spread(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):+.4f} +- {error:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6, help="of training on after the cut")
    parser.add_argument("--json", type=Path, help="write the numbers of every seed here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [one_seed(seed, options.epochs) for seed in range(options.seeds)]
    dense = statistics.mean(run["dense"]["cut"] for run in runs)
    print(
        f"digits, conv 64 -> conv 96 -> linear, 50 % of both; {options.seeds} seeds; {dense=:.4f}\n"
    )
    names = {
        "cut": "right after",
        "compensated": "compensated",
        "tuned": f"+ {options.epochs} epochs",
        "both": f"compensated + {options.epochs} epochs",
    }
    print("| selection |", " | ".join(names.values()), end=" | ")
    print("paired right after | paired tuned | error a | error b |")
    print("|---" * 9 + "|")
    for name in [n for n in runs[0] if n != "dense"]:
        means = [f"{statistics.mean(run[name][key] for run in runs):.4f}" for key in names]
        paired = [
            spread([run[name][key] - run[REFERENCE][key] for run in runs])
            for key in ("cut", "tuned")
        ]
        errors = [
            f"{statistics.mean(run[name][k] / run['greedy + swap'][k] for run in runs):.3f}"
            for k in ("error_a", "error_b")
        ]
        paired = ["reference"] * 2 if name == REFERENCE else paired
        print("|", " | ".join([name, *means, *paired, *errors]), "|")
    if options.json:
        options.json.write_text(json.dumps(runs, indent=1))


if __name__ == "__main__":
    main()
