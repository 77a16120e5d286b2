"""Statistics across channels, held equal while a cut network is compared with the masked one.

A layer norm, or a user's own one made of `mean` and `rsqrt`, divides by the number of channels, so a cut
changes its statistics by design; fine-tuning repairs that. Everything else a cut must leave as it was. So
the masked network's statistics are written down and used again, one after another, in the cut one: what
is left to differ is an error. No norm has to be known by name for that.

A statistic that is put in another's place hides all that it was taken over. So it is, only where a dimension
that it reduces was cut, and only if the cut network's input there is the masked one's, place by place, at
some places of the dimensions that were cut. Which ones, the values say: no plan is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_accel.exact import widest

_REDUCTIONS = {"mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min"}
_NORMS = {"native_layer_norm", "native_group_norm", "_fused_rms_norm", "native_batch_norm"}
_NORMS |= {"_native_batch_norm_legit", "cudnn_batch_norm"}

_LOSSES = {"mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"}
"""Of which the mean is taken over everything."""

_Places = Mapping[int, Tensor]
"""By dimension that was cut, the place in the masked network of each one that is left."""


class Note(NamedTuple):
    """One statistic of the masked network: the operation, its input and its results."""

    name: str
    input: Tensor
    results: tuple[Tensor, ...]


class StatisticsRecorder:
    """Runs operations, and writes down every statistic."""

    def __init__(self) -> None:
        self.notes: list[Note] = []

    def __call__(self, func: Any, args: Any, kwargs: Any) -> Any:
        func, args, kwargs = _as_mean(func, args, kwargs)
        result = func(*args, **kwargs)
        name = _name(func)
        if _is_statistic(name, args):
            results = result if isinstance(result, tuple) else (result,)
            self.notes.append(Note(name, args[0].clone(), tuple(results)))
        return result


class StatisticsReplay(TorchDispatchMode):
    """Uses the statistics written down wherever a dimension that they reduce was cut.

    Args:
        notes: What `StatisticsRecorder` wrote down in the masked network.
        tolerance: How far two inputs that are the same may be apart, over their scale.
    """

    def __init__(self, notes: Sequence[Note], tolerance: float) -> None:
        super().__init__()
        self._notes = iter(notes)
        self._tolerance = tolerance

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        func, args, kwargs = _as_mean(func, args, kwargs or {})
        name = _name(func)
        note = next(self._notes, None) if _is_statistic(name, args) else None
        x = args[0].clone() if note is not None else None  # some write into what they read
        result = func(*args, **kwargs)
        if note is None or x is None or note.name != name or note.input.dim() != x.dim():
            return result
        given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
        own = result if isinstance(result, tuple) else (result,)
        if not _cut_where_reduced(name, note, x, given):
            return result
        places = same_places(note.input, x, self._tolerance)
        if places is None:
            return result
        if name in _NORMS:
            return _normalized(name, x, given, own, note, places)
        kept = _left_by(x.dim(), given)
        new = [_at(n, r, kept, places) for n, r in zip(note.results, own, strict=True)]
        return tuple(new) if isinstance(result, tuple) else new[0]


def same_places(old: Tensor, new: Tensor, tolerance: float) -> _Places | None:
    """Return at which places of the smaller dimensions `new` holds what `old` does; `None` if it does not.

    >>> x = torch.randn(2, 5, 3)
    >>> same_places(x, x[:, [4, 1]], 1e-6)
    {1: tensor([4, 1])}
    >>> same_places(x, x[:, [4, 1]] + 1, 1e-6) is None
    True
    """
    old, new = (torch.view_as_real(t) if t.is_complex() else t for t in (old, new))
    cut = [d for d in range(old.dim()) if old.shape[d] != new.shape[d]]
    if any(new.shape[d] > old.shape[d] for d in cut) or not new.numel():
        return None
    old, new = (t.nan_to_num().to(widest(t.device)) for t in (old, new))
    places = _guessed(old, new, cut)
    there = old
    for dim, positions in places.items():
        there = there.index_select(dim, positions)
    scale = old.abs().max().clamp_min(torch.finfo(old.dtype).tiny)
    return places if bool((there - new).abs().max() <= tolerance * scale) else None


def _guessed(old: Tensor, new: Tensor, cut: Sequence[int]) -> dict[int, Tensor]:
    """Guess where each place of `new` is in `old`: where the same random sum of all else is."""
    rest = [d for d in range(old.dim()) if d not in cut]
    have, want = (t.permute(*cut, *rest).unsqueeze(-1).flatten(len(cut)) for t in (old, new))
    along = _direction(have)
    have, want = have @ along, want @ along
    # Begin with the one pair of places that is the surest, and look along each dimension in turn; what is
    # found there helps in the next. Zeros say nothing of where they are.
    here = torch.unravel_index(want.abs().argmax(), want.shape)
    there = torch.unravel_index((have - want[here]).abs().argmin(), have.shape)
    mine, theirs = ([place.view(1) for place in pair] for pair in (here, there))
    places = {}
    for number in [*range(len(cut))] * min(2, len(cut)):
        wanted, known = _lines(want, mine, number), _lines(have, theirs, number)
        along = _direction(known)
        wanted, known = wanted @ along, known @ along
        found = _nearest(known, wanted)
        places[cut[number]] = found
        sure = wanted.nonzero()[:, 0]
        if len(sure):
            mine[number], theirs[number] = sure, found[sure]
    return places


def _direction(lines: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = lines.shape[-1]
    return torch.randn(size, generator=generator, dtype=torch.float64).to(lines)


def _lines(sums: Tensor, at: Sequence[Tensor], dim: int) -> Tensor:
    """Return one line per place of a dimension: all sums at the places given of the others."""
    for other, places in enumerate(at):
        if other != dim:
            sums = sums.index_select(other, places)
    return sums.movedim(dim, 0).reshape(sums.shape[dim], -1)


def _nearest(known: Tensor, wanted: Tensor) -> Tensor:
    ascending, order = known.sort()
    above = torch.searchsorted(ascending, wanted).clamp_max(len(known) - 1)
    below = (above - 1).clamp_min(0)
    nearer = (ascending[above] - wanted).abs() < (ascending[below] - wanted).abs()
    return order[torch.where(nearer, above, below)]


def _cut_where_reduced(name: str, note: Note, x: Tensor, given: Mapping[str, Any]) -> bool:
    """Whether a dimension over which the statistic runs has another size than in the masked network."""
    old, new = note.input.shape, x.shape
    if name == "native_group_norm":
        groups = note.results[1].shape[1]
        return old[1] // groups != new[1] // given["group"] or old[2:] != new[2:]
    if name in ("native_layer_norm", "_fused_rms_norm"):
        gone = set(range(x.dim() - len(given["normalized_shape"]), x.dim()))
    elif name in _NORMS:
        gone = set(range(x.dim())) - {1}
    else:
        gone = set(range(x.dim())) - set(_left_by(x.dim(), given, keeps=False))
    return any(old[d] != new[d] for d in gone)


def _left_by(dims: int, given: Mapping[str, Any], *, keeps: bool = True) -> list[int]:
    """Return which dimension of the input each one of a reduction's result is."""
    gone = given.get("dim")
    gone = [gone] if isinstance(gone, int) else gone or range(dims)
    if keeps and given.get("keepdim"):
        return list(range(dims))
    reduced = {d % max(dims, 1) for d in gone}
    return [d for d in range(dims) if d not in reduced]


