"""What a plan trains: the user's own step and optimizer where there are data, else a mean of outputs and AdamW."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lightning_accel.cli.devices import MIXED, TRUE
from lightning_accel.cli.subject import NamedModel, brings_data, subject_of, train_loader
from lightning_accel.errors import AccelError, explain
from lightning_accel.parallel.fit_workload import only_optimizer
from lightning_accel.parallel.planning import Workload
from lightning_accel.surgery.call import numbers


def workload(args: argparse.Namespace) -> Workload:
    """Return what is trained: the user's own step and optimizer where there are data, else a mean of outputs and AdamW."""
    built: dict[str, Any] = {}

    def make() -> nn.Module:
        with _format(args.precision):
            subject = subject_of(args)
        built["subject"] = subject
        model = subject.model
        if brings_data(model, subject.data) and not args.example:
            _attach(subject, model)
        return model

    def batch() -> Any:
        return _batch(built["subject"], args)

    def step(model: nn.Module, given: Any) -> Tensor:
        if brings_data(model, built["subject"].data) and not args.example:
            output: Any = model.training_step(given, 0)  # type: ignore[operator]
            return output["loss"] if isinstance(output, dict) else output
        outputs = model(**given) if isinstance(given, dict) else model(*given)
        floating = [n for n in numbers(outputs) if n.is_floating_point()]
        return torch.stack([n.float().mean() for n in floating]).sum()

    def optimizer(model: Any) -> Any:
        if brings_data(model, built["subject"].data) and not args.example:
            return only_optimizer(model, do="pass --example: AdamW is taken")
        return torch.optim.AdamW(model.parameters(), foreach=False)

    return Workload(make, batch, step, optimizer, _dtype(MIXED, args.precision))


def _dtype(formats: Mapping[str, str], precision: str) -> torch.dtype | None:
    found: torch.dtype | None = getattr(torch, formats.get(precision, ""), None)
    return found


@contextmanager
def _format(precision: str) -> Iterator[None]:
    """Make weights in a format within."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(_dtype(TRUE, precision) or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _attach(subject: NamedModel, model: Any) -> None:
    from lightning_accel.bridge.inert import look_on
    from lightning_accel.cli.plan import quiet_trainer

    trainer = subject.trainer or quiet_trainer()
    trainer.strategy.connect(model)
    look_on(trainer, model)


def _batch(subject: NamedModel, args: argparse.Namespace) -> Any:
    from lightning_accel.cli.plan import tensor

    if args.example:
        return _placed(tuple(tensor(text) for text in args.example), args.precision)
    if brings_data(subject.model, subject.data):
        return _placed(_from_loader(subject), args.precision)
    example = (
        subject.example
        if subject.example is not None
        else getattr(subject.model, "example_input_array", None)
    )
    if example is None:
        raise ValueError(
            explain("a step needs an example", "nothing", "pass --example 8,3,224,224")
        )
    return _placed(
        example if isinstance(example, (tuple, list, dict)) else (example,), args.precision
    )


def _placed(batch: Any, precision: str) -> Any:
    dtype = _dtype(TRUE, precision)

    def cast(value: Any) -> Any:
        return (
            value.to(dtype)
            if isinstance(value, Tensor) and value.is_floating_point() and dtype
            else value
        )

    return torch.utils._pytree.tree_map(cast, batch)


def _from_loader(subject: NamedModel) -> Any:
    loader = train_loader(subject)
    if not hasattr(getattr(loader, "dataset", None), "__getitem__"):
        raise AccelError(
            "memory is planned without reading data in order",
            type(loader).__name__,
            "pass --example with the shapes of a batch's tensors",
        )
    rows = range(loader.batch_size or 0)
    if not rows:  # a batch sampler of the user's
        with unset_fake_temporarily():
            rows = next(iter(loader.batch_sampler))
    return loader.collate_fn([loader.dataset[i] for i in rows])
