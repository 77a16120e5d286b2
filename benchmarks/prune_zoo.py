"""Can any real architecture be pruned, rightly, to the arithmetic asked for? Ours, and bare torch-pruning.

`python benchmarks/prune_zoo.py [--only 'timm/vit*'] [--json PATH]` halves the multiply-accumulates of each
network of `zoo` (or of any named by `--also`) and then asks: does it run forward and backward, in train and
eval mode, at another batch size, with outputs of the same shape; how much arithmetic is left, counted on
the real network; and is it right? The last by an oracle that knows nothing of how we prune: every element
that is gone is found by its value, set to zero in the dense network, and the two must agree in float64,
when norms take one number per call from the dense one instead of statistics over channels.

Beside it, torch-pruning 1.6.1 with its defaults, given the output layer and 30 % of the channels, which is
as near to half of the arithmetic as it can be told. Each network has a process of its own, for each of the
two, so that a hang is a result. Exit status 1 unless all of ours run and are right, 90 % are within 5 % of
the arithmetic asked for, and the median time is under 10 seconds.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_accel.errors import NoEffect
from lightning_accel.measure import Table
from lightning_accel.measure.flops import count_macs
from lightning_accel.pruning import Macs, prune
from lightning_accel.surgery.call import as_call, cast, tensors

SHARE = 0.5
"""Of the multiply-accumulates, to keep."""
_NOWHERE: Mapping[str, Tensor] = {}
WITHIN = 0.05
EXACT = 1e-6
"""Largest difference between a right network and the masked one, over the scale of the output."""
MEDIAN_S = 10.0
REACHED = 0.9
_CHANNELS = 0.3
_LIMITS_S = {"make": 120.0, "prune": 60.0, "check": 240.0}


# -- the two ways ----------------------------------------------------------------------------------


def ours(model: nn.Module, example: Any) -> dict[str, Any]:
    """Prune to half of the arithmetic; where that is out of reach, by channels, so that it is tried."""
    try:
        receipt = prune(model, example=example, target=Macs(SHARE))
        note = ""
    except NoEffect as error:
        receipt = prune(model, example=example, ratio=_CHANNELS)
        note = str(error).splitlines()[0]
    reasons = Counter(_without_names(change.what) for change in receipt.skipped)
    return {
        "note": note,
        "skipped": len(receipt.skipped),
        "reasons": dict(reasons.most_common(4)),
        "places": {
            moved.name: moved.kept.take(
                torch.arange(math.prod(moved.old_shape)).view(moved.old_shape)
            )
            for moved in receipt.moved
        },
    }


def theirs(model: nn.Module, example: Any) -> dict[str, Any]:
    """Prune with torch-pruning's defaults; told which layer makes the output, and no more."""
    import torch_pruning

    pruner = torch_pruning.pruner.BasePruner(
        model,
        example,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=_CHANNELS,
        ignored_layers=_last_layers(model, example),
        output_transform=lambda out: [t for t in tensors(out) if t.requires_grad],
    )
    pruner.step()
    return {"note": "", "skipped": 0, "reasons": {}}


WAYS: dict[str, Callable[[nn.Module, Any], dict[str, Any]]] = {"ours": ours, "theirs": theirs}


def _last_layers(model: nn.Module, example: Any) -> list[nn.Module]:
    """Return what a user would name: the layers as wide as the output, else the last one."""
    wide = {size for t in _outputs(model, example) for size in t.shape[1:]}
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Conv3d))]
    widths = {m: getattr(m, "out_features", getattr(m, "out_channels", 0)) for m in layers}
    classes = {zoo.CLASSES, zoo.VOCABULARY, 5, 3, 2} & wide
    return [m for m in layers if widths[m] in classes] or layers[-1:]


def _without_names(reason: str) -> str:
    return re.sub(r"`[^`]*`|\d[\d.e+-]*", "…", reason.splitlines()[0])[:100]


# -- what is asked of the result -------------------------------------------------------------------


