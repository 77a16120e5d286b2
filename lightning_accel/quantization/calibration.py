"""What comes into the layers on a few batches, and the range that is best for it.

The whole extent of what was seen leaves few integers for the bulk of it where there are outliers. Two choices
clip them: a share of the values on each side ("percentile"), or the range whose rounding and clipping errors together
are smallest ("mse", as in Choukroun et al. 2019, arXiv:1902.06822). Both read the batches a second time, into a histogram
over the extent that the first time gave.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from inspect import Parameter, signature
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_accel.errors import explain
from lightning_accel.progress import progress
from lightning_accel.quantization import grid as grids
from lightning_accel.quantization.layers import QuantizedLayer
from lightning_accel.surgery.call import Call, run
from lightning_accel.surgery.preserve import preserve_rng

Observer = Literal["minmax", "percentile", "mse"]
OBSERVERS = ("minmax", "percentile", "mse")
_BINS = 2048
_CLIPPED = 1e-4
"""Share of the values that "percentile" leaves outside, half on each side."""
_SHRINKS = torch.linspace(1.0, 0.2, 81)


def calls_from(model: nn.Module, calibration: Any, limit: int) -> list[list[Call]]:
    """Read calibration data: batches as a DataLoader gives them, tensors, or calls.

    Of a batch that is a tuple the first items are taken, as many as `forward` takes without defaults: images of
    (images, labels). A dict is keywords where `forward` takes them by these names, else one argument.

    Args:
        model: Whose forward is meant.
        calibration: An iterable; a tensor is one batch.
        limit: Batches that are read.

    Raises:
        ValueError: There is no batch.
        TypeError: It cannot be iterated over.

    >>> calls_from(nn.Linear(2, 2), [(torch.ones(1, 2), "label")], 8)
    [[Call(name='', args=(tensor([[1., 1.]]),), kwargs={})]]
    """
    batches: Iterable[Any] = [calibration] if isinstance(calibration, Tensor) else calibration
    try:
        if isinstance(batches, (str, bytes, Mapping)):
            raise TypeError
        with preserve_rng(
            calibration
        ):  # a DataLoader draws from them, and the user's next one would give others
            read = list(islice(batches, limit))
    except TypeError:
        raise TypeError(
            explain(
                "`calibration` is a DataLoader, or a list of batches",
                type(calibration).__name__,
                "pass batches as the model's forward takes them",
            )
        ) from None
    if not read:
        raise ValueError(
            explain(
                "`calibration` holds no batch, and ranges cannot be guessed",
                type(calibration).__name__,
                "pass a few batches of the training data",
            )
        )
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    moved = [tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, b) for b in read]
    return [b if _are_calls(b) else [_call(model, b)] for b in moved]


def _are_calls(batch: Any) -> bool:
    return isinstance(batch, (list, tuple)) and all(isinstance(item, Call) for item in batch)


def _call(model: nn.Module, batch: Any) -> Call:
    takes = signature(model.forward).parameters
    if isinstance(batch, Mapping):
        by_name = set(batch) <= set(takes) or any(
            p.kind is Parameter.VAR_KEYWORD for p in takes.values()
        )
        return Call("", (), dict(batch)) if by_name else Call("", (batch,), {})
    if not isinstance(batch, (list, tuple)):
        return Call("", (batch,), {})
    if any(p.kind is Parameter.VAR_POSITIONAL for p in takes.values()):
        return Call("", tuple(batch), {})
    plain = [p for p in takes.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is Parameter.empty for p in plain)
    return Call("", tuple(batch[: max(needed, 1)]), {})


@contextmanager
def in_mode(layers: Mapping[str, QuantizedLayer], mode: Any) -> Iterator[None]:
    """Let layers compute in one mode meanwhile."""
    before = {name: layer.accel_mode for name, layer in layers.items()}
    try:
        for layer in layers.values():
            layer.accel_mode = mode
        yield
    finally:
        for name, layer in layers.items():
            layer.accel_mode = before[name]


@torch.no_grad()
def observe(
    model: nn.Module,
    layers: Mapping[str, QuantizedLayer],
    batches: Sequence[Sequence[Call]],
    observer: Observer = "minmax",
) -> dict[str, Tensor]:
    """Return the range of what comes into each layer that is called, of shape (2,); the model must be in eval mode.

    Raises:
        ValueError: Values that are no numbers came in.
    """
    for layer in layers.values():
        layer.take_seen()
    called: set[str] = set()
    with (
        in_mode(layers, "watching"),
        listening(layers, lambda name, _: called.add(name)),
        progress("calibrating", len(batches)) as step,
    ):
        for calls in batches:
            run(model, calls)
            step(by=1)
    extents = {n: layer.take_seen() for n, layer in layers.items() if n in called}
    wild = [n for n, e in extents.items() if not (e.isfinite().all() or e[0] > e[1])]
    if wild:
        raise ValueError(
            explain(
                "values that are no finite numbers come into layers on the calibration batches",
                ", ".join(f"`{name}`" for name in wild[:6]),
                "look at the data and the weights, or leave these layers out by `select`",
            )
        )
    with in_mode(layers, "plain"):
        return _narrowed(model, partial(listening, layers), batches, extents, observer)


@torch.no_grad()
def observe_outputs(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Sequence[Call]],
    observer: Observer = "minmax",
) -> dict[str, Tensor]:
    """Return the range of what modules give, of shape (2,); the model must be in eval mode.

    >>> observe_outputs(nn.Sequential(nn.ReLU()), ["0"], [[Call("", (torch.tensor([-1.0, 3.0]),), {})]])
    {'0': tensor([0., 3.])}
    """
    modules = {name: model.get_submodule(name) for name in names}
    extents: dict[str, Tensor] = {}

    def widen(name: str, values: Any) -> None:
        if isinstance(values, Tensor) and values.numel():
            new = torch.stack(values.aminmax()).float()
            both = torch.stack((new, extents.get(name, new)))
            extents[name] = torch.stack((both[:, 0].amin(), both[:, 1].amax()))

    listen = partial(listening, modules, outputs=True)
    with listen(widen):
        for calls in batches if names else ():
            run(model, calls)
    return _narrowed(model, listen, batches, extents, observer)


@torch.no_grad()
def observe_channels(
    model: nn.Module, layer: nn.Module, batches: Sequence[Sequence[Call]], dim: int
) -> Tensor:
    """Return the largest absolute value of each channel of what comes into a layer.

    >>> net = nn.Linear(2, 1)
    >>> observe_channels(net, net, [[Call("", (torch.tensor([[1.0, -3.0], [2.0, 0.0]]),), {})]], -1)
    tensor([2., 3.])
    """
    found: list[Tensor] = []

    def take(_: str, values: Any) -> None:
        rows = values.detach().float().abs().movedim(dim, 0).flatten(1)
        found.append(rows.amax(1))

    with listening({"": layer}, take):
        for calls in batches:
            run(model, calls)
    return torch.stack(found).amax(0)


def _narrowed(
    model: nn.Module,
    listen: Callable[[Callable[[str, Any], Any]], AbstractContextManager[None]],
    batches: Sequence[Sequence[Call]],
    extents: dict[str, Tensor],
    observer: Observer,
) -> dict[str, Tensor]:
    """Return ranges by what is heard in a second run."""
    if observer == "minmax" or not extents:
        return extents
    histograms = _histograms(model, listen, batches, extents)
    choose = _percentile if observer == "percentile" else _least_error
    return {name: choose(histograms[name], extent) for name, extent in extents.items()}


def _histograms(
    model: nn.Module,
    listen: Callable[[Callable[[str, Any], Any]], AbstractContextManager[None]],
    batches: Sequence[Sequence[Call]],
    extents: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    counts = {name: torch.zeros(_BINS, dtype=torch.float64) for name in extents}

    def count(name: str, values: Any) -> None:
        low, high = (float(v) for v in extents.get(name, (0.0, 0.0)))
        if isinstance(values, Tensor) and low < high:
            binned = torch.histc(values.detach().float().cpu(), _BINS, low, high)
            counts[name] += binned.double()

    with listen(count):
        for calls in batches:
            run(model, calls)
    return counts


@contextmanager
def listening(
    layers: Mapping[str, nn.Module], told: Callable[[str, Any], Any], *, outputs: bool = False
) -> Iterator[None]:
    """Tell what comes into layers, or what they give, by their names."""
    handles = [
        layer.register_forward_hook(lambda _, __, given, name=name: told(name, given))
        if outputs
        else layer.register_forward_pre_hook(partial(_tell, told, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tell(
    told: Callable[[str, Any], Any],
    name: str,
    _: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    told(name, args[0] if args else kwargs.get("input"))


def _percentile(counts: Tensor, extent: Tensor) -> Tensor:
    """Return the extent without a share of the values on each side."""
    if not counts.sum():
        return extent
    shares = (counts.cumsum(0) / counts.sum()).float()
    edges = torch.linspace(float(extent[0]), float(extent[1]), _BINS + 1)
    low = int((shares < _CLIPPED / 2).sum())
    high = int((shares < 1 - _CLIPPED / 2).sum()) + 1
    return torch.stack((edges[low], edges[min(high, _BINS)])).to(extent.device)


def _least_error(counts: Tensor, extent: Tensor) -> Tensor:
    """Return the range, of those that shrink each side by itself, whose mean squared error is least."""
    if not counts.sum():
        return extent
    edges = torch.linspace(float(extent[0]), float(extent[1]), _BINS + 1)
    middles = (edges[1:] + edges[:-1]) / 2
    best = extent.cpu()
    for side in (1, 0):
        tried = best.repeat(len(_SHRINKS), 1)
        tried[:, side] *= _SHRINKS
        errors = torch.stack([_error(counts, middles, range_) for range_ in tried])
        best = tried[int(errors.argmin())]
    return best.to(extent.device)


def _error(counts: Tensor, middles: Tensor, range_: Tensor) -> Tensor:
    return (counts * (grids.rounded_input(middles, range_) - middles).double().square()).sum()
