"""What is left of accuracy at the same arithmetic: which importance, with and without compensation.

A ResNet on digits and a GPT on Python's own reference are trained, cut to shares of their
multiply-accumulates, and asked twice: right after the cut, with batch-norm statistics re-estimated on ten
unlabelled batches, and after a few epochs of fine-tuning. Each importance is tried as it is and with the
readers' weights solved anew on the same batches ("compensated"). Beside it, bare torch-pruning on the same
trained network: tiny steps until no more than the same arithmetic is left, and the same re-estimation and
fine-tuning; and the same pruner of torch-pruning brought through `pruner=`, cut and compensated by us.

    python benchmarks/prune_accuracy.py [--seeds 5] [--jobs 2] [--quick] [--json PATH] [--svg PATH]

Every layer loses the same share; then "lamp" removes what "magnitude" does, so it is left out unless
`--scope global` ranks layers against each other.

After fine-tuning, digits cannot tell a good criterion from a random one, nor from training the small network
from scratch: read the columns right after the cut, and those of the GPT.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from accuracy_picture import Found, joined, picture, table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from data.digits import Digits
from data.pydoc import Pydoc
from models.gpt import GPT, CausalAttention
from models.resnet import ResNet

from lightning_accel.measure.flops import count_macs
from lightning_accel.pruning import Macs, plan, recalibrate
from lightning_accel.pruning.activations import collect_gradients
from lightning_accel.pruning.importance import KNOWN
from lightning_accel.pruning.sensitivity import graph_of
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import Call

SHARES = (0.7, 0.5, 0.35, 0.25)
"""Of the multiply-accumulates, to keep."""
BATCHES = 10
"""Of training data, for everything that measures."""
THEIRS = ("magnitude", "taylor", "random")
_MOMENTS = {"cut": "right after the cut", "tuned": "after fine-tuning"}
_STEPS = 200
"""Steps in which torch-pruning would remove all channels."""

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Task:
    """A network, its data, and how both are trained and judged."""

    name: str
    metric: str
    make: Callable[[], nn.Module]
    data: Callable[[int], tuple[list[Batch], Batch]]  # one epoch of batches, and the test data
    loss: Callable[[nn.Module, Batch], Tensor]
    judge: Callable[[nn.Module, Batch], float]
    optimizer: Callable[[nn.Module, float], torch.optim.Optimizer]
    lr: float
    epochs: int
    tuning: int
    skips: tuple[str, ...] = ()


# -- the two tasks ---------------------------------------------------------------------------------


def digits(quick: bool) -> Task:
    """A ResNet on 8x8 digits, judged by its accuracy on the test part."""

    def data(seed: int) -> tuple[list[Batch], Batch]:
        source = Digits()
        source.setup("fit")
        images, labels = source.train.tensors
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        batches = list(zip(images[order].split(64), labels[order].split(64), strict=True))
        return batches, tuple(source.test.tensors)

    def judge(model: nn.Module, batch: Batch) -> float:
        return 100 * float((model(batch[0]).argmax(1) == batch[1]).float().mean())

    return Task(
        name="digits",
        metric="accuracy, %",
        make=lambda: ResNet(widths=(32, 64), depth=1),
        data=data,
        loss=lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        judge=judge,
        optimizer=lambda model, lr: torch.optim.SGD(
            model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4
        ),
        lr=0.05,
        epochs=4 if quick else 12,
        tuning=1 if quick else 2,
    )


def pydoc(quick: bool) -> Task:
    """A GPT on the bytes of Python's reference, judged by bits per byte of the test part."""

    def data(seed: int) -> tuple[list[Batch], Batch]:
        source = Pydoc(context=64, num_windows=640, seed=seed)
        source.setup("fit")
        tokens, targets = source.train.tensors
        batches = list(zip(tokens.split(16), targets.split(16), strict=True))
        return batches, (source.test.tensors[0][:96], source.test.tensors[1][:96])

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return Task(
        name="pydoc",
        metric="bits per byte",
        make=lambda: GPT(context=64, dim=64, depth=2, num_heads=4),
        data=data,
        loss=loss,
        judge=lambda model, batch: float(loss(model, batch)) / math.log(2),
        optimizer=lambda model, lr: torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1),
        lr=3e-3,
        epochs=3 if quick else 12,
        tuning=1,
        skips=("bn_scale",),  # it has no batch norm
    )


TASKS: dict[str, Callable[[bool], Task]] = {"digits": digits, "pydoc": pydoc}


def train(model: nn.Module, task: Task, batches: list[Batch], epochs: int, lr: float) -> None:
    """Train with one cycle of the learning rate."""
    optimizer = task.optimizer(model, lr)
    total = epochs * len(batches)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=total)
    generator = torch.Generator().manual_seed(0)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(batches), generator=generator).tolist():
            optimizer.zero_grad()
            task.loss(model, batches[index]).backward()
            optimizer.step()
            schedule.step()


