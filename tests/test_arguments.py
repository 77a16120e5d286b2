"""Arguments of another type are refused where they are passed, in three parts, by every public name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_accel import (
    AccelReport,
    Select,
    SparsityTraining,
    StructuredPruning,
    load_from_checkpoint,
    prune,
    prune_before_sharding,
    tune,
)

X = torch.randn(2, 4)

BUILD: dict[str, tuple[Callable[[Any], Any], tuple[Any, ...]]] = {
    "path of a report": (lambda v: AccelReport(v), (3, ["a"])),
    "dense_metrics": (lambda v: AccelReport(dense_metrics=v), (3, {"a": "x"}, {"a": None})),
    "strength": (lambda v: SparsityTraining(strength=v), ("x", True, None, -1)),
    "ceiling": (lambda v: SparsityTraining(ceiling=v), ("x", True, None, 0)),
    "ratio": (lambda v: SparsityTraining("growing", ratio=v), ("x", True, None, 1)),
    "types": (lambda v: Select(types=v), (3, None, [3])),
    "include": (lambda v: Select(v), (3, None, [3])),
    "importance": (lambda v: StructuredPruning(ratio=0.5, when=1, importance=v), (nn.Linear, 3)),
    "class of a checkpoint": (lambda v: load_from_checkpoint(v, "a.ckpt"), (3, nn.Linear, None)),
    "network": (lambda v: prune(v, example=X, ratio=0.5), (3, nn.Linear, None)),
    "data": (
        lambda v: tune(BoringModel(), v),
        (3, "data", object(), [3], {"a": 3}, [range(2), b"x"]),
    ),
    "module": (lambda v: prune_before_sharding(v, example=X, ratio=0.5), (3, nn.Linear(4, 4))),
}


@pytest.mark.parametrize("name", BUILD)
def test_what_cannot_be_meant_is_refused_in_three_parts(name: str) -> None:
    build, values = BUILD[name]
    for value in values:
        with pytest.raises((ValueError, TypeError), match=r"Found: .*Do: "):
            build(value)


def test_a_checkpoint_that_is_not_there_is_said_in_three_parts() -> None:
    with pytest.raises(FileNotFoundError, match=r"no such checkpoint\. Found: a\.ckpt\. Do: "):
        load_from_checkpoint(BoringModel, "a.ckpt")
    with pytest.raises(TypeError, match=r"Found: 3\. Do: "):
        load_from_checkpoint(BoringModel, 3)  # type: ignore[arg-type]
