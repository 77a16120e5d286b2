"""Ways to run a network faster, each tried on a copy: what makes it, where it applies, and how far its numbers are off.

A way gets a copy of the network and gives how that is called. What does not apply says so by an error of its own, whose words
are the reason in the table; what raises anything else is told as having failed.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from lightning_accel.compilation.blocks import compile_blocks
from lightning_accel.errors import AccelError, NoEffect, Unsupported
from lightning_accel.loop.fused import use_implementation
from lightning_accel.precision.autocast import autocast, takes_effect
from lightning_accel.precision.layout import channels_last, convert_inputs
from lightning_accel.precision.matmul import matmul_precision
from lightning_accel.pruning import prune
from lightning_accel.surgery.call import Call, cast, converted, numbers, run

INFERENCE, TRAINING = "inference", "training"
Context = Callable[[], AbstractContextManager[Any]]


@dataclass
class Made:
    """How a copy is called.

    Attributes:
        network: The copy.
        calls: What it takes.
        context: Held around each call.
        around: Held around many, outside of the clock: what a Trainer sets once.
        optimizer: Of its training; it moves no weight, so that all steps are alike.
        answer: Another thing that answers in place of the network, for inference.
    """

    network: nn.Module
    calls: Sequence[Call]
    context: Context = nullcontext
    around: Context = nullcontext
    optimizer: Optimizer | None = None
    answer: Callable[[], Any] | None = None
    held: list[Any] = field(default_factory=list)

    def infer(self) -> Any:
        """Return the outputs, without gradients."""
        with torch.no_grad(), self.context():
            return self.answer() if self.answer is not None else run(self.network, self.calls)

    def train(self) -> None:
        """Do a step: forward, the mean of the outputs as loss, backward, and AdamW."""
        self.backward()
        assert self.optimizer is not None
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self) -> Tensor:
        """Leave gradients in the copy, and return the loss."""
        with torch.enable_grad(), self.context():
            loss = mean_of(run(self.network, self.calls))
        loss.backward()
        return loss.detach()


Edit = Callable[[Made, torch.device], None]


@dataclass(frozen=True)
class Way:
    """A way by name: `edit` makes it of a plain `Made`, `modes` says what it is for."""

    name: str
    edit: Edit
    modes: tuple[str, ...] = (INFERENCE, TRAINING)
    compiles: bool = False


def mean_of(outputs: Any) -> Tensor:
    """Return a loss of any outputs: the sum of the means of all that have a gradient.

    Raises:
        AccelError: None has.

    >>> mean_of([torch.ones(2, requires_grad=True), "text"]).item()
    1.0
    """
    found = [t for t in numbers(outputs) if t.requires_grad]
    if not found:
        raise AccelError(
            "there is nothing to train",
            "no output of the network has a gradient",
            "let it have parameters that learn, and run without `no_grad`",
        )
    return torch.stack([t.float().mean() for t in found]).sum()


def plain(network: nn.Module, calls: Sequence[Call], mode: str) -> Made:
    """Return a copy as it is, in the mode in which it is measured."""
    network.train(mode == TRAINING)
    learning = [p for p in network.parameters() if p.requires_grad]
    trains = mode == TRAINING and learning
    return Made(network, calls, optimizer=AdamW(learning, lr=0.0) if trains else None)


def _autocast(made: Made, device: torch.device, dtype: torch.dtype) -> None:
    if not takes_effect(device, dtype):
        raise Unsupported(f"autocast to {dtype} has no effect on {device.type}")
    made.context = lambda: autocast(device.type, dtype)


def _bf16(made: Made, device: torch.device) -> None:
    _autocast(made, device, torch.bfloat16)


def _bf16_weights(made: Made, device: torch.device) -> None:
    converted(made.network, torch.bfloat16)
    made.calls = cast(made.calls, torch.bfloat16)


def _matmul(made: Made, device: torch.device) -> None:
    name = "high" if device.type == "cuda" else "medium"
    made.around = lambda: matmul_precision(name)


def _channels_last(made: Made, device: torch.device) -> None:
    channels_last(made.network)
    made.held += convert_inputs(made.network)


def _fused(made: Made, device: torch.device) -> None:
    assert made.optimizer is not None
    use_implementation(made.optimizer, "fused")


def _compiled(made: Made, device: torch.device) -> None:
    compile_blocks(made.network, check_every_n_calls=None)


def _compiled_bf16(made: Made, device: torch.device) -> None:
    _bf16(made, device)
    _compiled(made, device)


def _pruned(made: Made, device: torch.device) -> None:
    calls = [call for call in made.calls if not call.name]
    if len(calls) != 1:
        raise Unsupported("pruning is tried on one call of the network")
    example = calls[0].kwargs or calls[0].args
    mode = made.network.training
    prune(made.network, example=example, ratio=0.5)
    made.network.train(mode)
    learning = [p for p in made.network.parameters() if p.requires_grad]
    made.optimizer = AdamW(learning, lr=0.0) if made.optimizer is not None else None


def _int8(made: Made, device: torch.device) -> None:
    if device.type != "cpu":
        raise Unsupported("integers are deployed to the CPU; `lightning-accel export` writes them")
    from lightning_accel.export import deploy

    call = made.calls[0]
    example: Any = call.args if not call.kwargs else dict(call.kwargs)
    if call.args and call.kwargs:
        raise Unsupported("arguments by place and by name at once cannot be calibrated on")
    folder = tempfile.TemporaryDirectory(prefix="accel_bench_")
    made.held.append(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is not faster is what the table tells
        bundle = deploy(
            made.network,
            example,
            to=Path(folder.name, "bundle"),
            formats="onnx",
            dynamic=False,
            quantize="int8",
            calibration=[example],
            budget_s=0.1,
        )
    made.answer = lambda: bundle.predict(*call.args, **call.kwargs)


WAYS = (
    Way("bf16 autocast", _bf16),
    Way("bf16 weights", _bf16_weights, (INFERENCE,)),
    Way("short matrix products", _matmul),
    Way("channels last", _channels_last),
    Way("fused optimizer", _fused, (TRAINING,)),
    Way("half of the channels pruned", _pruned),
    Way("compiled", _compiled, compiles=True),
    Way("compiled, bf16 autocast", _compiled_bf16, compiles=True),
    Way("int8, deployed as ONNX", _int8, (INFERENCE,), compiles=True),
)
"""In the order in which they are tried: what compiles comes last, and is left out first when time is short."""


def reason(error: Exception) -> str:
    """Say in one line why a way does not apply, or how it failed."""
    line = " ".join((str(error).strip().splitlines() or [""])[0].split()).partition(" Do: ")[0]
    if isinstance(error, (NoEffect, Unsupported)):
        return f"does not apply: {line}"
    return f"failed: {line}" if isinstance(error, AccelError) else f"failed: {type(error).__name__}: {line}"  # fmt: skip
