"""From a network to the program that all formats are made of, with as many sizes open as it allows."""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_accel.errors import Unsupported, explain
from lightning_accel.export import structure
from lightning_accel.export.backends import quiet
from lightning_accel.export.integers import folded, storing_integers
from lightning_accel.export.network import Axes, FlatNetwork, batch_axes, batch_size, grown

BATCH = "batch"


class Traced(NamedTuple):
    """A program, what it was made with, which sizes are open, and what is to be said about it."""

    program: torch.export.ExportedProgram
    example: list[Tensor]
    axes: Axes
    most: dict[str, int | None]
    notes: list[str]


def traced(
    network: FlatNetwork, dynamic: bool | Mapping[str, Mapping[int, str]], batch: int | None
) -> Traced:
    """Trace a network with open sizes, or with those of the example where it has them built in.

    Raises:
        ValueError: `dynamic` names an input that is not there, or too large a dimension.
        Unsupported: The network cannot be traced, or not with the sizes that `dynamic` names.

    >>> net = FlatNetwork(torch.nn.Linear(2, 3).eval(), structure_example(torch.ones(1, 2)))
    >>> found = traced(net, True, None)
    >>> found.axes, found.example[0].shape
    ([{0: 'batch'}], torch.Size([2, 2]))
    """
    axes = open_sizes(network, dynamic)
    most: dict[str, int | None] = {n: None for named in axes for n in named.values()}
    if BATCH in most:
        most[BATCH] = batch
    if any(axes):
        example = grown(network.example, axes)
        try:
            return Traced(_exported(network, example, axes, most), example, axes, most, [])
        except (
            Exception
        ) as error:  # of many kinds, for sizes that are written into the code of the network
            if dynamic is not True:
                raise Unsupported(
                    "the network cannot be traced with these sizes open",
                    _line(error),
                    "leave out of `dynamic=` what the network has built in",
                ) from error
            reason = _line(error)
    else:
        reason = ""
    closed: Axes = [{} for _ in axes]
    try:
        program = _exported(network, network.example, closed, {})
    except Exception as error:  # whatever tracing may raise
        raise Unsupported(
            "`torch.export` cannot trace this network",
            _line(error),
            "keep Python decisions on values of tensors out of `forward`, or pass the part without them",
        ) from error
    note = f"only the sizes of the example can be passed: {reason}" if reason else ""
    return Traced(program, list(network.example), closed, {}, [note] if note else [])


def open_sizes(network: FlatNetwork, dynamic: bool | Mapping[str, Mapping[int, str]]) -> Axes:
    """Return the names of the sizes that are to be open, by input and dimension.

    Raises:
        ValueError: `dynamic` names something that is not there.
    """
    if dynamic is False:
        return [{} for _ in network.example]
    if dynamic is True:
        return batch_axes(network, BATCH)
    says_batch = any(BATCH in named.values() for named in dynamic.values())
    axes: Axes = [{} for _ in network.example] if says_batch else batch_axes(network, BATCH)
    places = {name: index for index, name in enumerate(structure.names(network.arguments))}
    for name, named in dynamic.items():
        if name not in places:
            found = f"{name!r}; there are {', '.join(map(repr, places))}"
            raise ValueError(
                explain(
                    "`dynamic` has sizes by the name of an input",
                    found,
                    "pass {'ids': {1: 'length'}}",
                )
            )
        tensor = network.example[places[name]]
        for dim, axis in named.items():
            if not 0 <= dim < tensor.dim() or not axis.isidentifier() or keyword.iskeyword(axis):
                found = f"{dim}: {axis!r} for {tuple(tensor.shape)}"
                raise ValueError(
                    explain(
                        "`dynamic` has a name for a dimension that is there, one word as of a variable",
                        found,
                        "pass {1: 'length'}",
                    )
                )
            axes[places[name]][dim] = axis
    _check_same(network, axes)
    return axes


def sizes_to_try(traced_: Traced, batch: int | None) -> list[dict[str, int]]:
    """Return values of the open sizes, those of the example first, then the smallest and the largest."""
    present = {
        name: tensor.shape[dim]
        for tensor, named in zip(traced_.example, traced_.axes, strict=True)
        for dim, name in named.items()
    }
    if not present:
        return []
    found = [present]
    for name, size in present.items():
        largest = (
            batch
            if name == BATCH and batch is not None
            else 2 * size
            if name == BATCH
            else size - 1
        )
        for other in (1, largest, max(1, size // 2)):
            if {**present, name: other} not in found and other >= 1:
                found.append({**present, name: other})
    return found


def num_samples(example: Sequence[Tensor]) -> int:
    """Return the batch of an example, 1 where it has none."""
    return batch_size(example) or 1


def structure_example(*args: Any) -> Any:
    """Return a call with these arguments."""
    from lightning_accel.surgery.call import Call

    return Call("", args, {})


@contextmanager
def plainly() -> Iterator[None]:
    """Compute in full float32 without autocast, and attention as in training, whatever the process is set to.

    The fast path of `nn.TransformerEncoder`, which only an eager call in eval mode takes, answers otherwise at places that a mask
    leaves out, and may leave such places out of its answer (pytorch#86120, #97111).
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cpu", enabled=False), torch.no_grad(), fast_path(False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def fast_path(enabled: bool) -> Iterator[None]:
    """Let `nn.TransformerEncoder` and `nn.MultiheadAttention` take their fast path in eval mode, or not."""
    was = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was)


def _exported(
    network: FlatNetwork, example: Sequence[Tensor], axes: Axes, most: Mapping[str, int | None]
) -> torch.export.ExportedProgram:
    dims = {name: _dim(name, bound) for name, bound in most.items()}
    shapes = (tuple({dim: dims[name] for dim, name in named.items()} for named in axes),)
    with quiet():
        made = storing_integers(network)
        program = torch.export.export(made, tuple(example), dynamic_shapes=shapes, strict=False)
        return program if made is network else folded(program, example, shapes[0])


def _dim(name: str, most: int | None) -> Any:
    # A bound of 1 leaves nothing open, and `torch.export` refuses it.
    return torch.export.Dim(name) if most is None else torch.export.Dim(name, max=max(2, most))


def _check_same(network: FlatNetwork, axes: Axes) -> None:
    seen: dict[str, int] = {}
    for tensor, named in zip(network.example, axes, strict=True):
        for dim, name in named.items():
            if seen.setdefault(name, tensor.shape[dim]) != tensor.shape[dim]:
                found = f"{seen[name]} and {tensor.shape[dim]}"
                raise ValueError(
                    explain(
                        f"sizes named `{name}` are equal in the example",
                        found,
                        "give them different names",
                    )
                )


def _line(error: Exception) -> str:
    """Return the first line of an error, and what it says of sizes."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    lines = [line.partition(" For more information, run with")[0] for line in lines]
    of_sizes = [line.removeprefix("- ") for line in lines[1:] if line.startswith("- ")][:2]
    return f"{type(error).__name__}: {' '.join([*lines[:1], *of_sizes])[:400]}"
