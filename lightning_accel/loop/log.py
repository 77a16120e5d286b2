"""What one `self.log` needs, once the first one with these arguments has been checked.

`LightningModule.log` of Lightning 2.6 checks its arguments, reads the signature of `training_step`, builds
the metadata of the value and walks over everything its store holds to move it to a device: on every call,
a fifth of a millisecond, for an answer that is the same each time. Here the first call with certain
arguments takes that way, with all its errors and warnings, and is remembered; the next ones update the
same store with the same operations. Nothing is accumulated differently and nothing later.

All of it hangs on instances: the module, its callbacks, and the results of the loops.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class LeanLog:
    """Stands in for `module.log`, with the same arguments and the same effect.

    Args:
        module: A LightningModule whose class does not override `log`.
        trainer: Its Trainer.
    """

    def __init__(self, module: Any, trainer: Any) -> None:
        self._module = module
        self._trainer = trainer
        self._stock: Callable[..., None] = module.log
        self._known: dict[Any, tuple[Any, str, Any]] = {}

    def __reduce__(self) -> Any:
        # A copy of the module, and a pickled one, logs like any other module.
        return getattr, (self._module, "log")

    def __call__(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        logger: bool | None = None,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce_fx: Any = "mean",
        enable_graph: bool = False,
        sync_dist: bool = False,
        sync_dist_group: Any = None,
        add_dataloader_idx: bool = True,
        batch_size: int | None = None,
        metric_attribute: str | None = None,
        rank_zero_only: bool = False,
    ) -> None:
        """Log a value; see `LightningModule.log`."""
        given = (
            prog_bar, logger, on_step, on_epoch, reduce_fx, enable_graph, sync_dist, sync_dist_group,
            add_dataloader_idx,
        )  # fmt: skip
        more = (metric_attribute, rank_zero_only)
        module = self._module
        trainer = module._trainer
        results = None
        if trainer is self._trainer and not torch.compiler.is_compiling():
            results = trainer._results
        kind = _kind(value)
        if results is None or kind is None:
            self._stock(name, value, *given, batch_size, *more)
            return
        fx = module._current_fx_name
        key = id(results), results.dataloader_idx, fx, name, kind, batch_size is None, given, more
        metric = self._find(key, results, value)
        if metric is not None:
            self._update(results, metric, fx, value, batch_size)
            return
        self._stock(name, value, *given, batch_size, *more)
        if not (logger and trainer.logger is None):  # of which each call warns
            self._remember(key, results, fx, name, add_dataloader_idx)

    def _find(self, key: Any, results: Any, value: Any) -> Any:
        try:
            known = self._known.get(key)
        except TypeError:  # an unhashable argument, which the checks refuse
            return None
        if known is None:
            return None
        _, place, metric = known
        if results.get(place) is not metric or not (metric.is_tensor or metric.value is value):
            return None
        return metric

    def _remember(self, key: Any, results: Any, fx: str, name: str, add_index: bool) -> None:
        place = f"{fx}.{name}"
        if add_index and results.dataloader_idx is not None:
            place += f".{results.dataloader_idx}"
        metric = results.get(place)
        if metric is not None:  # a `barebones` Trainer stores nothing
            self._known[key] = results, place, metric

    def _update(
        self, results: Any, metric: Any, fx: str, value: Any, batch_size: int | None
    ) -> None:
        connector = self._trainer._logger_connector
        if connector._current_fx != fx and connector._first_loop_iter in (None, True):
            results.reset(metrics=False, fx=fx)
        if metric.is_tensor:
            if isinstance(value, Tensor):
                value = value.detach()
                if value.dim():
                    value = value.squeeze()
            else:
                value = torch.tensor(value, device=self._module.device, dtype=_dtype())
            if metric.value.device != value.device:
                metric.to(value.device)
        if batch_size is None:
            batch_size = results._extract_batch_size(metric, None, metric.meta)
        metric.forward(value, batch_size)
        metric.has_reset = False
        connector._current_fx = fx


class Placed:
    """Mixed into a stored value: to move it to where it is does nothing."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        mine = vars(self)
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.device):
            value = mine.get("value")
            if isinstance(value, Tensor) and value.device == args[0]:
                return self
        return super().to(*args, **kwargs)  # type: ignore[misc]


class LeanResults:
    """Mixed into a loop's results: what is stored there knows where it is."""

    def __setitem__(self, key: str, metric: Any) -> None:
        mixed_in(metric, Placed)
        super().__setitem__(key, metric)  # type: ignore[misc]


def mixed_in(instance: Any, mixin: type) -> None:
    """Let one instance have `mixin` before its own class, until `taken_out`; idempotent.

    >>> class Loud:
    ...     def name(self): return super().name().upper()
    >>> class Plain:
    ...     def name(self): return "plain"
    >>> it = Plain()
    >>> mixed_in(it, Loud)
    >>> it.name(), type(it).__name__
    ('PLAIN', 'Plain')
    >>> taken_out(it, Loud)
    >>> it.name()
    'plain'
    """
    own = type(instance)
    if not issubclass(own, mixin):
        instance.__class__ = _joined(mixin, own)


def taken_out(instance: Any, mixin: type) -> None:
    """Give an instance its class without `mixin` back, whatever else was mixed in; idempotent."""
    mixed: list[type] = []
    own = type(instance)
    while "_accel_mixin" in vars(own):
        mixed.append(vars(own)["_accel_mixin"])
        own = own.__bases__[1]
    if mixin in mixed:
        for kept in reversed([m for m in mixed if m is not mixin]):
            own = _joined(kept, own)
        instance.__class__ = own


_JOINED: dict[tuple[type, type], type] = {}


def _joined(mixin: type, own: type) -> type:
    if (mixin, own) not in _JOINED:
        body = {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "_accel_mixin": mixin,
        }
        _JOINED[mixin, own] = type(own.__name__, (mixin, own), body)
    return _JOINED[mixin, own]


def _kind(value: Any) -> Any:
    """Tell what can be remembered of a value: a tensor, a number, or which metric it is."""
    if type(value) is Tensor:
        return Tensor if value.numel() == 1 else None
    if isinstance(value, (float, int)):
        return float
    return id(value) if isinstance(value, nn.Module) else None


def _dtype() -> torch.dtype:
    dtype = torch.get_default_dtype()
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