def checked(
    dense: nn.Module, small: nn.Module, example: Any, places: Mapping[str, Tensor] = _NOWHERE
) -> dict[str, Any]:
    """Return what runs, how much arithmetic is left, and how far the function is from the masked one."""
    found: dict[str, Any] = {"runs": False, "fails": "", "macs": None, "error": None}
    stage = "forward"
    try:
        shapes = [t.shape for t in _outputs(dense, example)]
        if [t.shape for t in _outputs(small, example)] != shapes:
            raise ValueError("the output has another shape")
        call = as_call(example)
        counts = [count_macs(m, call.args, call.kwargs).macs for m in (dense, small)]
        found["macs"] = counts[1] / counts[0]
        stage = "another batch size"
        other = zoo.other_batch(example, 3)
        if [t.shape for t in _outputs(small, other)] != [t.shape for t in _outputs(dense, other)]:
            raise ValueError("the output has another shape")
        stage = "training"
        _backward(copy.deepcopy(small), example)
        found["runs"] = True
        stage = "oracle"
        found["error"] = difference(dense, small, example, places)
    except Exception as error:
        found["fails"] = f"{stage}: {_first_line(error)}"
    return found


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    call = as_call(example)
    with torch.no_grad():
        return [
            t for t in tensors(model.eval()(*call.args, **call.kwargs)) if t.is_floating_point()
        ]


def _backward(model: nn.Module, example: Any) -> None:
    call = as_call(example)
    outputs = tensors(model.train()(*call.args, **call.kwargs))
    total = sum(t.float().square().mean() for t in outputs if t.requires_grad)
    total.backward()  # type: ignore[union-attr]
    if all(p.grad is None for p in model.parameters()):
        raise ValueError("no parameter got a gradient")


def distinct(model: nn.Module) -> None:
    """Give every parameter and batch-norm statistic new random values, no two of a tensor equal.

    Layers that begin at zero, which would hide what is wrong behind them, become like the others.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            if tensor.is_floating_point() and tensor.numel():
                _fill(tensor, generator)
        for module in model.modules():
            if getattr(module, "running_mean", None) is not None:
                own = (module.running_mean, 0.0), (module.running_var, 1.0), (module.weight, 1.0)
                for tensor, middle in own:
                    if tensor is not None:
                        _draw(tensor, middle, 0.1, generator)


def _fill(tensor: Tensor, generator: torch.Generator) -> None:
    spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
    if tensor.dim() > 1:  # enough for the input to reach the output, against what biases add
        gain = 1.0 if tensor.dim() == 2 else 2**0.5
        spread = max(spread, gain * tensor[0].numel() ** -0.5)
    middle = float(tensor.mean())
    if tensor.numel() <= 2048 or tensor.dim() < 2:
        _draw(tensor, middle, spread if spread > 1e-3 else 0.1, generator)
        return
    # Points of a grid that float32 holds exactly, in a scrambled order; the scale is a power of two.
    points = 2**25
    at = torch.arange(tensor.numel()) + int(torch.randint(points, (), generator=generator))
    for shift, odd in ((13, 0x1C7ED5B), (11, 0x0D35A2F), (14, 0x1000193)):
        at.bitwise_and_(points - 1)
        at.bitwise_xor_(at >> shift).mul_(odd)
    at.bitwise_and_(points - 1)
    scale = 2.0 ** round(math.log2(spread * 3**0.5))
    values = at.double() * (2 / points) - 1  # uniform between -1 and 1
    tensor.copy_((values * scale).view(tensor.shape))


def _draw(tensor: Tensor, middle: float, spread: float, generator: torch.Generator) -> None:
    while True:
        noise = 2 * torch.rand(tensor.shape, generator=generator) - 1
        tensor.copy_(middle + 3**0.5 * spread * noise)
        if tensor.unique().numel() == tensor.numel():
            return


def difference(
    dense: nn.Module, small: nn.Module, example: Any, places: Mapping[str, Tensor] = _NOWHERE
) -> float:
    """Return the largest difference between the pruned and the masked dense network, relative.

    Args:
        dense: The network before.
        small: The network after.
        example: What both take.
        places: Flat positions of what is left, by name. They are only read for parameters whose rows
            have been scaled (queries, to make up for the width of a head), and then checked.

    Raises:
        LookupError: What is left of a tensor cannot be found in the dense one by its values.
    """
    masked, small = copy.deepcopy(dense).eval(), copy.deepcopy(small).eval()
    left = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    with torch.no_grad():
        for name, tensor in masked.named_parameters():
            if tensor.shape != left[name].shape:
                tensor.mul_(_mask(tensor, left[name], name, places.get(name)))
        for name, tensor in masked.named_buffers():
            # Equal filters of all channels need no mask, and are no numbers to be told apart by.
            if tensor.shape != left[name].shape and tensor.unique().numel() == tensor.numel():
                tensor.mul_(_mask(tensor, left[name], name))
    call = cast((as_call(example),), torch.float64)[0]
    statistics_of_dense: list[Tensor] = []
    outputs = []
    for model in (masked, small):
        torch.manual_seed(0)
        with torch.no_grad(), _OneNumberPerNorm(model.double(), statistics_of_dense):
            outputs.append([t for t in tensors(model(*call.args, **call.kwargs)) if t.numel()])
    errors = [float((a - b).abs().max()) / _spread(a) for a, b in zip(*outputs, strict=True)]
    return max(errors) if all(map(math.isfinite, errors)) else math.inf


def _spread(output: Tensor) -> float:
    """Return how much the samples differ: what is the same for all inputs proves nothing."""
    spread = float((output - output.mean(0)).abs().max())
    if not math.isfinite(spread) or spread < 1e-9 * float(output.abs().max()):
        raise LookupError(f"the dense output varies by {spread:.0e}, which proves nothing")
    return spread


def _mask(dense: Tensor, small: Tensor, name: str, told: Tensor | None = None) -> Tensor:
    """Return ones where the dense tensor's elements are left, zeros where they are gone."""
    values, order = dense.flatten().sort()
    if (values[1:] == values[:-1]).any():
        raise LookupError(f"{name} has equal values")
    found = torch.searchsorted(values, small.flatten().contiguous()).clamp_max(len(values) - 1)
    places = order[found]
    if not torch.equal(values[found], small.flatten()):
        if told is None or not _is_scaled(dense, small, told):
            raise LookupError(f"{name} has new values")
        places = told.flatten()
    mask = torch.zeros(dense.numel(), dtype=dense.dtype)
    mask[places] = 1
    return mask.view(dense.shape)


