"""The base of our callbacks: an effect that is there while a Trainer runs, and is taken back whatever ends the run.

A technique says *what* it changes, as a context manager: `effect`. This class knows *when*: at setup, or as soon as
weights or optimizers are there; left and entered again around edits of the model and after a checkpoint restored other
shapes; closed at the end and on exceptions; in fit, validate, test and predict alike. A tuner enters the same effect
on a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import Any, ClassVar, Literal, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import device as Device
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.arguments import one_of
from lightning_accel.bridge import beside
from lightning_accel.bridge.checks import is_built, refuse_compiled, refuse_lazy, refuse_mirror
from lightning_accel.bridge.optimizers import optimizers_of
from lightning_accel.bridge.restore import register
from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.surgery import Receipt, Stage

EVERYWHERE = ("fit", "validate", "test", "predict")


class Skipped(NamedTuple):
    """A value that a tuner does not try, and why."""

    value: str
    reason: str


class Situation(NamedTuple):
    """What a tuner knows when it asks a technique what is worth trying.

    Attributes:
        trainer: Within a fit.
        module: The user's.
        numerics: The tier that the user allows: "exact", "amp" or "low".
        attends: Whether a step calls `scaled_dot_product_attention`.
    """

    trainer: Trainer
    module: LightningModule
    numerics: str
    attends: bool = False

    @property
    def device(self) -> Device:
        """Where the module computes."""
        return self.trainer.strategy.root_device


class Context(NamedTuple):
    """Where an effect acts.

    Attributes:
        trainer: The Trainer, which a copy must leave alone.
        module: What is to be changed.
        optimizers: Of the module; empty before there are any.
        stage: "fit", "validate", "test" or "predict".
        is_copy: Whether the module is a copy, on which nothing is said, and no other process is asked.
    """

    trainer: Trainer
    module: LightningModule
    optimizers: Sequence[Optimizer] = ()
    stage: str = "fit"
    is_copy: bool = False

    @property
    def device(self) -> Device:
        """Where the module computes."""
        return self.trainer.strategy.root_device


class Technique(Callback):
    """A callback whose effect can be taken back.

    Attributes:
        needs: What must be there before the effect is entered: "process" is always there, "weights" are at setup
            unless `configure_model` or a first forward makes them, "optimizers" when a fit starts. "itself" is for
            a technique that calls `enter` at a time of its own.
        stage: What kind of edit it is where it changes the module, and so its place in the order: callbacks that
            were passed in another order change places before the first is set up.
        acts_in: The stages of a Trainer in which there is an effect.
        is_global: Whether the effect changes the process, not the module or its optimizers.
        name: The key in `callbacks` of a configuration, and a tuner's word.
        of_a_fit: Attributes that copies do not take along, and what these have instead.
        tunable: Arguments by the name of a value, for what a tuner may choose.
        receipt: What the effect changed when it was entered last.
    """

    needs: ClassVar[Literal["process", "weights", "optimizers", "itself"]] = "itself"
    stage: ClassVar[Stage | None] = None
    acts_in: ClassVar[Sequence[str]] = EVERYWHERE
    is_global: ClassVar[bool] = False
    name: ClassVar[str] = ""
    tunable: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    of_a_fit: ClassVar[Mapping[str, Callable[[], Any]]] = {}

    receipt: Receipt = Receipt()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "setup" in vars(cls):
            cls.setup = _after_sorting(cls.setup)  # type: ignore[method-assign]

    def effect(self, context: Context) -> AbstractContextManager[Receipt | None]:
        """Return what makes the change, gives a receipt, and takes it back at its end.

        Raises:
            NoEffect: There is nothing to change.
        """
        return nullcontext()

    @classmethod
    def candidates(cls, situation: Situation) -> Iterable[str | Skipped]:
        """Return the values that are worth trying, and those that are not."""
        return tuple(cls.tunable)

    @classmethod
    def arguments(cls, value: str) -> dict[str, Any]:
        """Return the arguments that a value stands for.

        Raises:
            ValueError: There is no such value.
        """
        return dict(cls.tunable[one_of(cls.name, value, cls.tunable)])

    @classmethod
    def describe(cls, value: str) -> str:
        """Say a value so that it can stand alone."""
        return f"{cls.name} {value}".replace("_", " ")

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        refuse_mirror(trainer)
        if self.stage is not None:
            refuse_compiled(pl_module)
            register(pl_module, (beside.saved, beside.collected))  # a pruned checkpoint loads here
        self.leave(trainer)
        if stage not in self.acts_in:
            return
        self.receipt = Receipt()
        if self.needs == "process":
            self.enter(trainer, pl_module)
        elif self.needs == "weights" and is_built(pl_module):
            try:
                self.enter(trainer, pl_module)
            except (
                NoEffect
            ):  # the module's own hooks, which come later, may make what there is to change
                if not any(is_overridden(hook, pl_module) for hook in ("setup", "configure_model")):
                    raise

    @override
    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.needs == "weights" and self._has_entered(trainer):
            self._enter_anew(trainer, pl_module)  # restored shapes come with storage of their own

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.needs == "optimizers":
            self._enter_anew(trainer, pl_module)
        self._enter_late(trainer, pl_module)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._enter_late(trainer, pl_module)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter_late(trainer, pl_module)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._enter_late(trainer, pl_module)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.leave(trainer)

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self.leave(trainer)

    def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give another edit, such as a prune, the plain module to work on."""
        if self.needs == "weights" and self._has_entered(trainer):
            self.leave(trainer)
            self._left_for_edit = True

    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        """Change anew what another edit left."""
        if not self._left_for_edit:
            return
        self._left_for_edit = False
        try:
            self.enter(trainer, pl_module)
        except NoEffect as error:  # no reason to end a training that has come this far
            rank_zero_warn(f"{type(self).__name__} ends here: {error}")

    def enter(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the change, until `leave`."""
        context = Context(
            trainer,
            pl_module,
            optimizers_of(trainer, pl_module) if self.needs == "optimizers" else (),
            trainer.state.fn.value if trainer.state.fn is not None else "fit",
        )
        receipt = self.held(trainer).enter_context(self.effect(context))
        self._entered_with = _parts(pl_module)
        self.receipt = receipt or Receipt()

    def leave(self, trainer: Trainer) -> None:
        """Take back all that was done in this Trainer."""
        self._left_for_edit = False
        stack = self._stacks.pop(id(trainer), None)
        if stack is not None:
            stack.close()

    def held(self, trainer: Trainer) -> ExitStack:
        """Return the stack that `leave` closes, to put on it what is to be taken back."""
        return self._stacks.setdefault(id(trainer), ExitStack())

    def join(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Come into a fit that is about to take its first step."""
        self.setup(trainer, pl_module, "fit")
        self.on_fit_start(trainer, pl_module)
        self.on_train_start(trainer, pl_module)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have entered nothing, and hold nothing of a fit."""
        left = (
            "_entered",
            "log",
            "log_dict",
        )  # the last two are methods of a module, from the Trainer
        state = {name: value for name, value in vars(self).items() if name not in left}
        for kind in reversed(type(self).__mro__):
            state |= {name: make() for name, make in vars(kind).get("of_a_fit", {}).items()}
        return state

    @property
    def _stacks(self) -> dict[int, ExitStack]:
        """By Trainer: one may run within another."""
        return vars(self).setdefault("_entered", {})

    _entered_with: tuple[int, ...] = ()
    _left_for_edit: bool = False

    def _has_entered(self, trainer: Trainer) -> bool:
        return id(trainer) in self._stacks

    def _enter_anew(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.leave(trainer)
        self.enter(trainer, pl_module)

    def _enter_late(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Enter where that could not be done before, or where parts of the module are new."""
        if self.needs != "weights" or trainer.state.fn not in self.acts_in:
            return
        refuse_lazy(pl_module, type(self).__name__)
        if not self._has_entered(trainer) or self._entered_with != _parts(pl_module):
            self._enter_anew(trainer, pl_module)


def _parts(pl_module: LightningModule) -> tuple[int, ...]:
    return tuple(id(module) for module in pl_module.modules())


def _after_sorting(setup: Callable[..., None]) -> Callable[..., None]:
    """Sort the Trainer's edits when the first of them is set up.

    Lightning walks along the very list by index, so the edit that comes to stand in the place of the
    caller is set up instead of it, and Lightning comes to the caller later.
    """

    @wraps(setup)
    def sorted_first(
        self: Technique, trainer: Trainer, pl_module: LightningModule, stage: str
    ) -> None:
        refuse_mirror(trainer)
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        places = [i for i, c in enumerate(callbacks) if place_of(c) is not None]
        given = [callbacks[i] for i in places]
        right = sorted(given, key=lambda edit: place_of(edit) or 0)
        if self.stage is None or [id(edit) for edit in given] == [id(edit) for edit in right]:
            setup(self, trainer, pl_module, stage)
            return
        if self is not given[0]:
            raise _late(given, right)
        for place, edit in zip(places, right, strict=True):
            callbacks[place] = edit
        if right[0] is self:
            setup(self, trainer, pl_module, stage)
        else:
            right[0].setup(trainer, pl_module, stage)

    return sorted_first


Technique.setup = _after_sorting(Technique.setup)  # type: ignore[method-assign]


def place_of(callback: Callback) -> Stage | None:
    """Return what kind of edit of the module a callback is, `None` for all others."""
    return callback.stage if isinstance(callback, Technique) else None


def _late(given: list[Any], right: list[Any]) -> AccelError:
    return AccelError(
        "callbacks that edit the model were put into another order while they were set up",
        ", ".join(f"{type(edit).__name__} ({edit.stage.name})" for edit in given),
        "order them as " + ", ".join(type(edit).__name__ for edit in right),
    )
