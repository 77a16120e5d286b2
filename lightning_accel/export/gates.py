"""What a candidate has to show before its file is kept: the model's own answers, and no marks on what it was given.

Each gate is a function of a back end, called with tensors. Answers are compared with those of the model without a graph
in float32: the ratio of signal to noise has to reach 60 dB, and no element may be off by more than 5e-4 of its own size
and the typical size of the answer together, which a wrong weight among thousands shows where the ratio does not. Faults
looked for besides, each of which a compiler had: an input that is overwritten, a second call that answers differently,
an answer that a later call overwrites. At edges, such as numbers a thousand times too large, the model's own rounding
may be worse than that: a candidate may then lie up to 10 dB below the ratio that the model itself has against float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_accel.errors import explain
from lightning_accel.export.samples import Sample
from lightning_accel.export.schema import Runner

FLOOR_DB = 60.0
"""Signal to noise that formats in floating point have to reach."""
AGREEMENT = 0.99
"""Share of whole numbers that have to be equal."""
_ELEMENT = 5e-4
_TINY = 1e-6
"""Of the typical size of an answer: where both are so small there is no signal to compare."""
_ALLOWED_DB = 10.0
_ALONE_DB = 15.0


class Case(NamedTuple):
    """An input with the model's answer, and with the signal to noise that the model itself has there."""

    sample: Sample
    wanted: tuple[Tensor, ...]
    own_db: float = math.inf


class Verdict(NamedTuple):
    """What the gates found.

    Attributes:
        reason: Why the candidate is refused, or nothing.
        num_inputs: On how many inputs it was tried.
        sqnr_db: The smallest signal to noise on inputs like the example; infinite for equal answers.
        max_abs_error: The largest difference on them.
        agreement: The share of whole numbers that are equal, or `None` where the model gives none.
    """

    reason: str = ""
    num_inputs: int = 0
    sqnr_db: float = math.inf
    max_abs_error: float = 0.0
    agreement: float | None = None


def proved(runner: Runner, cases: Sequence[Case], floor_db: float = FLOOR_DB) -> Verdict:
    """Try a back end on all cases.

    Below the floor of floating point, which is for integers, single elements may be off by a step, and one input alone by
    more than all together.

    >>> x = torch.ones(2, 3)
    >>> case = Case(Sample("ones", [x]), (2 * x,))
    >>> proved(lambda tensors: (tensors[0] + tensors[0],), [case]).reason
    ''
    >>> proved(lambda tensors: (2.02 * tensors[0],), [case]).reason[:30]
    'another answer than the model:'
    """
    scale = typical(case.wanted for case in cases if case.sample.usual)
    lowest, largest, equal, whole = math.inf, 0.0, 0, 0
    usual: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for case in cases:
        found, reason = answered(runner, case.sample.tensors)
        reason = reason or same_kind(case.wanted, found)
        reason = reason or same_numbers(case, found, scale, floor_db)
        if reason:
            return Verdict(f"{reason} ({case.sample.kind})", len(cases), lowest, largest)
        for index, (wanted, answer) in enumerate(zip(case.wanted, found, strict=True)):
            if is_real(wanted):
                if case.sample.usual:
                    usual.setdefault(index, []).append((wanted, answer))
                    ratio = sqnr_db(wanted, answer)
                    lowest = min(lowest, ratio) if ratio > -math.inf else lowest
                    largest = max(largest, _largest_error(wanted, answer))
            elif case.sample.usual:
                # At the edges many numbers tie, and an index may be that of another.
                equal, whole = equal + int((wanted == answer).sum()), whole + wanted.numel()
    agreement = equal / whole if whole else None
    together = min(map(_together_db, usual.values()), default=math.inf)
    if together < floor_db:
        reason = f"another answer than the model: {together:.1f} dB on all usual inputs"
        return Verdict(reason, len(cases), lowest, largest, agreement)
    reason = (
        ""
        if agreement is None or agreement >= AGREEMENT
        else f"another answer than the model: {agreement:.2%} of whole numbers are equal"
    )
    return Verdict(reason, len(cases), lowest, largest, agreement)


def answered(runner: Runner, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], str]:
    """Call a back end twice, and return the first answer with what is wrong about the calls."""
    before = [t.clone() for t in tensors]
    try:
        first = runner(tensors)
        kept = tuple(t.clone() for t in first)
        second = runner(tensors)
    except Exception as error:  # whatever a compiled graph may raise
        return (), f"it fails: {_line(error)}"
    if not same_bits(before, tensors):
        return kept, "it writes into its input"
    if not same_bits(kept, second):
        return kept, "the second call answers differently"
    if not same_bits(kept, first):
        return kept, "a later call changes an earlier answer"
    return kept, ""


def same_kind(wanted: Sequence[Tensor], found: Sequence[Tensor]) -> str:
    """Return what differs in number, type or size, or nothing."""
    if len(wanted) != len(found):
        return f"{len(found)} tensors in the answer instead of {len(wanted)}"
    for one, other in zip(wanted, found, strict=True):
        if one.dtype != other.dtype or one.shape != other.shape:
            return f"the answer is {_kind(other)} instead of {_kind(one)}"
    return ""