def _is_scaled(dense: Tensor, small: Tensor, places: Tensor) -> bool:
    """Whether each row is the dense one's times a number, the same one for all or none."""
    ratios = (small / dense.flatten()[places]).reshape(len(small), -1)
    first = ratios[:, :1]
    one, other = float(first.min()), float(first.max())
    known = (first - one).abs().minimum((first - other).abs())
    return max(float((ratios - first).abs().max()), float(known.max())) < 1e-4


class _OneNumberPerNorm(TorchFunctionMode):
    """Norms scale by one number per call, that of the first network, and then per channel.

    So they stay what they are for each channel, and nothing hangs on how many channels there are.
    Conversions to float32 within a forward become float64.
    """

    def __init__(self, model: nn.Module, numbers: list[Tensor]) -> None:
        super().__init__()
        self.numbers, self.known, self.count = numbers, bool(numbers), 0
        self.modules = [m for m in model.modules() if _is_norm(m)]

    def __enter__(self) -> _OneNumberPerNorm:
        for module in self.modules:
            module.forward = lambda x, *rest, m=module, **_: self._module(m, x, rest)  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for module in self.modules:
            del module.forward

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "float" and args[0].dtype == torch.float64:
            return args[0]
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        if name in ("to", "type"):
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
        if name.endswith("grouped_mm"):  # it has no float64
            return _grouped(*args, **kwargs)
        if name in ("layer_norm", "rms_norm", "group_norm") or _standardises(name, args, kwargs):
            bound = dict(zip(_ARGUMENTS[name], args, strict=False)) | kwargs
            dim = -1 if name in ("layer_norm", "rms_norm") else 1
            return self._affine(bound["input"], bound.get("weight"), bound.get("bias"), dim)
        return func(*args, **kwargs)

    def _module(self, module: nn.Module, x: Tensor, rest: tuple[Any, ...]) -> Tensor:
        weight = getattr(module, "weight", getattr(module, "scale", None))
        first = "2d" in type(module).__name__.lower() or isinstance(module, nn.GroupNorm)
        first |= getattr(module, "data_format", "") == "channels_first"
        dim = getattr(module, "channel_dim", 1 if first and x.dim() > 2 else -1)
        scaled = self._affine(x, weight, getattr(module, "bias", None), dim)
        for key in ("drop", "act"):  # timm's norms with an activation inside
            if isinstance(getattr(module, key, None), nn.Module):
                scaled = getattr(module, key)(scaled)
        if rest and isinstance(rest[0], Tensor):  # a gated norm
            scaled = scaled * torch.nn.functional.silu(rest[0])
        return scaled

    def _affine(self, x: Tensor, weight: Any, bias: Any, dim: int) -> Tensor:
        with torch._C.DisableTorchFunction():
            if not self.known:
                self.numbers.append(x.square().mean().sqrt().clamp_min(1e-6))
            x = x / self.numbers[self.count]
            self.count += 1
            for verb, tensor in ((torch.mul, weight), (torch.add, bias)):
                if isinstance(tensor, Tensor):
                    flat = tensor.reshape(-1)
                    shape = [-1 if d == dim % x.dim() else 1 for d in range(x.dim())]
                    x = verb(x, flat.view(shape) if flat.numel() > 1 else flat)
        return x


