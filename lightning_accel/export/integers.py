"""A quantized network on its way into files: quantized where that is asked for, exported as integers, measured against floats.

Candidates have to answer as the quantized network does, which computes in floating point what integers give. Both round, and
where a value lies in the middle of two integers the last bit decides: so less of a signal is asked for than of formats in
floating point. Their speed, and a metric, are compared with the network in floating point.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.arguments import one_of
from lightning_accel.errors import explain
from lightning_accel.export import structure
from lightning_accel.export.gates import FLOOR_DB
from lightning_accel.export.network import FlatNetwork
from lightning_accel.export.schema import bound
from lightning_accel.quantization.budget import outputs_of, sqnr_db
from lightning_accel.quantization.calibration import calls_from
from lightning_accel.quantization.fold import fold_norms
from lightning_accel.quantization.grid import WEIGHTS
from lightning_accel.quantization.layers import is_idle, layers_of
from lightning_accel.quantization.lower import lowered
from lightning_accel.quantization.merge import merge_roundings
from lightning_accel.quantization.post_training import plan_of, quantize_by, unquantize
from lightning_accel.surgery.call import Call, converted, in_precision

QUANTIZED_FLOOR_DB = 42.0
"""Signal to noise that integers have to reach against the quantized network: an error of one percent leaves 40 dB."""
_ABOVE_DB, _LEAST_DB = 6.0, 25.0
_BATCHES = 32


def check(quantize: Any, calibration: Any) -> None:
    """Raise unless the two go together.

    Raises:
        ValueError: The word is unknown, or there is nothing to calibrate on.
    """
    if quantize is None:
        if calibration is not None:
            do = "pass quantize='int8', or leave it out"
            raise ValueError(explain("`calibration` goes with `quantize`", "no `quantize`", do))
        return
    one_of("quantize", quantize, tuple(WEIGHTS))
    if calibration is None:
        do = "pass a few batches of the training data, as the model takes them"
        raise ValueError(explain("`quantize` needs `calibration`", "none", do))


def quantized(
    network: FlatNetwork, word: str | None, calibration: Any
) -> tuple[FlatNetwork, list[str]]:
    """Quantize a network in place where that is asked for; return it in floating point, and what is to be said.

    Integer kernels give float32: so networks in float64 are deployed in it.
    """
    itself, notes = _quantized(network, word, calibration)
    if is_quantized(network) and any(p.dtype is torch.float64 for p in network.parameters()):
        for one in {network, itself}:
            converted(one, torch.float32)
            one.example = [in_precision(t, torch.float32) for t in one.example]
        notes.append("weights in float64 are deployed in float32, in which integer kernels answer")
    return itself, notes


def _quantized(
    network: FlatNetwork, word: str | None, calibration: Any
) -> tuple[FlatNetwork, list[str]]:
    """Quantize a network in place where that is asked for; return it in floating point, and what is to be said.

    Eight bits are those of weights, of what comes in and of sums; fewer are of weights alone. Of a network that was quantized before
    nobody knows what its weights were: in floating point it has those that it has.
    """
    if word is not None and not is_quantized(network):
        itself = copy.deepcopy(network)
        plan = plan_of(
            weights=word,
            activations="int8" if word == "int8" else None,
            group=None,
            select=None,
            observer="mse",
            rounding="least_squares",
            correct_bias=True,
            sums=word == "int8",
        )
        receipt = quantize_by(network, plan, _flat_calls(network, calibration))
        left = [f"`{c.name}` stays in floating point: {c.what}" for c in receipt.skipped]
        return itself, [f"quantized to {plan.grid}; {'; '.join(receipt.notes)}", *left]
    if not is_quantized(network):
        return network, []
    itself = copy.deepcopy(network)
    unquantize(itself)
    lost = _own_db(network, itself)
    notes = [f"quantized: {lost:.1f} dB on the example against the same weights in floating point"]
    if word is not None:
        notes.append(f"was quantized already, and so quantize={word!r} had nothing to do")
    idle = [name for name, layer in layers_of(network).items() if is_idle(layer)]
    if idle:
        notes.append(f"nothing ever came into {', '.join(idle)}: what does stays in floating point")
    return itself, notes


def is_quantized(network: nn.Module) -> bool:
    """Whether some layer computes on a grid."""
    return any(
        layer.accel_mode in ("training", "quantized") for layer in layers_of(network).values()
    )


def floor_db(network: FlatNetwork, itself: FlatNetwork) -> float:
    """Return the signal to noise that a candidate has to reach.

    Where quantization itself leaves little, as in deep networks of small weights, values that are rounded the other way cost
    nearly as much: there it is some decibels above what quantization leaves.
    """
    if not is_quantized(network):
        return FLOOR_DB
    return min(QUANTIZED_FLOOR_DB, max(_own_db(network, itself) + _ABOVE_DB, _LEAST_DB))


def _own_db(network: FlatNetwork, itself: FlatNetwork) -> float:
    """Return what quantization leaves of the answer to the example."""
    sample = [[Call("", tuple(network.example), {})]]
    return sqnr_db(outputs_of(itself, sample), outputs_of(network, sample))


@torch.no_grad()
def storing_integers(network: FlatNetwork) -> FlatNetwork:
    """Return what to export: a copy that stores integers where the network is quantized.

    Where the network computes with weights outside of their layers, it keeps these in floating point too.
    """
    if not is_quantized(network):
        return network
    made = lowered(network)
    sample = [[Call("", tuple(network.example), {})]]
    if sqnr_db(outputs_of(network, sample), outputs_of(made, sample)) < FLOOR_DB:
        return lowered(network, keep=True)
    return made


def folded(program: Any, example: Sequence[Tensor], shapes: Any) -> Any:
    """Return a program without the batch norms behind layers of integers, and without roundings that change nothing."""
    graph = program.module()
    if not fold_norms(graph) + merge_roundings(graph):
        return program
    return torch.export.export(graph, tuple(example), dynamic_shapes=shapes, strict=False)


def _flat_calls(network: FlatNetwork, calibration: Any) -> list[list[Call]]:
    entry = network.model if network.pre is None else network.pre
    batches = calls_from(entry, calibration, _BATCHES)
    return [[Call("", tuple(_leaves(network, call)), {}) for call in calls] for calls in batches]


def _leaves(network: FlatNetwork, call: Call) -> list[Tensor]:
    """Return the tensors of a call in their order.

    Raises:
        TypeError: The call has others than the example.
    """
    leaves: list[Tensor] = []
    tree = structure.encode(bound(network.parameter_names, call.args, call.kwargs), leaves)
    given, wanted = (list(structure.names(node)) for node in (tree, network.arguments))
    if given != wanted:
        raise TypeError(
            explain(
                "batches of `calibration` have the tensors of the example",
                f"{', '.join(map(repr, given))} instead of {', '.join(map(repr, wanted))}",
                "pass them as the model takes them",
            )
        )
    return leaves