def judged(model: nn.Module, task: Task, test: Batch) -> float:
    model.eval()
    with torch.no_grad():
        return task.judge(model, test)


def calls_of(batches: Sequence[Batch]) -> list[list[Call]]:
    return [[Call("", (x,), {})] for x, _ in batches[:BATCHES]]


# -- the two ways ----------------------------------------------------------------------------------


def ours(
    base: nn.Module, task: Task, batches: list[Batch], importances: Sequence[str], scope: str
) -> Iterator[tuple[str, float, nn.Module]]:
    """Yield the label of each variant, the share asked for, and the pruned network."""
    example = [Call("", (batches[0][0][:2],), {})]
    asked = [(importance, scope, importance) for importance in importances]
    if "magnitude" in importances and scope != "sensitivity":
        asked.append(("magnitude", "sensitivity", "magnitude by sensitivity"))
    for importance, way, label in asked:
        model, measured = twin(base), None
        if importance == "taylor":
            model = _with_gradients(model, task, batches)
        if importance == "taylor2":
            copied = twin(base).eval()
            losses = (task.loss(copied, batch) for batch in batches[:BATCHES])
            measured = collect_gradients(copied, graph_of(copied, example).groups, losses)
        for share in SHARES:
            for compensate in (False, True):
                cut = plan(
                    model,
                    calls=example,
                    target=Macs(share),
                    importance=importance,
                    scope=way,
                    batches=calls_of(batches),
                    statistics=measured,
                    compensate=compensate,
                )
                small = twin(base)
                cut.apply(small)
                yield label + ", compensated" * compensate, share, small


def brought(
    base: nn.Module, task: Task, batches: list[Batch]
) -> Iterator[tuple[str, float, nn.Module]]:
    """Yield the networks that torch-pruning's own pruner chooses, cut by us: `plan(pruner=)`."""
    calls = [Call("", (batches[0][0][:2],), {})]
    dense = _macs(base, batches[0][0][:2])
    for share in SHARES:
        low, high, ratio = 0.0, 1.0, 0.5
        for _ in range(7):  # the smallest ratio that leaves no more than the share
            ratio = (low + high) / 2
            small = twin(base)
            plan(base, calls=calls, pruner=partial(_pruner, ratio=ratio)).apply(small)
            enough = _macs(small, batches[0][0][:2]) <= share * dense
            low, high = (low, ratio) if enough else (ratio, high)
        for compensate in (False, True):
            how = {"pruner": partial(_pruner, ratio=high), "compensate": compensate}
            cut = plan(base, calls=calls, batches=calls_of(batches), **how)
            small = twin(base)
            cut.apply(small)
            yield (
                "torch-pruning through `pruner=`, magnitude" + ", compensated" * compensate,
                share,
                small,
            )


def _pruner(model: nn.Module, example: tuple[Tensor], *, ratio: float) -> object:
    import torch_pruning

    return torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(),
        pruning_ratio=ratio,
        ignored_layers=[model.head],
        num_heads=_heads(model),
        # Its defaults are dicts that all pruners of a process share.
        in_channel_groups={},
        out_channel_groups={},
    )


def _with_gradients(model: nn.Module, task: Task, batches: list[Batch]) -> nn.Module:
    model.eval().zero_grad()
    for batch in batches[:BATCHES]:
        task.loss(model, batch).backward()
    return model


def theirs(
    base: nn.Module, task: Task, batches: list[Batch], importance: str, *, told_heads: bool
) -> Iterator[tuple[str, float, nn.Module]]:
    """Yield torch-pruning's network at each share, the first with no more than that.

    Args:
        base: The trained network.
        task: Its loss, for "taylor".
        batches: Its data, likewise.
        importance: One of `THEIRS`.
        told_heads: Whether it is told which layers are split into heads, which it cannot know.
    """
    import torch_pruning

    kinds = {
        "magnitude": torch_pruning.importance.GroupMagnitudeImportance,
        "taylor": torch_pruning.importance.GroupTaylorImportance,
        "random": torch_pruning.importance.RandomImportance,
    }
    model, example = copy.deepcopy(base), batches[0][0][:2]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=kinds[importance](),
        pruning_ratio=1.0,
        iterative_steps=_STEPS,
        ignored_layers=[model.head],
        # Its defaults are dicts that all pruners of a process share.
        num_heads=_heads(model) if told_heads else {},
        in_channel_groups={},
        out_channel_groups={},
    )
    dense = _macs(base, example)
    waiting = list(SHARES)
    for _ in range(_STEPS - 1):
        if importance == "taylor":
            _with_gradients(model, task, batches)
        pruner.step()
        left = _macs(model, example) / dense
        while waiting and left <= waiting[0]:
            yield _label(importance, told_heads), waiting.pop(0), _copied(model)
        if not waiting:
            return