def _grouped(rows: Tensor, weights: Tensor, offs: Tensor, **_: Any) -> Tensor:
    sizes = offs.diff(prepend=offs.new_zeros(1)).tolist()
    return torch.cat([part @ w for part, w in zip(rows.split(sizes), weights, strict=True)])


_ARGUMENTS = {
    "layer_norm": ("input", "normalized_shape", "weight", "bias"),
    "rms_norm": ("input", "normalized_shape", "weight"),
    "group_norm": ("input", "num_groups", "weight", "bias"),
    "batch_norm": ("input", "running_mean", "running_var", "weight", "bias"),
}


def _is_norm(module: nn.Module) -> bool:
    """Whether a module norms over channels in Python of its own, or through torch's functions."""
    name = type(module).__name__.lower()
    over_channels = re.search(r"layernorm|rmsnorm|groupnorm|responsenorm|simplenorm|grn$", name)
    has_layers = any(list(child.parameters()) for child in module.children())
    return bool(over_channels) and not has_layers


def _standardises(name: str, args: Any, kwargs: Any) -> bool:
    """Whether a batch norm takes its statistics from its input: weights made standard, as a rule."""
    if name != "batch_norm":
        return False
    return (args[1] if len(args) > 1 else kwargs.get("running_mean")) is None


# -- processes -------------------------------------------------------------------------------------


def _work(name: str, way: str, talk: Connection) -> None:
    """Make, prune and check one network; say after each part that it is through."""
    zoo.quiet()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"seconds": None, "fails": "", "runs": False, "error": None}
    try:
        model, example = zoo.build(name)
        distinct(model)
        dense = copy.deepcopy(model)
        talk.send(("prune", found))
        start, busy = time.perf_counter(), time.process_time()
        found |= WAYS[way](model, example)
        found["seconds"] = time.perf_counter() - start
        found["busy_s"] = time.process_time() - busy
        places = found.pop("places", _NOWHERE)
        talk.send(("check", found))
        found |= checked(dense, model, example, places)
    except Exception as error:
        found["fails"] = f"prune: {_first_line(error)}"
    talk.send(("", found))


