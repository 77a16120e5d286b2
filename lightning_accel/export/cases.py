"""Inputs with the answers that every candidate has to give: those of the model itself, in float32, without a graph."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_accel.export import backends, gates
from lightning_accel.export.gates import Case
from lightning_accel.export.network import FlatNetwork, in_double
from lightning_accel.export.program import Traced, fast_path, sizes_to_try
from lightning_accel.export.samples import Sample, samples
from lightning_accel.export.schema import Runner, Schema
from lightning_accel.surgery.call import as_call


def known_answers(
    network: FlatNetwork, found: Traced, batch: int | None
) -> tuple[list[Case], list[str]]:
    """Return inputs with the model's answers, and a note on those that the model itself does not take."""
    cases, refused = [], []
    for sample in samples(network.example, found.axes, sizes_to_try(found, batch)):
        try:
            cases.append(case_of(network, sample))
        except Exception as error:  # at sizes or numbers that the network is not for
            refused.append(f"{sample.kind} ({type(error).__name__})")
    if not refused:
        return cases, []
    return cases, [
        f"the model itself fails on {len(refused)} inputs, such as {refused[0]}, which were left out"
    ]


def eager(network: FlatNetwork) -> Runner:
    """Return the model itself as if it were a back end."""

    def run(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return network(*backends.copies(tensors))

    return run


def differs_on_fast_path(network: FlatNetwork) -> list[str]:
    """Return a note where the model answers otherwise on the fast path of attention, which no graph takes."""
    case = case_of(network, Sample("the example", network.example))
    with fast_path(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of nested tensors
        try:
            found = eager(network)(network.example)
        except Exception as error:  # of the fast path alone: the model has run without it
            return [f"on its fast path of attention the model fails ({type(error).__name__})"]
    scale = gates.typical([case.wanted])
    reason = gates.same_kind(case.wanted, found) or gates.same_numbers(case, found, scale)
    if not reason:
        return []
    return [
        "deployed as in training, without the fast path of attention, "
        f"on which the model gives {reason.removeprefix('the answer is ')}"
    ]


def case_of(network: FlatNetwork, sample: Sample) -> Case:
    """Return an input with the model's answer."""
    wanted = tuple(t.clone() for t in eager(network)(sample.tensors))
    if sample.usual:
        return Case(sample, wanted)
    return Case(sample, wanted, _own_db(network, sample, wanted))


def _own_db(network: FlatNetwork, sample: Sample, wanted: Sequence[Tensor]) -> float:
    """Return the signal to noise of the model against its copy in float64, infinite where there is none."""
    try:
        exact = in_double(network)(
            *(t.double() if t.is_floating_point() else t.clone() for t in sample.tensors)
        )
        pairs = [(w, e) for w, e in zip(wanted, exact, strict=True) if gates.is_real(w)]
        return min((gates.sqnr_db(e, w.double()) for w, e in pairs), default=math.inf)
    except Exception:  # a network may insist on float32
        return math.inf


def given(network: FlatNetwork, check: Iterable[Any] | None, schema: Schema) -> list[Case]:
    """Return the answers to examples of the user's.

    Raises:
        TypeError: One of them is of another kind than the example.
        ValueError: One has sizes that the graph does not take.
    """
    calls = [as_call(item) for item in check or ()]
    return [
        case_of(network, Sample(f"number {index} of `check`", schema.flat(call.args, call.kwargs)))
        for index, call in enumerate(calls)
    ]
