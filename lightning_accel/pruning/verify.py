"""A cut is right when the smaller network computes what the masked dense one computes.

Setting the removed elements to zero and leaving them in place must give the same outputs, in float64
to about 1e-12, once statistics over the cut dimension are the same on both sides (they change by design,
which fine-tuning repairs; see `statistics`). This catches what merely running cannot: heads or channels
wired to the wrong consumer without any error.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_accel.errors import AccelError, BrokenModel
from lightning_accel.exact import widest
from lightning_accel.measure.flops import unfused
from lightning_accel.pruning.blank import Blank, Masks, masks
from lightning_accel.pruning.precise import Precise
from lightning_accel.pruning.silence import silence
from lightning_accel.pruning.statistics import Note, StatisticsRecorder, StatisticsReplay
from lightning_accel.pruning.trains import REMEDY, Training, located
from lightning_accel.pruning.variants import lively, opposite, resized, shaken, varied_calls, vary
from lightning_accel.surgery import Cut, Structure, twin
from lightning_accel.surgery.bypass import bypass
from lightning_accel.surgery.call import (
    Call,
    as_call,
    cast,
    converted,
    numbers,
    run,
    same_random_state,
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


class _Setting(NamedTuple):
    """A network, and the calls on which the masked one and the cut one are compared."""

    network: nn.Module
    calls: Sequence[Call]


class Verifier:
    """Proves cuts of one network on small example calls.

    Args:
        model: The network; only copies of it are run.
        calls: Example calls, small ones.

    Attributes:
        fell_back: Whether there is no proof in float64.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self.model = model
        self.calls = calls
        self._finite = runs(
            model, calls, finite=True
        )  # of masked scores some are infinite, by design
        self.fell_back = self._falls_back()
        # What is dead on these calls lives where all signs are turned.
        self._settings = [self._first, _Setting(opposite(self._first.network), self._first.calls)]
        self._sizes = 1
        self._require_response()
        self._of: tuple[Cut, Masks] | None = None

    def _falls_back(self) -> bool:
        if widest(next(self.model.parameters()).device) == torch.float32:
            self._take(torch.float32)
            return False
        if self._take(torch.float64):
            return False
        # Some kernels, such as those of grouped experts, know no float64; and a mask of the least
        # number of float64 becomes minus infinity where a forward goes on in float32.
        able = runs(*self._first)
        if self._take(torch.float32) or not able:
            return True
        self._take(torch.float64)
        return False

    def _take(self, dtype: torch.dtype) -> bool:
        """Take copies of network and calls in this dtype; whether they give numbers.

        They have no constants for errors to hide behind, unless it fails so.
        """
        self.dtype = dtype
        for varies in (True, False):
            network, calls = converted(twin(self.model), dtype).eval(), cast(self.calls, dtype)
            if varies:
                vary(network)
                calls = varied_calls(calls)
            self._first = _Setting(network, calls)
            precise = Precise()
            if dtype == torch.float64 and runs(*self._first, finite=self._finite, within=precise):
                self._whole = precise.kept > 0
                return True
            self._whole = False
            if runs(*self._first, finite=self._finite):
                return True
        return False

    def _require_response(self) -> None:
        """Raise where any cut would be right: at outputs that hang on no weight, at least not on these calls."""
        if any(self._responds(setting) for setting in self._settings):
            return
        for network in lively(self._first.network):
            setting = _Setting(network, self._first.calls)
            if runs(*setting, finite=self._finite) and self._responds(setting):
                self._settings.append(setting)
                return
        raise AccelError(
            "nothing can be proved on this example: the network gives out the same whatever its weights are",
            "outputs stuck at a bound, or none that hangs on a weight",
            "pass an `example` on which its outputs vary",
        )

    def _responds(self, setting: _Setting) -> bool:
        """Whether what comes out changes when all weights do, a little; where that is whole numbers, much."""
        try:
            before = self._outputs(setting.network, setting.calls)
            amount = 0.1 if any(t.is_floating_point() or t.is_complex() for t in before) else 1.0
            after = self._outputs(shaken(setting.network, amount), setting.calls)
        except Exception:  # whatever a forward may raise; the proof says so
            return True
        pairs = zip(before, after, strict=False)
        return any(a.shape != b.shape or not a.equal(b) for a, b in pairs)

    @property
    def tolerance(self) -> float:
        return TOLERANCE if self.dtype == torch.float64 else 1e-3

    def equivalence(self, cut: Cut) -> None:
        """Raise `BrokenModel` unless the cut network equals the masked one."""
        error = self.difference(cut)
        if not error <= self.tolerance:
            where = " at another size of its input" if self._sizes > 1 else ""
            found = f"a relative difference of {error:.1e}"
            if self._is_random():
                found += ", where what comes out is random in evaluation mode as well"
            raise BrokenModel(
                f"the cut network does not compute what the masked one computes{where}",
                found,
                REMEDY,
            )

    def _is_random(self) -> bool:
        """Whether two forwards in evaluation mode differ, with other seeds and whatever else is drawn from."""
        try:
            some, others = (self._outputs(*self._first, seed=seed) for seed in (0, 1))
        except Exception:  # whatever a forward may raise
            return False
        return any(not a.equal(b) for a, b in zip(some, others, strict=False))

    def _outputs(self, model: nn.Module, calls: Sequence[Call], seed: int = 0) -> list[Tensor]:
        """Return what a copy of the model gives out in eval mode."""
        copy = twin(model).eval()
        with torch.no_grad(), same_random_state(copy, seed=seed), unfused(copy), self._precise():
            return numbers(run(copy, calls))

    def difference(self, cut: Cut) -> float:
        """Return the largest difference between the cut and the masked network, over the output's scale.

        Raises:
            BrokenModel: The cut network fails, or its outputs have another shape.
        """
        worst = 0.0
        for setting in list(self._settings):
            error = self._difference(setting, cut)
            if error is None:
                self._settings = [s for s in self._settings if s is not setting]
                continue
            if not error <= self.tolerance:
                return error
            worst = max(worst, error)
        return worst

    def holds_elsewhere(self, cut: Cut) -> bool:
        """Whether the cut is right at another size of the input as well; if not, that one counts from now on.

        What is reshaped by sizes that are equal in the example only may be right there and nowhere else.
        """
        if self._sizes > 1:
            return True
        for calls in resized(self._first.calls):
            others = [_Setting(setting.network, calls) for setting in self._settings]
            if not runs(*others[0], finite=self._finite, within=self._precise()):
                continue
            try:
                errors = (self._difference(setting, cut) for setting in others)
                if all(error is None or error <= self.tolerance for error in errors):
                    return True
            except BrokenModel:
                pass
            self._settings += others
            self._sizes += 1
            return False
        return True

    @property
    def settings(self) -> list[tuple[nn.Module, Sequence[Call]]]:
        """Networks in evaluation and what each is run on."""
        return [(setting.network, setting.calls) for setting in self._settings]

    def _difference(self, setting: _Setting, cut: Cut) -> float | None:
        """Return the difference of a setting, or `None` if its network gives no numbers even uncut."""
        if cut.bypassed:
            return self._without_blocks(setting, cut)
        try:
            expected, notes = self._masked(setting, cut)
        except Exception:  # whatever a forward may raise
            if self._stands(setting):
                raise
            return None
        if self._finite and not _is_finite(expected) and not self._stands(setting):
            return None
        small, replay = twin(setting.network), StatisticsReplay(notes, self.tolerance)
        cut.apply(small, raw=True)
        with (
            torch.no_grad(),
            same_random_state(small, seed=0),
            unfused(small),
            located(small),
            replay,
            self._precise(),
        ):
            found = self._numbers(run(small, setting.calls))
        return _error(expected, found)

    def _without_blocks(self, setting: _Setting, cut: Cut) -> float | None:
        """Return the difference that whole blocks make: where their branches say nothing they are not missed.

        The rest of the cut is compared in the network without them.
        """
        silent, less = twin(setting.network), twin(setting.network)
        nothing: Any = silence(silent, cut.bypassed)
        bypass(less, cut.bypassed)
        outputs = []
        for network in (silent, less):
            random = same_random_state(network, seed=0)
            quiet = nothing if network is silent else nullcontext()
            with torch.no_grad(), random, unfused(network), located(network), quiet:
                outputs.append(self._numbers(run(network, setting.calls)))
        if self._finite and not _is_finite(outputs[0]) and not self._stands(setting):
            return None
        error = _error(*outputs)
        if not cut.kept or not error <= self.tolerance:
            return error
        tensors = {name: cut.before.tensors[name] for name in cut.kept}
        attributes = {name: cut.before.attributes[name] for name in cut.attributes}
        rest = dataclasses.replace(cut, bypassed={}, before=Structure(tensors, attributes))
        return self._difference(_Setting(less, setting.calls), rest)

    def _stands(self, setting: _Setting) -> bool:
        """Whether a setting proves anything: the example itself does, others where the network runs."""
        return setting is self._first or runs(*setting, finite=self._finite, within=self._precise())

    def _masked(self, setting: _Setting, cut: Cut) -> tuple[list[Tensor], Sequence[Note]]:
        """Return what the network computes with all that a cut removes as nothing, and its statistics."""
        dense, record = twin(setting.network), StatisticsRecorder()
        if self._of is None or self._of[0] is not cut:
            nothing = _NOTHING if self.dtype == torch.float64 else 0.0
            self._of = cut, masks(dense, cut, nothing)
        blank = Blank(dense, self._of[1], record)
        with (
            torch.no_grad(),
            same_random_state(dense, seed=0),
            unfused(dense),
            blank,
            self._precise(),
        ):
            expected = run(dense, setting.calls)
        return self._numbers(expected), record.notes

    def _precise(self) -> AbstractContextManager[Any]:
        return Precise() if self._whole else nullcontext()

    def _numbers(self, outputs: Any) -> list[Tensor]:
        found = (t.resolve_conj() for t in numbers(outputs))
        return [(torch.view_as_real(t) if t.is_complex() else t).to(self.dtype) for t in found]


