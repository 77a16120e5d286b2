"""Values for the progress bar stay on the device until somebody looks at them.

After every batch Lightning 2.6 turns each value logged with `prog_bar=True` into a Python number, which
waits for the device, also when the bar shows every hundredth step, or is off, or is that of another rank
(Lightning #21232). Here the tensors of the last batch are kept, and become numbers together, with one wait,
when `trainer.progress_bar_metrics` is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class LateNumbers(dict[str, Any]):
    """A dictionary that takes one-element tensors and shows them as numbers after `settle`.

    >>> numbers = LateNumbers()
    >>> numbers.update({"loss": torch.tensor(0.5), "step": 3})
    >>> dict(numbers), dict(numbers.settle())
    ({'step': 3}, {'loss': 0.5, 'step': 3})
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._late: dict[str, Tensor] = {}
        self._order = list(self)

    def update(self, other: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Take values; tensors wait."""
        for name, value in other.items():
            if name not in self and name not in self._late:
                self._order.append(name)
            if isinstance(value, Tensor):
                self._late[name] = value
            else:
                self._late.pop(name, None)
                self[name] = value

    def settle(self) -> LateNumbers:
        """Turn what waits into numbers, with one wait for each device and dtype."""
        if not self._late:
            return self
        alike: dict[Any, list[str]] = {}
        for name, value in self._late.items():
            alike.setdefault((value.device, value.dtype), []).append(name)
        for names in alike.values():
            values = torch.stack([self._late[name].reshape(()) for name in names])
            super().update(zip(names, values.tolist(), strict=True))
        self._late = {}
        if list(self) != self._order:
            items = [(name, self[name]) for name in self._order if name in self]
            self.clear()
            super().update(items)
        return self


class LateResults:
    """Mixed into a loop's results: values for the bar come out as tensors."""

    def metrics(self, on_step: bool) -> Any:
        """Collect what callbacks, loggers and the progress bar may see now."""
        found: dict[str, dict[str, Any]] = {"callback": {}, "log": {}, "pbar": {}}
        store: Any = self
        for _, stored in store.valid_items():
            value = store._get_cache(stored, on_step)
            if not isinstance(value, Tensor):
                continue
            meta = stored.meta
            name, forked = store._forked_name(stored, on_step)
            if meta.logger:
                found["log"][forked] = value
            if store.training or (meta.on_epoch and not on_step):
                found["callback"][name] = found["callback"][forked] = value
            if meta.prog_bar:
                found["pbar"][forked] = _kept(value, stored)
        return found


class LateConnector:
    """Mixed into a Trainer's logger connector: numbers for the bar are made when it asks."""

    _progress_bar_metrics: dict[str, Any]

    @property
    def progress_bar_metrics(self) -> dict[str, Any]:
        """The numbers of the progress bar."""
        shown: dict[str, Any] = super().progress_bar_metrics  # type: ignore[misc]
        return shown.settle() if isinstance(shown, LateNumbers) else shown

    def reset_metrics(self) -> None:
        """Forget all values."""
        super().reset_metrics()  # type: ignore[misc]
        self._progress_bar_metrics = LateNumbers()

    def teardown(self) -> None:
        """Leave plain numbers behind."""
        settled(self)
        super().teardown()  # type: ignore[misc]


def settled(connector: Any) -> None:
    """Make a connector's numbers an ordinary dictionary again."""
    shown = connector._progress_bar_metrics
    if isinstance(shown, LateNumbers):
        connector._progress_bar_metrics = dict(shown.settle())


def _kept(value: Tensor, stored: Any) -> Any:
    if value.numel() != 1:
        return value.item()  # raises, as at once
    value = value.detach()
    # The result of a user's metric may be its state, which the next step changes in place.
    return value if stored.is_tensor else value.clone()
