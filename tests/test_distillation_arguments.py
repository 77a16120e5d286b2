"""What cannot be meant is refused where it is passed, in three parts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_accel import Distillation, DistillationModule
from lightning_accel.distillation import LossTerm, SeededViews, Teacher, TeacherCache, losses

NOT_NUMBERS = (math.nan, math.inf, "x", [], {}, True, object())
NOT_WHOLE = (*NOT_NUMBERS, -1, 1.5, None)
NOT_NAMES = (0, -1, math.nan, [], {}, True)
X = torch.randn(4, 5)


def net() -> nn.Module:
    return nn.Linear(2, 2)


BUILD: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
    "task_weight": (
        lambda v: Distillation(net(), task_weight=v),
        (-1, None, {"over": 2}, *NOT_NUMBERS[:-1]),
    ),
    "student": (lambda v: Distillation(net(), student=v), NOT_NAMES),
    "target": (lambda v: Distillation(net(), target=v), (True, 1.5, [], {})),
    "mask": (lambda v: Distillation(net(), mask=v), (True, 1.5, [], {})),
    "cache": (lambda v: Distillation(net(), cache=v), NOT_NAMES),
    "ema_decay": (lambda v: Distillation(net(), ema_decay=v), (0, 1, None, *NOT_NUMBERS)),
    "diagnostics_every_n_steps": (
        lambda v: Distillation(net(), diagnostics_every_n_steps=v),
        NOT_WHOLE,
    ),
    "checkpoint": (lambda v: Teacher(net(), checkpoint=v), NOT_NAMES),
    "checkpoint of a path": (lambda v: Teacher("a.ckpt", checkpoint=v), ("b.ckpt",)),
    "compile": (lambda v: Teacher(net(), compile=v), (0, None, "yes")),
    "classes": (lambda v: Teacher(net(), classes=v), (0, [], {}, "x", [-1], [0.5])),
    "weight": (lambda v: LossTerm("kd", weight=v), (-1, *NOT_NUMBERS[:-1])),
    "temperature": (lambda v: LossTerm("kd", temperature=v), (0, -1, *NOT_NUMBERS[:-1])),
    "student_layout": (lambda v: LossTerm("kd", student_layout=v), (0, "x", [], {})),
    "teacher": (lambda v: LossTerm("kd", teacher=v), NOT_WHOLE[:-1]),
    "folder": (lambda v: TeacherCache(v), (*NOT_NAMES, None)),
    "views": (lambda v: SeededViews([1, 2], v), (0, *NOT_WHOLE)),
    "seed": (lambda v: SeededViews([1, 2], 2, seed=v), NOT_WHOLE),
    "optimizer": (lambda v: DistillationModule(net(), net(), optimizer=v), (None, 0, "sgd")),
    "scheduler": (lambda v: DistillationModule(net(), net(), scheduler=v), (0, "step")),
    "task_loss": (lambda v: DistillationModule(net(), net(), task_loss=v), (0, "mse", [])),
    "metrics": (lambda v: DistillationModule(net(), net(), metrics=v), (0, "acc", [])),
    "alpha": (lambda v: losses.rkd(X, X, alpha=v), (*NOT_NUMBERS, None)),
    "gamma": (lambda v: losses.dist(X, X, gamma=v), (*NOT_NUMBERS, None)),
    "beta": (lambda v: losses.jsd(X, X, beta=v), (*NOT_NUMBERS, None, -1, 2)),
    "T": (lambda v: losses.kd(X, X, temperature=v), (*NOT_NUMBERS, None, 0, -1)),
    "loss mask": (lambda v: losses.kd(X, X, mask=v), (0, "x", [], True)),
    "loss target": (lambda v: losses.dkd(X, X, target=v), (0, None, [], "x")),
    "negatives": (lambda v: losses.crd(X, X, negatives=v), (0, "x", [])),
}


@pytest.mark.parametrize("name", BUILD)
def test_what_cannot_be_meant_is_refused_in_three_parts(name: str) -> None:
    build, values = BUILD[name]
    for value in values:
        with pytest.raises((ValueError, TypeError), match=r"Found: .*Do: "):
            build(value)


@pytest.mark.parametrize("name", ["max_bytes", "top_k", "min_hit_rate", "dtype"])
def test_a_cache_is_not_made_of_nonsense(name: str, tmp_path: Path) -> None:
    for value in (*NOT_NUMBERS, -1):
        with pytest.raises((ValueError, TypeError), match=r"Found: .*Do: "):
            TeacherCache(tmp_path, **{name: value})


def test_weights_of_nothing_but_zero_are_refused() -> None:
    with pytest.raises(ValueError, match=r"would learn nothing\. Found: .*Do: "):
        Distillation(net(), {"kd": {"weight": 0}}, task_weight=0)
    Distillation(net(), {"kd": {"weight": {"start": 0, "end": 1}}}, task_weight=0)  # it grows
    Distillation(net(), {"kd": {"weight": 0}})  # a baseline


@pytest.mark.parametrize("nothing", [None, [None]])
def test_no_teacher_says_where_one_comes_from(nothing: Any) -> None:
    with pytest.raises(ValueError, match=r"no teacher.*callbacks\.distillation\.teacher="):
        Distillation(nothing)
