"""A cut is right when the smaller network computes what the masked dense one computes.

Setting the removed elements to zero and leaving them in place must give the same outputs, in float64
to about 1e-12, once statistics over the cut dimension are the same on both sides (they change by design,
which fine-tuning repairs; see `statistics`). This catches what merely running cannot: heads or channels
wired to the wrong consumer without any error.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_accel.errors import BrokenModel
from lightning_accel.measure.flops import unfused
from lightning_accel.pruning.blank import Blank
from lightning_accel.pruning.statistics import Record, Replay
from lightning_accel.surgery import Cut, twin
from lightning_accel.surgery.call import (
    Call,
    as_call,
    cast,
    converted,
    reals,
    run,
    same_random_state,
    tensors,
)

TOLERANCE = 1e-9


def mask_equivalence(model: nn.Module, cut: Cut, *, example: Any) -> float:
    """Return how far the cut network is from the masked one, relative to the output's largest value.

    A right cut gives rounding errors of float64, about 1e-15. `model` is not changed.

    Args:
        model: The network for which the cut was planned.
        cut: What `plan` returns.
        example: A tensor, a tuple of arguments, or a dict of keyword arguments; any data will do.

    Raises:
        BrokenModel: The cut network fails, or its outputs have another shape.

    >>> from lightning_accel.pruning import plan
    >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> x = torch.ones(1, 4)
    >>> mask_equivalence(net, plan(net, calls=(as_call(x),), ratio=0.5), example=x) < 1e-10
    True
    """
    calls = (as_call(example),)
    return Verifier(twin(model, calls), calls).difference(cut)


class Verifier:
    """Proves cuts of one network on small example calls.

    Args:
        model: The network; only copies of it are run.
        calls: Example calls, small ones.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self.model = model
        self.calls = calls
        device_has_float64 = next(model.parameters()).device.type != "mps"
        self.dtype = torch.float64 if device_has_float64 else torch.float32
        self.why_untrained = _why_untrained(twin(model), in_dtype_of(calls, model))
        self._convert()
        self.fell_back = False
        if self.dtype == torch.float64 and not runs(self.exact, self.exact_calls, finite=True):
            # Some kernels, such as those of grouped experts, know no float64; and a mask of the least
            # number of float64 becomes minus infinity where a forward goes on in float32.
            able, self.dtype = runs(self.exact, self.exact_calls), torch.float32
            self._convert()
            self.fell_back = not able or runs(self.exact, self.exact_calls, finite=True)
            if not self.fell_back:
                self.dtype = torch.float64
                self._convert()

    def _convert(self) -> None:
        """Take copies of network and calls in the dtype of the proof, with no constants to hide behind."""
        self.exact = converted(twin(self.model), self.dtype).eval()
        self.exact_calls = cast(self.calls, self.dtype)
        varied, calls = twin(self.exact), _varied_calls(self.exact_calls)
        _vary(varied)
        if runs(varied, calls, finite=True):
            self.exact, self.exact_calls = varied, calls
        self.sizes = [self.exact_calls]
        self.networks = [self.exact]
        opposite = _opposite(self.exact)
        if runs(opposite, self.exact_calls, finite=True):
            self.networks.append(opposite)

    @property
    def tolerance(self) -> float:
        return TOLERANCE if self.dtype == torch.float64 else 1e-3

    def equivalence(self, cut: Cut) -> None:
        """Raise `BrokenModel` unless the cut network equals the masked one."""
        error = self.difference(cut)
        if not error <= self.tolerance:
            where = " at another size of its input" if len(self.sizes) > 1 else ""
            raise BrokenModel(
                f"the cut network does not compute what the masked one computes{where}",
                f"a relative difference of {error:.1e}",
                _REMEDY,
            )

    def difference(self, cut: Cut) -> float:
        """Return the largest difference between the cut and the masked network, over the output's scale.

        Raises:
            BrokenModel: The cut network fails, or its outputs have another shape.
        """
        worst = 0.0
        for calls in self.sizes:
            for network in self.networks:
                error = self._difference(network, cut, calls)
                if not error <= self.tolerance:
                    return error
                worst = max(worst, error)
        return worst

    def holds_elsewhere(self, cut: Cut) -> bool:
        """Whether the cut is right at another size of the input as well; if not, that one counts from now on.

        What is reshaped by sizes that are equal in the example only may be right there and nowhere else.
        """
        if len(self.sizes) > 1:
            return True
        for calls in resized(self.sizes[0]):
            if runs(self.exact, calls, finite=True):
                self.sizes.append(calls)
                try:
                    self.equivalence(cut)
                except BrokenModel:
                    return False
                self.sizes.pop()
                return True
        return True

    def _difference(self, network: nn.Module, cut: Cut, calls: Sequence[Call]) -> float:
        dense, small = twin(network), twin(network)
        blank = Blank(dense, cut, _NOTHING if self.dtype == torch.float64 else 0.0)
        cut.apply(small)
        record = Record()
        with torch.no_grad(), same_random_state(dense), unfused(dense), record, blank:
            torch.manual_seed(0)
            expected = self._numbers(run(dense, calls))
        with torch.no_grad(), same_random_state(small), unfused(small), _located(small):
            torch.manual_seed(0)
            with Replay(record.notes, self.tolerance):
                found = self._numbers(run(small, calls))
        if [t.shape for t in expected] != [t.shape for t in found]:
            raise BrokenModel("the cut changes the shape of the network's output", "", _REMEDY)
        if not sum(t.numel() for t in expected):
            raise BrokenModel(
                "nothing can be proved: the network's outputs hold no number", "", _REMEDY
            )
        worst = 0.0
        for want, have in zip(expected, found, strict=True):
            if want.numel():
                scale = want.abs().max().clamp_min(1e-12)
                error = float((want - have).abs().max() / scale)
                worst = error if not error <= worst else worst
        return worst

    def _numbers(self, outputs: Any) -> list[Tensor]:
        found = (t.resolve_conj() for t in tensors(outputs))
        return [(torch.view_as_real(t) if t.is_complex() else t).to(self.dtype) for t in found]

    def training(self, cut: Cut) -> None:
        """Raise `BrokenModel` unless forward and backward run in train mode, where they did before."""
        calls = in_dtype_of(self.calls, self.model)
        if self.why_untrained:
            return
        small = twin(self.model)
        cut.apply(small)
        _backward(small, calls)


