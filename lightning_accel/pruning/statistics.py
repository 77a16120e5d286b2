"""Statistics across channels, held equal while a cut network is compared with the masked one.

A layer norm, or a user's own one made of `mean` and `rsqrt`, divides by the number of channels, so a cut
changes its statistics by design; fine-tuning repairs that. Everything else a cut must leave as it was. So
the masked network's statistics are written down and used again, one after another, in the cut one: what
is left to differ is an error. No norm has to be known by name for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_accel.surgery import Cut

_REDUCTIONS = {"mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min"}
_NORMS = {"native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_batch_norm"}
_NORMS |= {"_native_batch_norm_legit", "cudnn_batch_norm"}


class Note(NamedTuple):
    """One statistic of the masked network: the operation, its input's shape and its results."""

    name: str
    shape: tuple[int, ...]
    results: tuple[Tensor, ...]


class Record(TorchDispatchMode):
    """Writes down every statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[Note] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = _name(func)
        if _is_statistic(name, args):
            results = result if isinstance(result, tuple) else (result,)
            self.notes.append(Note(name, tuple(args[0].shape), tuple(results)))
        return result


class Replay(TorchDispatchMode):
    """Uses the statistics written down wherever the dimension that they run over was cut.

    Args:
        notes: What `Record` wrote down in the masked network.
        cut: Which places are left of a dimension that the results still have.
        stack: The modules now running, innermost last.
    """

    def __init__(self, notes: Sequence[Note], cut: Cut, stack: Sequence[str]) -> None:
        super().__init__()
        self._notes = iter(notes)
        self._cut = cut
        self._stack = stack

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = _name(func)
        if not _is_statistic(name, args):
            return result
        note = next(self._notes, None)
        if note is None or note.name != name or note.shape == tuple(args[0].shape):
            return result
        if name in _NORMS:
            return self._normalized(func, name, args, kwargs, result, note)
        if isinstance(result, tuple):
            return tuple(self._as(n, r) for n, r in zip(note.results, result, strict=True))
        return self._as(note.results[0], result)

    def _normalized(
        self, func: Any, name: str, args: Any, kwargs: Any, result: Any, note: Note
    ) -> Any:
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        x, weight, bias = given["input"], given.get("weight"), given.get("bias")
        out, *old = result
        new = [self._as(n, r) for n, r in zip(note.results[1:], old, strict=True)]
        if name == "native_group_norm":
            if given["group"] != note.results[1].shape[1] and new[0] is old[0]:
                return result
            shape = (x.shape[0], given["group"], -1)
            grouped = x.reshape(shape)
            y = ((grouped - new[0].unsqueeze(-1)) * new[1].unsqueeze(-1)).reshape(x.shape)
            per_channel = (1, -1, *[1] * (x.dim() - 2))
        elif "batch_norm" in name:
            per_channel = (1, -1, *[1] * (x.dim() - 2))
            y = (x - new[0].view(per_channel)) * new[1].view(per_channel)
        elif name == "_fused_rms_norm":
            y, per_channel = x * new[0], None
        else:
            y, per_channel = (x - new[0]) * new[1], None
        if weight is not None:
            y = y * (weight if per_channel is None else weight.view(per_channel))
        if bias is not None:
            y = y + (bias if per_channel is None else bias.view(per_channel))
        return (y.to(out.dtype), *new)

    def _as(self, noted: Tensor, own: Tensor) -> Tensor:
        """Return the noted statistic with the places that `own` still has, or `own`."""
        for dim in range(own.dim()):
            if noted.dim() == own.dim() and noted.shape[dim] != own.shape[dim]:
                positions = self._places(dim, noted.shape[dim], own.shape[dim])
                if positions is None:
                    return own
                noted = noted.index_select(dim, positions.to(noted.device))
        return noted if noted.shape == own.shape else own

    def _places(self, at: int, old: int, new: int) -> Tensor | None:
        """Return the places left of a dimension of this size, if the module running has one such cut.

        Where several tensors of it are cut from and to these sizes, the same dimension counts.
        """
        for module in reversed(self._stack):
            prefix = f"{module}." if module else ""
            cut = [
                (dim, positions)
                for name, kept in self._cut.kept.items()
                if name.startswith(prefix)
                for dim, positions in enumerate(kept.dims)
                if positions is not None
                and len(positions) == new
                and self._cut.before.tensors[name][dim] == old
            ]
            for found in ([p for _, p in cut], [p for dim, p in cut if dim == at]):
                if found and all(torch.equal(found[0], other) for other in found):
                    return found[0]
            if cut:
                return None
        return None


def _name(func: Any) -> str:
    return str(func._schema.name).removeprefix("aten::")


def _is_statistic(name: str, args: Any) -> bool:
    if name in _NORMS:
        return "batch_norm" not in name or any(a is True for a in args[3:6])
    return name in _REDUCTIONS and len(args) > 1 and not isinstance(args[1], Tensor)