def _error(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Return the largest difference of two outputs, over the scale of the first; infinities stay where they are."""
    if [t.shape for t in expected] != [t.shape for t in found]:
        raise BrokenModel("the cut changes the shape of the network's output", "", REMEDY)
    if not any(bool(t.isfinite().any()) for t in expected):
        raise BrokenModel("nothing can be proved: the network's outputs hold no number", "", REMEDY)
    worst = 0.0
    for want, have in zip(expected, found, strict=True):
        finite = want.isfinite()
        if not torch.equal(want[~finite].nan_to_num(), have[~finite].nan_to_num()):
            return math.inf
        want, have = want[finite], have[finite]
        if want.numel():
            scale = want.abs().max().clamp_min(1e-12)
            error = float((want - have).abs().max() / scale)
            worst = error if not error <= worst else worst
    return worst


def why_broken(verifier: Verifier, training: Training, cut: Callable[[], Cut]) -> str:
    """Return why a cut cannot be made, or does not pass the proof; empty if it does."""
    try:
        made = cut()
        verifier.equivalence(made)
        training.check(made)
    except (BrokenModel, ValueError, IndexError, AssertionError, RuntimeError) as error:
        return str(error).rpartition(" Do: ")[0] or str(error)
    return ""


_NOTHING = 1e-30  # for weights that are divided by their own norm


def runs(
    model: nn.Module,
    calls: Sequence[Call],
    *,
    finite: bool = False,
    within: AbstractContextManager[Any] | None = None,
) -> bool:
    """Whether a copy of the model runs on these calls in eval mode, and gives numbers if it has to."""
    copy = twin(model).eval()
    try:
        with torch.no_grad(), same_random_state(copy), unfused(copy), within or nullcontext():
            outputs = run(copy, calls)
    except Exception:  # whatever a forward may raise
        return False
    return not finite or _is_finite(numbers(outputs))


def _is_finite(outputs: Sequence[Tensor]) -> bool:
    return all(bool(t.isfinite().all()) for t in outputs)
