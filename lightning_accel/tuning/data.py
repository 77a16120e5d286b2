"""How the data comes in: measured beside the step, and said in the same words as the other choices."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer

from lightning_accel.errors import AccelError
from lightning_accel.loading import LoadingChoice, LoadingPlan, apply_choice, choose
from lightning_accel.loading.callbacks.fast_loading import AppliedPlan
from lightning_accel.loading.resident import SHARE, free_bytes, look_up
from lightning_accel.tuning.report import Trial
from lightning_accel.tuning.settings import BASELINE

_LONGEST_S = 5.0


def choose_loading(
    trainer: Trainer, step_ms: float, budget_s: float
) -> tuple[LoadingPlan | str, float, list[Trial]]:
    """Return how to load the training data, what that gives to batch and step together, and all trials.

    Args:
        trainer: A Trainer within a fit.
        step_ms: A step under the chosen settings.
        budget_s: About how long to measure.
    """
    loader = _only_loader(trainer)
    if isinstance(loader, str):
        return BASELINE, 1.0, [Trial("loading", "any", "skipped", loader)]
    device = trainer.strategy.root_device
    choice = choose(loader, step_ms=step_ms, device=device, budget_s=min(budget_s, _LONGEST_S))
    trials = []
    for way in choice.ways[1:]:
        taken = way.name == choice.taken
        verdict = "taken" if taken else "skipped" if way.skipped else "not taken"
        gain = way.gain or (None, None, None)
        trials.append(Trial("loading", way.name, verdict, way.skipped or way.reason, *gain))
    if not trials:
        trials = [Trial("loading", "any", "skipped", choice.reason)]
    return BASELINE if choice.taken == "as is" else choice.plan, choice.ratio, trials


def apply_loading(trainer: Trainer, plan: LoadingPlan) -> AppliedPlan:
    """Load the training data of a running fit in a way that was chosen, perhaps in an earlier run.

    Raises:
        AccelError: The data does not allow it any more.
    """
    loader = _only_loader(trainer)
    if isinstance(loader, str):
        raise AccelError("the data cannot be loaded as it was chosen", loader, "tune anew")
    held = None
    if plan.in_memory:
        held = look_up(loader, int(SHARE * free_bytes(torch.device("cpu"))))
    choice = LoadingChoice(plan.label, 1.0, "chosen before", plan=plan, store=held)
    return apply_choice(trainer, choice)


def _only_loader(trainer: Trainer) -> Any:
    """Return the one training loader, or the reason why it stays as it is."""
    if any(type(c).__name__ == "FastLoading" for c in trainer.callbacks):  # type: ignore[attr-defined]
        return "the Trainer already has FastLoading"
    combined = trainer.fit_loop._combined_loader
    loaders = combined.flattened if combined is not None else []
    return loaders[0] if len(loaders) == 1 else f"{len(loaders)} training loaders"
