"""The steps of a fit, to be tried on changed copies of its module.

A network is seen by what its example reaches. What a step does beside that (a head that only training has, a
probe of hidden states in validation) is known to nobody but the step.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer

from lightning_accel.bridge.data import validation_batches
from lightning_accel.bridge.example import AtHand, OfValidation, batches_or, run_step
from lightning_accel.bridge.inert import inert_copy
from lightning_accel.bridge.parts import possible, widened
from lightning_accel.errors import AccelError
from lightning_accel.surgery import Cut
from lightning_accel.surgery.bypass import parameters_under
from lightning_accel.surgery.dropped import entries_of, take_out
from lightning_accel.surgery.owners import kept_by
from lightning_accel.surgery.preserve import preserve_rng
from lightning_accel.surgery.shadows import Shadows


class StepOfFit(NamedTuple):
    """`training_step` or `validation_step`, with a batch of its fit; nothing is noticed outside of it."""

    trainer: Trainer
    batch: Any

    @property
    def trains(self) -> bool:
        return not isinstance(self.batch, OfValidation)

    @property
    def name(self) -> str:
        return "training_step" if self.trains else "validation_step"

    def __call__(self, model: LightningModule, cut: Cut) -> None:
        """Raise what the step raises on a copy of `model` after a cut, with all that the module holds beside."""
        with preserve_rng(), inert_copy(self.trainer, model) as copy:
            real = self.trainer.lightning_module
            _follow(copy, widened(cut, possible(self.trainer, cut)), _Beside(real, cut))
            run_step(self.trainer, copy, self.batch, 0)


class _Beside:
    """What a module holds beside its parameters, that a cut of it changes."""

    def __init__(self, module: LightningModule, cut: Cut) -> None:
        holders = {name: kept_by(m) for name, m in module.named_modules()}
        self.shadows = Shadows(module, holders)
        lost = parameters_under(module, cut.bypassed)
        names = set(lost.values())
        lost |= {id(shadow.tensor): shadow.name for shadow in self.shadows if shadow.name in names}
        self.entries = entries_of(holders, lost) if lost else []

    def tensors(self) -> set[int]:
        return {id(shadow.tensor) for shadow in self.shadows}

    def containers(self) -> set[int]:
        return {id(entry.container) for entry in self.entries}


def _follow(copy: LightningModule, cut: Cut, real: _Beside) -> None:
    """Cut a copy, and what it holds beside its parameters, but for what its functions hold of the real one."""
    own = _Beside(copy, cut)
    theirs, held = real.tensors(), real.containers()
    cut.apply(copy)
    own.shadows.follow(cut.kept, but=theirs)
    take_out([entry for entry in own.entries if id(entry.container) not in held])


def steps_of(trainer: Trainer, at_hand: AtHand | None = None) -> list[StepOfFit]:
    """Return a step of training, and one of validation for each loader that can be read beforehand.

    Args:
        trainer: A Trainer within a fit.
        at_hand: A batch of this fit, for data that can be read only once.
    """
    found: list[Any] = []
    with suppress(AccelError):
        found += batches_or(trainer, 1, at_hand)
    with suppress(AccelError):
        found += [OfValidation(*given) for given in validation_batches(trainer, 1)]
    return [StepOfFit(trainer, batch) for batch in found]