def _label(importance: str, told_heads: bool) -> str:
    return f"torch-pruning{' told the heads' * told_heads}, {importance}"


def _heads(model: nn.Module) -> dict[nn.Module, int]:
    return {
        layer: module.num_heads
        for module in model.modules()
        if isinstance(module, CausalAttention)
        for layer in (module.query, module.key, module.value)
    }


def _copied(model: nn.Module) -> nn.Module:
    model.zero_grad()
    return copy.deepcopy(model)


def _macs(model: nn.Module, example: Tensor) -> int:
    return count_macs(model, (example,)).macs


# -- what comes out --------------------------------------------------------------------------------


def run(
    name: str,
    seed: int,
    *,
    quick: bool,
    importances: Sequence[str],
    baselines: Sequence[str],
    scope: str,
) -> Found:
    """Train, cut and judge with one seed; one value in each place."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    task = TASKS[name](quick)
    torch.manual_seed(seed)
    base = task.make()
    batches, test = task.data(seed)
    train(base, task, batches, task.epochs, task.lr)
    found: Found = {("dense", 1.0, "cut"): [judged(base, task, test)]}
    base.train()  # as a fit is when it prunes: norms get new statistics
    known = [i for i in importances if i not in task.skips]
    dense_macs = _macs(base, batches[0][0][:2])
    for variant, share, model in _variants(base, task, batches, known, baselines, scope):
        if model is None:
            for moment in ("cut", "tuned"):
                found.setdefault((variant, share, moment), [])
            continue
        found[variant, share, "macs"] = [_macs(model, batches[0][0][:2]) / dense_macs]
        model.train()
        recalibrate(model, calls_of(batches))
        found[variant, share, "cut"] = [judged(model, task, test)]
        train(model, task, batches, task.tuning, task.lr / 10)
        found[variant, share, "tuned"] = [judged(model, task, test)]
    print(f"{name}, seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return found


def _variants(
    base: nn.Module,
    task: Task,
    batches: list[Batch],
    importances: Sequence[str],
    baselines: Sequence[str],
    scope: str,
) -> Iterator[tuple[str, float, nn.Module | None]]:
    yield from ours(base, task, batches, importances, scope)
    yield from brought(base, task, batches)
    for importance in baselines:
        for told_heads in (False, True)[: 1 + bool(_heads(base))]:
            try:
                yield from theirs(base, task, batches, importance, told_heads=told_heads)
            except Exception as error:
                label, reason = _label(importance, told_heads), str(error).splitlines()[:1]
                print(f"{label} fails on {task.name}: {reason}", file=sys.stderr)
                yield from ((label, share, None) for share in SHARES)


def _what(task: Task) -> str:
    return f"{task.name}: {task.metric}"


def main() -> int:
    """Run it, print it, draw it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="one seed, short trainings")
    parser.add_argument("--task", choices=TASKS, help="only one of the two")
    parser.add_argument("--importance", nargs="*", help=f"of {', '.join(KNOWN)}")
    parser.add_argument("--scope", default="local", help="local, global, isomorphic or sensitivity")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    parser.add_argument("--json", type=Path, help="where to write all values")
    parser.add_argument("--svg", type=Path, default=Path("outputs/prune_accuracy.svg"))
    args = parser.parse_args()
    every = [
        i for i in dict.fromkeys((*KNOWN, "reconstruction")) if i != "lamp" or args.scope != "local"
    ]
    one = partial(
        run,
        quick=args.quick,
        importances=args.importance or every,
        baselines=THEIRS[: 1 if args.quick else None],
        scope=args.scope,
    )
    tasks = [name for name in TASKS if args.task in (None, name)]
    seeds = range(1 if args.quick else args.seeds)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        waiting = {name: [pool.submit(one, name, seed) for seed in seeds] for name in tasks}
        results = [
            (TASKS[name](args.quick), joined([future.result() for future in futures]))
            for name, futures in waiting.items()
        ]
    for task, found in results:
        moments = {
            "cut": "right after the cut",
            "tuned": f"after {task.tuning} epochs of fine-tuning",
        }
        for moment, when in moments.items():
            print(table(_what(task), found, moment, when).to_markdown(), end="\n\n")
    print(
        "Mean and standard error over seeds. Fine-tuned digits alone cannot tell a good criterion "
        "from a random one: compare the tables right after the cut, and the other task."
    )
    args.svg.parent.mkdir(parents=True, exist_ok=True)
    args.svg.write_text(picture([(_what(task), found) for task, found in results], _MOMENTS))
    print(f"Picture: {args.svg}")
    if args.json:
        rows = [
            {"task": t.name, "variant": n, "share": s, "moment": m, "values": v}
            for t, found in results
            for (n, s, m), v in found.items()
        ]
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