def _at(noted: Tensor, own: Tensor, kept: Sequence[int], places: _Places) -> Tensor:
    """Return the noted statistic at the places that `own` still has; `own` where it counts places."""
    if noted.dim() != len(kept) or not (noted.is_floating_point() or noted.is_complex()):
        return own
    for dim, source in enumerate(kept):
        if noted.shape[dim] != own.shape[dim]:
            noted = noted.index_select(dim, places[source])
    return noted


def _normalized(
    name: str,
    x: Tensor,
    given: Mapping[str, Any],
    own: Sequence[Tensor],
    note: Note,
    places: _Places,
) -> tuple[Tensor, ...]:
    out, *old = own
    shape: Sequence[int] = (1, -1, *[1] * (x.dim() - 2))  # of one value per channel
    if name == "native_group_norm":
        new = _of_groups(note, x, given["group"], places)
        grouped = x.reshape(x.shape[0], given["group"], -1)
        y = ((grouped - new[0].unsqueeze(-1)) * new[1].unsqueeze(-1)).reshape(x.shape)
    elif "batch_norm" in name:
        new = [_at(n, r, [1], places) for n, r in zip(note.results[1:], old, strict=True)]
        y = (x - new[0].view(shape)) * new[1].view(shape)
    else:
        kept = range(x.dim())
        new = [_at(n, r, kept, places) for n, r in zip(note.results[1:], old, strict=True)]
        y = x * new[0] if name == "_fused_rms_norm" else (x - new[0]) * new[1]
        shape = given["normalized_shape"]
    if given.get("weight") is not None:
        y = y * given["weight"].view(shape)
    if given.get("bias") is not None:
        y = y + given["bias"].view(shape)
    # In the layout that the operation gives: noise that is made like it lies in memory as it does.
    return (out.copy_(y), *new)


def _of_groups(note: Note, x: Tensor, groups: int, places: _Places) -> list[Tensor]:
    """Return the noted statistics of the groups in which the channels left are."""
    dense = note.results[1].shape[1]
    channels = places.get(1, torch.arange(x.shape[1], device=x.device))
    firsts = channels.view(groups, -1)[:, 0] // (note.input.shape[1] // dense)
    return [result.index_select(1, firsts) for result in note.results[1:]]


def _as_mean(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """Take a loss that is a mean as the mean of what it is for each number."""
    if _name(func) not in _LOSSES:
        return func, args, kwargs
    given = {a.name: v for a, v in zip(func._schema.arguments, args, strict=False)} | kwargs
    if given.get("reduction", 1) != 1:
        return func, args, kwargs
    return torch.ops.aten.mean.default, (func(**{**given, "reduction": 0}),), {}


def _name(func: Any) -> str:
    return str(func._schema.name).removeprefix("aten::")


def _is_statistic(name: str, args: Any) -> bool:
    if name in _NORMS:
        return "batch_norm" not in name or any(a is True for a in args[3:6])
    return name in _REDUCTIONS and not (len(args) > 1 and isinstance(args[1], Tensor))
