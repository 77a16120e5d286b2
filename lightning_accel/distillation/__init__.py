"""Distillation: a student learns from a teacher, on the user's own untouched training step."""

from typing import TYPE_CHECKING

from lightning_accel.distillation import losses
from lightning_accel.distillation.cache import TeacherCache
from lightning_accel.distillation.loss_term import LossTerm
from lightning_accel.distillation.schedule import FitProgress, Schedule
from lightning_accel.distillation.teacher import Teacher
from lightning_accel.distillation.views import SeededViews
from lightning_accel.lazy import lazily

if TYPE_CHECKING:
    from lightning_accel.distillation.callbacks.distillation import Distillation
    from lightning_accel.distillation.module import DistillationModule

__all__ = [
    "Distillation",
    "DistillationModule",
    "FitProgress",
    "LossTerm",
    "Schedule",
    "SeededViews",
    "Teacher",
    "TeacherCache",
    "losses",
]

_WITH_LIGHTNING = {"Distillation": "callbacks.distillation", "DistillationModule": "module"}


__getattr__ = lazily(__name__, _WITH_LIGHTNING)
