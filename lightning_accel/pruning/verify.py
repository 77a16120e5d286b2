"""A cut is right when the smaller network computes what the masked dense one computes.

Setting the removed elements to zero and leaving them in place must give the same outputs, in float64
to about 1e-12, once normalisations over the cut dimension are replaced by their affine part on both
sides (their statistics change by design, which fine-tuning repairs). This catches what merely running
cannot: heads or channels wired to the wrong consumer without any error.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_accel.errors import BrokenModel
from lightning_accel.pruning.trace import where
from lightning_accel.surgery import Cut, twin
from lightning_accel.surgery.call import Call, cast, run, same_random_state, tensors

TOLERANCE = 1e-6


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
        self.exact = twin(model).to(dtype=self.dtype).eval()
        self.exact_calls = cast(calls, self.dtype)

    def equivalence(self, cut: Cut) -> None:
        """Raise `BrokenModel` unless the cut network equals the masked one."""
        dense, small = twin(self.exact), twin(self.exact)
        cut.masked(dense)
        cut.apply(small)
        expected = self._outputs(dense)
        found = self._outputs(small)
        if [t.shape for t in expected] != [t.shape for t in found]:
            raise BrokenModel("the cut changes the shape of the network's output", "", _REMEDY)
        for want, have in zip(expected, found, strict=True):
            scale = want.abs().max().clamp_min(1e-12) if want.numel() else want.new_ones(())
            error = float((want - have).abs().max() / scale) if want.numel() else 0.0
            if not error <= (TOLERANCE if self.dtype == torch.float64 else 1e-3):
                raise BrokenModel(
                    "the cut network does not compute what the masked one computes",
                    f"a relative difference of {error:.1e}",
                    _REMEDY,
                )

    def training(self, cut: Cut) -> None:
        """Raise `BrokenModel` unless forward and backward run in train mode, where they did before."""
        calls = in_dtype_of(self.calls, self.model)
        if not _trains(twin(self.model), calls):
            return
        small = twin(self.model)
        cut.apply(small)
        _backward(small, calls)

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with torch.no_grad(), same_random_state(model), _AffineNorms():
            torch.manual_seed(0)
            return _tensors(_run_located(model, self.exact_calls))


_REMEDY = "exclude the module with `select=Select(exclude=...)`"


class _AffineNorms(TorchFunctionMode):
    """Replace normalisations across channels by their affine part."""

    _LAYER = {F.layer_norm, torch.layer_norm, F.rms_norm, torch.rms_norm}
    _GROUP = {F.group_norm, torch.group_norm}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._LAYER or func in self._GROUP:
            x = args[0] if args else kwargs["input"]
            weight = args[2] if len(args) > 2 else kwargs.get("weight")
            has_bias = func not in (F.rms_norm, torch.rms_norm)
            bias = (args[3] if len(args) > 3 else kwargs.get("bias")) if has_bias else None
            shape = (-1, *[1] * (x.dim() - 2)) if func in self._GROUP else None
            x = x if weight is None else x * (weight if shape is None else weight.view(shape))
            return x if bias is None else x + (bias if shape is None else bias.view(shape))
        return func(*args, **kwargs)


def _run_located(model: nn.Module, calls: Sequence[Call]) -> list[Any]:
    names = {module: name for name, module in model.named_modules()}
    with where(model, names) as stack:
        try:
            return run(model, calls)
        except Exception as error:
            raise BrokenModel(
                f"the cut network fails in `{stack[-1] if stack else ''}`",
                f"{type(error).__name__}: {error}",
                _REMEDY,
            ) from error


def _trains(model: nn.Module, calls: Sequence[Call]) -> bool:
    try:
        _backward(model, calls)
    except BrokenModel:
        return False  # not our doing: the network does not train on this example as it is
    return True


def _backward(model: nn.Module, calls: Sequence[Call]) -> None:
    model.train()
    with torch.enable_grad(), same_random_state(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outputs = [t for t in _tensors(_run_located(model, calls)) if t.requires_grad]
        total = sum(t.float().mean() for t in outputs)
        if isinstance(total, Tensor):
            try:
                total.backward()
            except RuntimeError as error:
                raise BrokenModel("the cut network has no backward", str(error), _REMEDY) from error


def _tensors(outputs: Any) -> list[Tensor]:
    return [t for t in tensors(outputs) if t.is_floating_point()]


def in_dtype_of(calls: Sequence[Call], model: nn.Module) -> tuple[Call, ...]:
    """Convert floating point arguments to the dtype of the model's parameters."""
    dtypes = [p.dtype for p in model.parameters() if p.is_floating_point()]
    return cast(calls, dtypes[0]) if dtypes else tuple(calls)
