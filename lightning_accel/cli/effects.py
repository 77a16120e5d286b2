"""What each technique would do to a model: a fit of a copy with them is begun, asked, and ended before its first batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_accel.bridge.technique import Technique
from lightning_accel.cli.adds import class_of, moment_of
from lightning_accel.cli.in_fit import in_fit, quietly, training_of
from lightning_accel.cli.subject import NamedModel
from lightning_accel.errors import AccelError
from lightning_accel.pruning.callbacks.structured_pruning import StructuredPruning
from lightning_accel.quantization.choose import why_not
from lightning_accel.recipe import build_callbacks
from lightning_accel.surgery import Receipt, twin

_SHOWN = 6
_LATER = {
    "AutoTune": "measures at the start of the fit what is faster, and takes that; `lightning-accel tune` tells it now",
    "FastLoading": "measures at the start of the fit how to load the data; `lightning-accel doctor` tells what loading costs",
    "WarmStart": "compiles in the background when the fit begins",
    "Distillation": "needs the teacher; what the losses are worth is known in the fit",
    "Deploy": "writes and proves files when the fit is over; `lightning-accel export` does it now",
    "AccelReport": "measures before the fit and after it",
    "StepMeter": "measures during the fit",
    "Objective": "returns a metric when the fit is over",
    "ActivationBudget": "measures on copies at the start of the fit what fits",
}
"""What cannot be known before a fit, by class."""


class Effect(NamedTuple):
    """What a technique would do: `acts` is false where it would refuse or find nothing to do."""

    technique: str
    acts: bool
    said: str
    details: tuple[str, ...] = ()


def effects_on(
    build: Callable[[], NamedModel], nodes: Mapping[str, dict[str, Any]], name: str
) -> list[Effect]:
    """Return what callbacks would do to a model.

    Args:
        build: Makes a fresh model with its data.
        nodes: Of the callbacks, by name.
        name: How the user named the model.

    Raises:
        ValueError: The training itself fails.
        TypeError: It is a network without an example.
    """
    later = {n: _LATER[c] for n, node in nodes.items() if (c := class_of(node).__name__) in _LATER}
    now = {n: node for n, node in nodes.items() if n not in later}
    found: dict[str, Effect] = {
        n: Effect(n, True, f"not known before a fit: it {said}") for n, said in later.items()
    }
    try:
        found |= _together(build, now, name)
    except AccelError as error:
        for one, node in now.items():
            found |= _alone(build, {one: node}, name)
        if all(effect.acts for effect in found.values()):
            found["all together"] = Effect("all together", False, f"would be refused: {error}")
    return [found[n] for n in [*nodes, "all together"] if n in found]


def strategy_effect(strategy: Any) -> Effect:
    """Return what is to be said of a strategy, of which one process sees nothing."""
    said = f"{strategy}: not known from one process; `lightning-accel plan --devices N` tells what each would hold"
    return Effect("trainer.strategy", True, said)


def _alone(
    build: Callable[[], NamedModel], nodes: Mapping[str, dict[str, Any]], name: str
) -> dict[str, Effect]:
    (one,) = nodes
    try:
        return _together(build, nodes, name)
    except AccelError as error:
        return {one: Effect(one, False, f"would be refused: {error}")}


def _together(
    build: Callable[[], NamedModel], nodes: Mapping[str, dict[str, Any]], name: str
) -> dict[str, Effect]:
    """Begin a fit with some callbacks, and ask each."""
    with quietly():
        subject = training_of(build(), name)
        made = {one: build_callbacks({one: node})[0] for one, node in nodes.items()}
    found: dict[str, Effect] = {}

    def look(trainer: Trainer, pl_module: LightningModule) -> None:
        for one, callback in made.items():
            found[one] = _asked(one, callback, trainer, pl_module)

    in_fit(subject, look, callbacks=list(made.values()))
    return found


def _asked(name: str, callback: Callback, trainer: Trainer, pl_module: LightningModule) -> Effect:
    kind = type(callback).__name__
    if isinstance(callback, StructuredPruning):
        return _pruned(name, callback, trainer, pl_module)
    if kind == "UsePrecision":
        plugin = trainer.precision_plugin
        return Effect(name, True, f"trains in {plugin.precision}, by {plugin!r}")
    if kind == "QuantizationAwareTraining":
        return _quantized(name, callback, pl_module)
    if not isinstance(callback, Technique):
        return Effect(name, True, "not known before a fit")
    receipt = callback.receipt
    if not receipt:
        said = "nothing of the model is changed before the fit" if callback.needs in ("itself", "process") else "changes nothing here"  # fmt: skip
        return Effect(name, callback.needs in ("itself", "process"), said)
    return Effect(name, True, _counted(receipt), _details(receipt))


def _pruned(
    name: str, callback: StructuredPruning, trainer: Trainer, pl_module: LightningModule
) -> Effect:
    decision = callback._decide(trainer, pl_module, len(callback.when))
    if not decision.cut:
        return Effect(name, False, f"would prune nothing: {decision.text}")
    copy = twin(pl_module)
    before = sum(p.numel() for p in copy.parameters())
    decision.cut.apply(copy)
    after = sum(p.numel() for p in copy.parameters())
    said = (
        f"{before:,} parameters become {after:,} (-{1 - after / before:.0%}) {moment_of(callback._when)}; which channels "
        "go is decided then, by the weights of then"
    )
    left = [f"left alone: {change.name}: {change.what}" for change in decision.cut.skipped]
    return Effect(name, True, said, _cut_short([*decision.cut.notes, *left]))


def _quantized(name: str, callback: Any, pl_module: LightningModule) -> Effect:
    found = why_not(pl_module, callback.select, callback.grid)
    left = [f"left alone: {layer}: {why}" for layer, why in found.items() if why and "already" not in why]  # fmt: skip
    count = len(found) - len(left)
    said = f"{count} layers train as {callback.grid.weights} {moment_of(callback.when)}"
    return Effect(name, bool(count), said, _cut_short(left))


def _counted(receipt: Receipt) -> str:
    """Say the changes, alike ones by their number."""
    names: dict[str, list[str]] = {}
    for change in receipt.changes:
        kind = f"{change.what}: {change.after}" if change.after else change.what
        names.setdefault(kind, []).append(change.name or "the whole")
    said = [f"{len(n)} x {kind}" if len(n) > 1 else f"{n[0]} {kind}" for kind, n in names.items()]
    return "; ".join(_cut_short(said))


def _details(receipt: Receipt) -> tuple[str, ...]:
    changes = [f"{c.name or 'the whole'}: {c.before} -> {c.after}" for c in receipt.changes if c.after]  # fmt: skip
    left = [f"left alone: {change.name}: {change.what}" for change in receipt.skipped]
    return (*_cut_short(changes), *_cut_short([*left, *receipt.notes]))


def _cut_short(lines: list[str]) -> tuple[str, ...]:
    flat = [" ".join(line.split()) for line in lines]
    return tuple(
        flat if len(flat) <= _SHOWN else [*flat[:_SHOWN], f"and {len(flat) - _SHOWN} more"]
    )