_SIZES = 3  # of the sizes of its input that a network may take otherwise
_NOTHING = 1e-30  # for weights that are divided by their own norm
_REMEDY = "exclude the module with `select=Select(exclude=...)`"


@contextmanager
def _located(model: nn.Module) -> Iterator[None]:
    """Let an error say in which module it happened."""
    stack: list[str] = []

    def leave(*_: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        push = partial(_push, stack, name)
        handles.append(module.register_forward_pre_hook(push, prepend=True))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    except Exception as error:
        raise BrokenModel(
            f"the cut network fails in `{stack[-1] if stack else ''}`",
            f"{type(error).__name__}: {error}",
            _REMEDY,
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _push(stack: list[str], name: str, *_: Any) -> None:
    stack.append(name)


def runs(model: nn.Module, calls: Sequence[Call], *, finite: bool = False) -> bool:
    """Whether a copy of the model runs on these calls in eval mode, and gives numbers if it has to."""
    copy = twin(model).eval()
    try:
        with torch.no_grad(), same_random_state(copy), unfused(copy):
            outputs = run(copy, calls)
    except Exception:  # whatever a forward may raise
        return False
    return not finite or all(bool(t.isfinite().all()) for t in tensors(outputs))


def resized(calls: Sequence[Call]) -> Iterator[tuple[Call, ...]]:
    """Yield the calls with one size of their tensors, wherever it stands, half as large again, or halved.

    >>> [tuple(c[0].args[0].shape) for c in resized([Call("", (torch.ones(2, 3, 8, 8),), {})])]
    [(2, 3, 12, 12), (2, 3, 4, 4), (2, 4, 8, 8), (2, 1, 8, 8)]
    """
    held = tensors([(c.args, c.kwargs) for c in calls])
    sizes = Counter(n for t in held for n in t.shape[1:] if n > 1)
    for size, _ in sizes.most_common(_SIZES):
        for other in (size * 3 // 2, size // 2):
            change = partial(_resized, size=size, other=other)
            yield tuple(Call(c.name, *tree_map(change, (c.args, c.kwargs))) for c in calls)


def _resized(value: Any, *, size: int, other: int) -> Any:
    if isinstance(value, Tensor):
        for dim in range(1, value.dim()):
            if value.shape[dim] == size:
                places = torch.arange(other, device=value.device) % size
                value = value.index_select(dim, places)
    return value


def _opposite(model: nn.Module) -> nn.Module:
    """Return a copy with the signs of all weights turned: what is dead on these calls lives there."""
    copy = twin(model)
    for parameter in copy.parameters():
        if parameter.numel() > 1 and (parameter.is_floating_point() or parameter.is_complex()):
            parameter.data = -parameter.data
    return copy


def _vary(model: nn.Module) -> None:
    """Give parameters whose values are all the same different ones, in place.

    Behind a norm whose weights begin as zeros, any cut would be right, until it learns.
    """
    for parameter in model.parameters():
        parameter.data = _varied(parameter.data)


def _varied_calls(calls: Sequence[Call]) -> tuple[Call, ...]:
    def vary(value: Any) -> Any:
        return _varied(value) if isinstance(value, Tensor) else value

    return tuple(Call(c.name, *tree_map(vary, (c.args, c.kwargs))) for c in calls)


def _varied(tensor: Tensor) -> Tensor:
    if tensor.numel() < 2 or not tensor.is_floating_point() or tensor.min() != tensor.max():
        return tensor
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(tensor.shape, generator=generator, dtype=torch.float64).to(tensor) + 0.5
    constant = float(tensor.flatten()[0])
    size = min(max(abs(constant), 0.1), 10.0)
    return shares * (-size if constant < 0 else size)


def _why_untrained(model: nn.Module, calls: Sequence[Call]) -> str:
    """Return why the network does not train on these calls as it is; empty if it does."""
    try:
        _backward(model, calls)
    except BrokenModel as error:
        return str(error.__cause__ or error)
    return ""


def _backward(model: nn.Module, calls: Sequence[Call]) -> None:
    model.train()
    with torch.enable_grad(), same_random_state(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with _located(model):
            outputs = [t for t in reals(run(model, calls)) if t.requires_grad]
        total = sum(t.float().mean() for t in outputs)
        if isinstance(total, Tensor):
            try:
                total.backward()
            except RuntimeError as error:
                raise BrokenModel("the cut network has no backward", str(error), _REMEDY) from error


def in_dtype_of(calls: Sequence[Call], model: nn.Module) -> tuple[Call, ...]:
    """Convert floating point arguments to the dtype of the model's parameters."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return cast(calls, dtypes[0]) if dtypes else tuple(calls)
