"""The literature's protocol for pruning, as far as it fits on two cores: ResNet-56 and VGG-19 at 32 px.

The networks are those of the papers on CIFAR (DepGraph, arXiv:2301.12900, Table 1), by configuration; VGG-19 has
a share of its widths. The images are the bundled digits, enlarged to 32 px, of which few are trained on, because all
of them are easy. Everyone has the same schedule: the dense training, and then as many epochs again, in which

- "one-shot" prunes once and fine-tunes for all of them,
- "iterative" prunes a part before each of them, the same share of what is left,
- "dense" prunes nothing.

Pruned are, to the same share of the multiply-accumulates: by `StructuredPruning`'s defaults (magnitude, the same share
of every layer, compensated); the same by measured sensitivity; by torch-pruning's DepGraph (`GroupNormPruner`, all
layers ranked together, without sparse training), magnitude and random. Batch-norm statistics are re-estimated for all.

    python benchmarks/prune_protocol.py [--seeds 5] [--jobs 2] [--nets resnet56 vgg19] [--json PATH] [--svg PATH]
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from accuracy_picture import Found, joined, picture, table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from data.digits import Digits
from models.resnet import ResNet

from lightning_accel.measure.flops import count_macs
from lightning_accel.pruning import Macs, plan, recalibrate
from lightning_accel.surgery.call import Call

SHARES = {"resnet56": (0.4,), "vgg19": (0.12,)}
"""Of the multiply-accumulates, to keep: the papers have 2.5 times less of ResNet-56 and 8.9 times less of VGG-19."""
EPOCHS, AGAIN = 12, 5
RATES = {
    "resnet56": 0.03,
    "vgg19": 0.1,
}  # at 0.1 the deep one does not always train in so few epochs
NUM_TRAIN, BATCH, SIZE = 480, 32, 32
_CALIBRATION = 10
_FINE = 200  # steps in which torch-pruning would remove everything
MOMENTS = {
    "cut": "right after the one-shot cut",
    "one-shot": f"one-shot and {AGAIN} epochs",
    "iterative": f"iterative, {AGAIN} prunes and epochs",
}

Batch = tuple[Tensor, Tensor]


class VGG19(nn.Module):
    """VGG-19 with batch norm for images of 32 px, its widths times `share`."""

    def __init__(self, share: float = 0.5) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 1
        for width, depth in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(depth):
                wide = round(width * share)
                layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=False)]
                layers += [nn.BatchNorm2d(wide), nn.ReLU()]
                channels = wide
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers[:-1])
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet56": lambda: ResNet(widths=(16, 32, 64), depth=9),
    "vgg19": VGG19,
}


def data(seed: int) -> tuple[list[Batch], Batch]:
    """Return one epoch of batches, and the test part."""
    source = Digits(num_train=NUM_TRAIN, seed=seed)
    source.setup("fit")
    images, labels = source.train.tensors
    test, truth = source.test.tensors
    return list(zip(_enlarged(images).split(BATCH), labels.split(BATCH), strict=True)), (
        _enlarged(test),
        truth,
    )


def _enlarged(images: Tensor) -> Tensor:
    return F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def train(model: nn.Module, batches: Sequence[Batch], rates: Sequence[float], seed: int) -> None:
    """Train for one epoch per learning rate."""
    optimizer = torch.optim.SGD(
        model.parameters(), rates[0], momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        for index in torch.randperm(len(batches), generator=generator).tolist():
            x, y = batches[index]
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def accuracy(model: nn.Module, test: Batch) -> float:
    model.eval()
    with torch.no_grad():
        right = [(model(x).argmax(1) == y).float() for x, y in zip(*map(_parts, test), strict=True)]
    return 100 * float(torch.cat(right).mean())


def _parts(values: Tensor) -> tuple[Tensor, ...]:
    return values.split(90)


class Way(Protocol):
    """Cuts a network to shares of its first arithmetic, one after the other."""

    def __call__(self, model: nn.Module, share: float) -> nn.Module: ...


def ours(batches: Sequence[Batch], dense: int, **how: Any) -> Way:
    calls = [[Call("", (x,), {})] for x, _ in batches[:_CALIBRATION]]

    def cut(model: nn.Module, share: float) -> nn.Module:
        target = Macs(share * dense / macs(model))
        plan(model, calls=calls[0], target=target, batches=calls, **how).apply(model)
        return model

    return cut


def theirs(model: nn.Module, dense: int, kind: str, importance: str, **how: Any) -> Way:
    """Make as many small steps of torch-pruning as it takes."""
    import torch_pruning

    pruner = getattr(torch_pruning.pruner, kind)(
        model,
        torch.randn(2, 1, SIZE, SIZE),
        importance=getattr(torch_pruning.importance, importance)(),
        pruning_ratio=1.0,
        max_pruning_ratio=0.95,
        iterative_steps=_FINE,
        ignored_layers=[model.head],
        # Its defaults are dicts that all pruners of a process share.
        num_heads={},
        in_channel_groups={},
        out_channel_groups={},
        **how,
    )

    def cut(model: nn.Module, share: float) -> nn.Module:
        for _ in range(_FINE):
            if macs(model) <= share * dense:
                break
            pruner.step()
        return model

    return cut


def macs(model: nn.Module) -> int:
    return count_macs(model, (torch.randn(1, 1, SIZE, SIZE),)).macs


def ways(
    base: nn.Module, batches: Sequence[Batch]
) -> Iterator[tuple[str, Callable[[nn.Module], Way]]]:
    """Yield what each is called, and how a way is made for a copy of the trained network."""
    dense = macs(base)
    yield "ours", lambda model: ours(batches, dense)
    yield "ours by sensitivity", lambda model: ours(batches, dense, scope="sensitivity")
    yield (
        "DepGraph",
        lambda model: theirs(
            model, dense, "GroupNormPruner", "GroupMagnitudeImportance", global_pruning=True
        ),
    )
    yield "magnitude", lambda model: theirs(model, dense, "BasePruner", "MagnitudeImportance")
    yield "random", lambda model: theirs(model, dense, "BasePruner", "RandomImportance")


def run(name: str, seed: int) -> Found:
    """Train, cut and judge with one seed; one value in each place."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    torch.manual_seed(seed)
    base = NETS[name]()
    batches, test = data(seed)
    highest = RATES[name]
    train(base, batches, [highest * (1 - epoch / EPOCHS) for epoch in range(EPOCHS)], seed)
    longer = copy.deepcopy(base)
    rates = [highest / 10 * (1 - epoch / AGAIN) for epoch in range(AGAIN)]
    train(longer, batches, rates, seed)
    found: Found = {("dense", 1.0, moment): [accuracy(longer, test)] for moment in MOMENTS}
    found["dense", 1.0, "cut"] = [accuracy(base, test)]
    dense = macs(base)
    base.train()  # as a fit is when it prunes: norms get new statistics
    for variant, make in ways(base, batches):
        for share in SHARES[name]:
            model = copy.deepcopy(base)
            model = renewed(make(model)(model, share), batches)
            found[variant, share, "macs"] = [macs(model) / dense]
            found[variant, share, "cut"] = [accuracy(model, test)]
            train(model, batches, rates, seed)
            found[variant, share, "one-shot"] = [accuracy(model, test)]
            model = copy.deepcopy(base)
            way = make(model)
            for step, rate in enumerate(rates, 1):
                model = renewed(way(model, share ** (step / AGAIN)), batches)
                train(model, batches, [rate], seed + step)
            found[variant, share, "iterative"] = [accuracy(model, test)]
        taken = time.perf_counter() - start
        print(f"{name}, seed {seed}, {variant}: {taken:.0f} s", file=sys.stderr, flush=True)
    return found