class _Job:
    """One network on one way, in its own process, with a limit for each part of the work."""

    def __init__(self, name: str, way: str, limits_s: dict[str, float]) -> None:
        self.name, self.way, self.limits_s = name, way, limits_s
        self.found: dict[str, Any] = {"seconds": None, "fails": "", "runs": False, "error": None}
        # A fork knows the libraries already; importing them takes longer than most prunes.
        kind = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(kind)
        self.talk, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(name, way, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._begin("make")

    def _begin(self, part: str) -> None:
        self.part, self.until = part, time.monotonic() + self.limits_s.get(part, 0.0)

    def listen(self) -> bool:
        """Take in what the process says; true when it is through, or has to be."""
        try:
            while self.part and self.talk.poll():
                part, self.found = self.talk.recv()
                self._begin(part)
        except EOFError:
            self.process.join()
            self._end(f"{self.part}: the process died with code {self.process.exitcode}")
        if self.part and time.monotonic() > self.until:
            self._end(f"{self.part}: not back after {self.limits_s[self.part]:.0f} s")
        if not self.part:
            self.process.kill()
            self.process.join()
        return not self.part

    def _end(self, reason: str) -> None:
        self.found["fails"], self.part = reason, ""


def run(
    names: list[str], ways: list[str], jobs: int, limits_s: dict[str, float]
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Yield name, way and findings of each, as they end."""
    todo = [(name, way) for name in names for way in ways]
    active: list[_Job] = []
    while todo or active:
        while todo and len(active) < jobs:
            active.append(_Job(*todo.pop(0), limits_s))
        wait([job.talk for job in active], timeout=0.2)
        for job in [job for job in active if job.listen()]:
            active.remove(job)
            yield job.name, job.way, job.found


# -- the report ------------------------------------------------------------------------------------


def table(results: dict[str, dict[str, dict[str, Any]]], ways: list[str]) -> Table:
    """Put the findings side by side."""
    columns = ["architecture"]
    for way in ways:
        columns += [f"{_TITLES[way]}: MACs", "runs", "difference", "s"]
        columns += ["skipped"] if way == "ours" else []
    rows = []
    for name, found in results.items():
        row: list[Any] = [name]
        for way in ways:
            one = found.get(way, {})
            row += [one.get("macs"), verdict(one), one.get("error"), one.get("seconds")]
            row += [one.get("skipped")] if way == "ours" else []
        rows.append(row)
    return Table(columns, rows, "Half of the multiply-accumulates asked for")


_TITLES = {"ours": "lightning_accel", "theirs": "torch-pruning"}


def verdict(found: dict[str, Any]) -> str:
    """Say in a few words how it went."""
    if found.get("fails") and not found.get("runs"):
        return f"no ({found['fails'][:60]})"
    if found.get("error") is None:
        return f"yes, unproved ({found.get('fails', '')[:60]})"
    return "yes" if is_right(found) else "yes, but WRONG"


def is_right(found: dict[str, Any]) -> bool:
    return bool(found["runs"]) and found["error"] is not None and found["error"] <= EXACT


def is_reached(found: dict[str, Any]) -> bool:
    return bool(found["runs"]) and abs(found["macs"] / SHARE - 1) <= WITHIN


def summary(results: dict[str, dict[str, dict[str, Any]]], way: str) -> dict[str, float]:
    """Return the shares of networks that run, are right and reach the arithmetic, and the times."""
    every = [found[way] for found in results.values() if way in found]
    seconds = [one["seconds"] for one in every if one["seconds"] is not None]
    return {
        "networks": len(every),
        "run": sum(bool(one["runs"]) for one in every) / len(every),
        "right": sum(is_right(one) for one in every) / len(every),
        "reached": sum(is_reached(one) for one in every) / len(every),
        "median_s": statistics.median(seconds) if seconds else float("nan"),
        "slowest_s": max(seconds, default=float("nan")),
    }


def main() -> int:
    """Run it, print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", default="*", help="pattern of names, such as 'timm/vit*'")
    parser.add_argument("--also", nargs="*", default=[], help="more networks: timm/resnet26t")
    parser.add_argument("--limit", type=int, help="the first so many")
    parser.add_argument("--way", choices=WAYS, help="only one of the two")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--limit-s", type=float, default=_LIMITS_S["prune"], help="for one prune")
    parser.add_argument("--json", type=Path, help="where to write all findings")
    args = parser.parse_args()
    zoo.quiet()
    torch.set_num_threads(1)
    _import_libraries()
    names = [name for name in zoo.available() if fnmatchcase(name, args.only)][: args.limit]
    names = list(dict.fromkeys((*names, *args.also)))
    left_out = len(zoo.NAMES) - len(zoo.available())
    if left_out:
        print(f"{left_out} networks are left out: their libraries are missing", file=sys.stderr)
    ways = [args.way] if args.way else list(WAYS)
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for name, way, found in run(names, ways, args.jobs, {**_LIMITS_S, "prune": args.limit_s}):
        results.setdefault(name, {})[way] = found
        print(f"{name} {_TITLES[way]}: {_line(found)}", file=sys.stderr, flush=True)
    sums = {way: summary(results, way) for way in ways}
    print(table(results, ways).to_markdown(), "", _summary_table(sums).to_markdown(), sep="\n")
    if args.json:
        args.json.write_text(json.dumps({"summary": sums, "networks": results}, indent=1))
    mine = sums.get("ours")
    return int(mine is not None and not _kept(mine))


def _kept(mine: dict[str, float]) -> bool:
    all_right = mine["run"] == mine["right"] == 1.0
    return all_right and mine["reached"] >= REACHED and mine["median_s"] < MEDIAN_S


def _summary_table(sums: dict[str, dict[str, float]]) -> Table:
    rows = [
        [
            _TITLES[way],
            int(one["networks"]),
            *(f"{one[key]:.1%}" for key in ("run", "right", "reached")),
            one["median_s"],
            one["slowest_s"],
        ]
        for way, one in sums.items()
    ]
    columns = ["", "networks", "run", "right", "within 5 % of the MACs", "median s", "slowest s"]
    return Table(columns, rows)


def _line(found: dict[str, Any]) -> str:
    macs = f"{found['macs']:.3f} of the MACs, " if found.get("macs") is not None else ""
    error = f"difference {found['error']:.0e}, " if found.get("error") is not None else ""
    seconds = f"{found['seconds']:.1f} s, " if found.get("seconds") is not None else ""
    notes = "; ".join(str(found[key]) for key in ("fails", "note", "reasons") if found.get(key))
    return f"{macs}{error}{seconds}runs: {verdict(found)} {notes}"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def _import_libraries() -> None:
    """Load what the networks are made of once, before the first process is forked."""
    for library in ("timm", "torchvision", "transformers"):
        name = next((name for name in zoo.available() if name.startswith(library)), None)
        if name:
            zoo.build(name)
    import torch_pruning  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