def same_numbers(
    case: Case, found: Sequence[Tensor], scale: Sequence[float], floor_db: float = FLOOR_DB
) -> str:
    """Return how an answer differs from the model's more than it may, or nothing; whole numbers are left out."""
    one_db = floor_db if floor_db == FLOOR_DB else floor_db - _ALONE_DB
    floor = one_db if case.sample.usual else min(one_db, case.own_db - _ALLOWED_DB)
    for wanted, answer, typical_size in zip(case.wanted, found, scale, strict=True):
        if not is_real(wanted):
            continue
        wanted, answer = _parts(wanted), _parts(answer)
        finite = wanted.isfinite()
        if not torch.equal(finite, answer.isfinite()) or not torch.equal(
            wanted[~finite].nan_to_num(nan=0.5), answer[~finite].nan_to_num(nan=0.5)
        ):
            return "it is not finite where the model is, or the other way round"
        error = (answer - wanted)[finite].double().abs()
        if not error.numel() or float(error.max()) <= _TINY * typical_size:
            continue
        ratio = sqnr_db(wanted, answer)
        size = wanted[finite].double().abs()
        off = error > _ELEMENT * (size + size.square().mean().sqrt())
        if ratio < floor or (floor == FLOOR_DB and bool(off.any())):
            return f"another answer than the model: {ratio:.1f} dB, off by {float(error.max()):.2g} at most"
    return ""


def kept_metric(
    metric: Callable[[Any], float], eager: float, predict: Any, max_drop: float
) -> tuple[float, str]:
    """Return the metric of a candidate, and why it is not enough.

    >>> kept_metric(lambda predict: predict(1), 0.9, lambda x: 0.85, 0.01)[1]
    'the metric falls from 0.9 to 0.85, by more than 0.01'
    """
    try:
        found = float(metric(predict))
    except Exception as error:  # of the user's function
        return math.nan, f"the metric fails: {_line(error)}"
    if not eager - found <= max_drop:  # also for NaN
        return found, f"the metric falls from {eager:.4g} to {found:.4g}, by more than {max_drop:g}"
    return found, ""


def eager_metric(metric: Callable[[Any], float], predict: Any) -> float:
    """Return the metric of the model itself.

    Raises:
        ValueError: It is no number to compare with.
    """
    found: Any = metric(predict)
    if isinstance(found, Tensor) and found.numel() == 1:
        found = float(found)
    if isinstance(found, bool) or not isinstance(found, (int, float)) or not math.isfinite(found):
        raise ValueError(
            explain(
                "`metric` returns a finite number, and a higher one is better",
                repr(found)[:80],
                "return accuracy, say",
            )
        )
    return float(found)


def sqnr_db(wanted: Tensor, found: Tensor) -> float:
    """Return the power of an answer by that of its error, in dB, over what is finite.

    >>> round(sqnr_db(torch.ones(4), torch.full((4,), 1.01)))
    40
    """
    wanted, found = _parts(wanted).double(), _parts(found).double()
    finite = wanted.isfinite() & found.isfinite()
    signal = float(wanted[finite].square().sum())
    noise = float((found - wanted)[finite].square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def _together_db(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the power of all answers by that of all errors, in dB."""
    wanted, found = (
        torch.cat([_parts(side).double().flatten() for side in sides])
        for sides in zip(*pairs, strict=True)
    )
    ratio = sqnr_db(wanted, found)
    return math.inf if ratio == -math.inf else ratio


def typical(answers: Iterable[Sequence[Tensor]]) -> list[float]:
    """Return for each tensor of the answers the root of its mean square, where it is finite."""
    powers: list[list[float]] = []
    for answer in answers:
        for index, tensor in enumerate(answer):
            if len(powers) <= index:
                powers.append([])
            if is_real(tensor):
                values = _parts(tensor).double()
                values = values[values.isfinite()]
                powers[index].append(float(values.square().mean()) if values.numel() else 0.0)
    return [math.sqrt(sum(p) / len(p)) if p else 0.0 for p in powers]


def same_bits(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Tell whether tensors are the same bit for bit, NaN included.

    >>> same_bits([torch.tensor([float("nan")])], [torch.tensor([float("nan")])])
    True
    """
    return len(first) == len(second) and all(
        one.dtype == other.dtype
        and one.shape == other.shape
        and torch.equal(_bytes(one), _bytes(other))
        for one, other in zip(first, second, strict=True)
    )


def is_real(tensor: Tensor) -> bool:
    """Tell whether a tensor is compared by its error, and not by the share that is equal."""
    return tensor.is_floating_point() or tensor.is_complex()


def _parts(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _bytes(tensor: Tensor) -> Tensor:
    # A tensor of one number counts as contiguous whatever its stride, and then has no bytes to view.
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
    return flat.copy_(tensor.detach().reshape(-1)).view(torch.uint8)


def _largest_error(wanted: Tensor, found: Tensor) -> float:
    error = (_parts(found) - _parts(wanted)).double().abs()
    error = error[error.isfinite()]
    return float(error.max()) if error.numel() else 0.0


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:160]}"