def renewed(model: nn.Module, batches: Sequence[Batch]) -> nn.Module:
    """Estimate the statistics of batch norms anew."""
    model.train()
    recalibrate(model, [[Call("", (x,), {})] for x, _ in batches[:_CALIBRATION]])
    return model


def main() -> int:
    """Run it, print it, draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--nets", nargs="*", choices=NETS, default=list(NETS))
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument(
        "--json", type=Path, help="keeps the values; what it holds is not run again"
    )
    parser.add_argument("--svg", type=Path, default=Path("outputs/prune_protocol.svg"))
    args = parser.parse_args()
    done = _read(args.json)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {
            pool.submit(run, name, seed): (name, seed)
            for seed in range(args.seeds)
            for name in args.nets
            if (name, seed) not in done
        }
        for future in as_completed(waiting):
            done[waiting[future]] = future.result()
            _write(args.json, done)
    results = {n: joined([f for (of, _), f in sorted(done.items()) if of == n]) for n in args.nets}
    for name, found in results.items():
        for moment, when in MOMENTS.items():
            print(table(f"{name}: accuracy, %", found, moment, when).to_markdown(), end="\n\n")
    args.svg.parent.mkdir(parents=True, exist_ok=True)
    args.svg.write_text(
        picture([(f"{name}: accuracy, %", found) for name, found in results.items()], MOMENTS)
    )
    print(f"Mean and standard error over seeds. Picture: {args.svg}")
    return 0


def _read(path: Path | None) -> dict[tuple[str, int], Found]:
    rows = json.loads(path.read_text()) if path and path.exists() else []
    done: dict[tuple[str, int], Found] = {}
    for row in rows:
        place = done.setdefault((row["net"], row["seed"]), {})
        place[row["variant"], row["share"], row["moment"]] = row["values"]
    return done


def _write(path: Path | None, done: dict[tuple[str, int], Found]) -> None:
    rows = [
        {"net": n, "seed": seed, "variant": v, "share": s, "moment": m, "values": x}
        for (n, seed), found in done.items()
        for (v, s, m), x in found.items()
    ]
    if path:
        path.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    sys.exit(main())
