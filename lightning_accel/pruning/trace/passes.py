"""The passes: find the heads first, then follow the channels, in eval and in train mode."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial

import torch
from torch import nn

from lightning_accel.errors import AccelError
from lightning_accel.measure.flops import unfused
from lightning_accel.pruning.trace.channel_tracer import ChannelTracer, Info, Site
from lightning_accel.pruning.trace.rule import follow
from lightning_accel.pruning.trace.sizes import Origin
from lightning_accel.pruning.trace.symbolic_sizes import SymbolicSizes, sizes_not_cached
from lightning_accel.surgery import twin
from lightning_accel.surgery.call import Call, run, same_random_state, tensors

_TRIES = 4


def traced(model: nn.Module, calls: Sequence[Call], *, attention: str = "heads") -> ChannelTracer:
    """Run copies of `model` on the calls until no new heads are found; return what the last one showed.

    Args:
        model: Is not touched.
        calls: Small ones; values do not matter, sizes do.
        attention: Where channels are split into heads, "heads" can go, or "width", the same places of
            every head.

    Raises:
        AccelError: The forward fails.
    """
    live: dict[Site, int] = {}
    # Whether a split is one into heads shows later, in the product whose batch they are: so each pass acts on
    # what the last has seen. Heads within heads take one more.
    for _ in range(_TRIES):
        tracer = ChannelTracer(twin(model).eval(), live, follow)
        with same_random_state(model):
            _passes(tracer, calls)
            new = _heads(tracer, attention)
            if new.items() <= live.items():
                # Training may compute more (batch statistics, auxiliary heads), and what it joins has to hold
                # as well. Call by call, for one sample is too few for some norms.
                tracer.model.train()
                for call in calls:
                    with suppress(AccelError):  # it may not train on so few samples
                        _passes(tracer, [call], counted=False)
                new = _heads(tracer, attention)
        if new.items() <= live.items():
            break
        live = {**live, **new}
    return tracer


def _heads(tracer: ChannelTracer, attention: str) -> dict[Site, int]:
    """Return which factor of each split into heads can go."""
    found = {s: f for s, f in tracer.batched.items() if s in tracer.splits}
    if attention == "width":
        # The other factor is the width of a head; where there is none, heads it is.
        return {s: max(set(tracer.splits[s]) - {f}, default=f) for s, f in found.items()}
    return found


def _passes(tracer: ChannelTracer, calls: Sequence[Call], *, counted: bool = True) -> None:
    """Run the calls; fix what hangs on their arguments and outputs."""
    products, queries = list(tracer.products), list(tracer.queries)
    for tensor in (t for call in calls for t in tensors((call.args, call.kwargs))):
        # Callers go on giving inputs of this size, and reading outputs of that one.
        axes = tuple(tracer.still(n, "it hangs on the network's input") for n in tensor.shape)
        tracer.infos[tensor] = Info(axes)
    try:
        with (
            torch.no_grad(),
            unfused(tracer.model),
            _located(tracer),
            sizes_not_cached(),
            SymbolicSizes(tracer),
            tracer,
        ):
            outputs = run(tracer.model, calls)
    except Exception as error:
        found = f"{type(error).__name__} in {tracer.here}: {error}"
        if _runs_untraced(tracer.model, calls):
            raise AccelError(
                "the network cannot be traced: its forward runs, but not while it is watched",
                found,
                "leave that module out of the network that is pruned, or write it with plain tensors",
            ) from error
        raise AccelError(
            "the network cannot be traced: its forward fails on the example",
            found,
            "pass an `example` that the network accepts",
        ) from error
    # Arithmetic and queries are those of one forward in evaluation; more passes would count them again.
    if not counted:
        tracer.products, tracer.queries = products, queries
    for tensor in tensors(outputs):
        for axis in tracer.info(tensor).axes:
            tracer.atoms.fix(axis.atoms, "it makes the network's output")


def _runs_untraced(model: nn.Module, calls: Sequence[Call]) -> bool:
    copy = twin(model)
    for (
        module
    ) in copy.modules():  # sizes that remember where they come from are not the forward's own
        for key, value in vars(module).items():
            module.__dict__[key] = _plain(value)
    try:
        with torch.no_grad():
            run(copy, calls)
    except Exception:  # whatever a forward may raise
        return False
    return True


def _plain(value: object) -> object:
    if isinstance(value, Origin):
        return int(value)
    if type(value) in (tuple, list) and any(isinstance(v, Origin) for v in value):  # type: ignore[attr-defined]
        return type(value)(_plain(v) for v in value)  # type: ignore[call-arg, attr-defined]
    return value


def _enter(tracer: ChannelTracer, name: str, *_: object) -> None:
    tracer.stack.append(name)
    tracer.ran.add(name)


@contextmanager
def _located(tracer: ChannelTracer) -> Iterator[None]:
    def leave(*_: object) -> None:
        tracer.stack.pop()

    tracer.stack.clear()
    handles = []
    for name, module in tracer.model.named_modules():
        handles.append(
            module.register_forward_pre_hook(partial(_enter, tracer, name), prepend=True)
        )
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
