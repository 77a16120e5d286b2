"""Multiply-accumulates of one call, counted by torch's own dispatcher while the call really runs.

`torch.utils.flop_counter` counts two operations per multiply-accumulate and knows matrix products and
convolutions. By itself it returns 0, silently, for the fused transformer layer of eval mode, for
attention on CPU, for LSTM and for products with a vector. Here the fused paths are switched off while
counting, the missing formulas are added, and what stays unknown is named in `missed`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry, sdpa_flop_count

aten = torch.ops.aten

# Parts of names of operations that hold products and that neither torch nor we have a formula for.
_OPAQUE = (
    *("rnn", "lstm", "gru", "encoder_layer", "multi_head", "scaled_dot_product"),
    *("addbmm", "cdist", "fft", "grouped_mm", "int_mm", "int4pack", "int8pack", "linalg"),
    *("mkldnn_linear", "fbgemm", "linear_relu"),
)
_POINTWISE = ("thnn_fused", "backward")
_KNOWN_NAMESPACES = ("aten", "prim", "prims", "c10d", "_c10d_functional", "profiler", "inductor")


class MacsCount(NamedTuple):
    """Multiply-accumulates of a call; `partial` when operations were `missed`, by module and name."""

    macs: int
    partial: bool
    missed: tuple[str, ...]


def count_macs(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
) -> MacsCount:
    """Count the multiply-accumulates of `model(*args, **kwargs)` in eval mode, uncompiled.

    Weights, buffers, gradients, training flags and random state are as before afterwards.

    >>> count_macs(nn.Linear(8, 4), (torch.ones(2, 8),))
    MacsCount(macs=64, partial=False, missed=())
    """
    return count_run(lambda: model(*args, **(kwargs or {})), model)


def count_run(run: Callable[[], Any], model: nn.Module) -> MacsCount:
    """Count the multiply-accumulates of `run`, which calls `model` or parts of it.

    >>> net = nn.Linear(8, 4)
    >>> count_run(lambda: [net(torch.ones(2, 8)) for _ in range(3)], net).macs
    192
    """
    seen = _Unknown(model)
    counter = FlopCounterMode(display=False, custom_mapping=_MISSING)
    counter.mod_tracker = _Anywhere()  # type: ignore[assignment]
    with preserve_buffers(model), eval_mode(model), torch.no_grad(), unfused(model), seen, counter:
        run()
    missed = tuple(sorted(seen.missed))
    return MacsCount(counter.get_total_flops() // 2, bool(missed), missed)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set every training flag to false, without calling anyone's `train()`, and set them back."""
    flags = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@contextmanager
def preserve_buffers(model: nn.Module) -> Iterator[None]:
    """Put buffers and torch's random state back at the end, in place and bit-equal."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    kinds = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(kinds)):
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Choose kernels made of plain products: no transformer fast path, no vendor RNN, no compiler."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    onednn = torch._C._get_mkldnn_enabled()  # `mkldnn.flags` warns about TF32 on every machine
    has_rnn = any(isinstance(module, nn.RNNBase) for module in model.modules())
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast_path)
        torch.backends.mha.set_fastpath_enabled(False)
        if has_rnn:
            stack.callback(torch._C._set_mkldnn_enabled, onednn)
            torch._C._set_mkldnn_enabled(False)
            cudnn = torch.backends.cudnn
            stack.callback(setattr, cudnn, "enabled", cudnn.enabled)
            cudnn.enabled = False
        if (
            "torch._dynamo" in sys.modules
        ):  # otherwise nothing is compiled, and importing it is slow
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


class _Anywhere:
    """Stands for torch's module tracker, which fails where a module is handed a parameter."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: Any) -> None: ...


class _Unknown(TorchDispatchMode):
    """Notes operations that do arithmetic which no formula counts, with the module they are in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.missed: set[str] = set()
        self._model = model
        self._stack: list[str] = []
        self._handles: list[Any] = []

    def __enter__(self) -> _Unknown:
        for name, module in self._model.named_modules():
            label = f"{name} ({type(module).__name__})" if name else type(module).__name__
            self._handles.append(
                module.register_forward_pre_hook(lambda *_, at=label: self._stack.append(at))
            )
            self._handles.append(
                module.register_forward_hook(
                    lambda *_: self._stack.pop() and None, always_call=True
                )
            )
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        packet = func.overloadpacket
        if packet not in flop_registry and packet not in _MISSING and _is_arithmetic(func):
            self.missed.add(f"{self._stack[-1] if self._stack else ''}: {packet}".lstrip(": "))
        return func(*args, **(kwargs or {}))


def _is_arithmetic(func: Any) -> bool:
    name = func.overloadpacket.__name__
    if any(part in name for part in _POINTWISE):
        return False
    return func.namespace not in _KNOWN_NAMESPACES or any(part in name for part in _OPAQUE)


def _product_of_vector(matrix: Any, vector: Any, **_: Any) -> int:
    return int(2 * prod(matrix))


def _added_product_of_vector(bias: Any, matrix: Any, vector: Any, **_: Any) -> int:
    return int(2 * prod(matrix))


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query, key, value))


def _bilinear(first: Any, weight: Any, second: Any, *_: Any, **__: Any) -> int:
    return int(2 * first[0] * prod(weight))  # (batch, in1), (out, in1, in2), (batch, in2)


def _grouped_product(rows: Any, experts: Any, *_: Any, **__: Any) -> int:
    return int(2 * prod(rows) * experts[-1])  # (tokens, inputs), (experts, inputs, outputs)


_MISSING: dict[Any, Any] = {
    aten.mv: _product_of_vector,
    aten.dot: _product_of_vector,
    aten.addmv: _added_product_of_vector,
    aten._trilinear: _bilinear,
    aten._grouped_mm: _grouped_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
}
