"""What a command looks at: the user's training on a copy, at the moment before its first batch.

A real fit is begun, so that all is as the Trainer makes it (data, optimizers, precision, hooks), and ended before it trains.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from typing_extensions import override

from lightning_accel.cli.subject import NamedModel, brings_data, users_own
from lightning_accel.cli.ways import mean_of
from lightning_accel.errors import AccelError, explain
from lightning_accel.surgery.call import as_call

Look = Callable[[Trainer, LightningModule], None]


def in_fit(
    subject: NamedModel,
    look: Look,
    *,
    accelerator: str = "auto",
    callbacks: Sequence[Callback] = (),
) -> None:
    """Begin a fit of what was built for this command alone, look at it, and end it before it trains.

    Args:
        subject: A LightningModule with data.
        look: Called when all that begins a fit is done.
        accelerator: Where to train, where the subject has no Trainer of its own.
        callbacks: More callbacks of the Trainer.

    Raises:
        ValueError: The code of the user fails, or Lightning refuses it.
        AccelError: A technique refuses, or there is no batch.
    """
    trainer = subject.trainer or _plain_trainer(accelerator)
    trainer.loggers = []
    kept = [c for c in trainer.callbacks if not isinstance(c, (Checkpoint, ProgressBar))]  # type: ignore[attr-defined]
    seen = _Look(look)
    trainer.callbacks = [*kept, *callbacks, seen]  # type: ignore[attr-defined]
    trainer.num_sanity_val_steps = 0
    module: Any = subject.model
    with quietly():
        _fit(trainer, module, subject.data)
    users_own("a step of this training fails on a copy", seen.end)
    if not seen.came:
        raise AccelError(
            "there is no training batch to look at",
            f"{trainer.num_training_batches} batches, max_epochs={trainer.max_epochs}, max_steps={trainer.max_steps}",
            "pass data, and arguments of a Trainer that trains",
        )


def training_of(subject: NamedModel, name: str) -> NamedModel:
    """Return a subject that can be fitted: it itself, or a network with an example as a training of its own.

    Args:
        subject: What was built.
        name: How the user named it.

    Raises:
        TypeError: It is a network without an example.
    """
    if brings_data(subject.model, subject.data):
        return subject
    example = subject.example
    if example is None:
        example = getattr(subject.model, "example_input_array", None)
    if example is None:
        raise TypeError(
            explain(
                f"`{name}` gives neither data nor an example of what the network takes",
                type(subject.model).__name__,
                "pass --example 32,3,224,224, or return (network, example) or (LightningModule, data)",
            )
        )
    return NamedModel(NetworkTraining(subject.model, example), data=_Repeated(example))


def require_training(subject: NamedModel, name: str, why: str) -> None:
    """Raise unless this is a LightningModule with data.

    Raises:
        TypeError: It is not.
    """
    if subject.example is not None or not brings_data(subject.model, subject.data):
        beside = "" if subject.example is None else " and an example"
        raise TypeError(
            explain(
                f"`{name}` gives no LightningModule with data, and {why}",
                type(subject.model).__name__ + beside,
                "return (module, data), with data a DataLoader or a LightningDataModule; of a network "
                "alone `lightning-accel bench` tells more",
            )
        )


class NetworkTraining(LightningModule):
    """A network alone as a training: the mean of its outputs falls under AdamW.

    Args:
        network: Any that makes floating-point outputs.
        example: What it takes.
    """

    def __init__(self, network: nn.Module, example: Any) -> None:
        super().__init__()
        self.network = network
        self._is_call = isinstance(example, dict)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mean_of(self.network(**batch) if self._is_call else self.network(*batch))

    @override
    def configure_optimizers(self) -> Optimizer:
        return AdamW(self.parameters())


class _Repeated:
    """The example as a loader of a thousand batches."""

    def __init__(self, example: Any) -> None:
        call = as_call(example)
        self._batch = dict(call.kwargs) if call.kwargs else tuple(call.args)

    def __len__(self) -> int:
        return 1000

    def __iter__(self) -> Iterator[Any]:
        return iter([self._batch] * len(self))


class _Look(Callback):
    """Looks when all others have begun, and ends the fit."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self.came = False
        self.error: Exception | None = None

    def end(self) -> None:
        """Raise what the look raised."""
        if self.error is not None:
            raise self.error

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.came = True
        trainer.fit_loop.max_epochs = 0
        try:
            self._look(trainer, pl_module)
        except Exception as error:  # told when the fit has ended as it should
            self.error = error


def _fit(trainer: Trainer, module: LightningModule, data: Any) -> None:
    where = {"datamodule" if isinstance(data, LightningDataModule) else "train_dataloaders": data}
    refused: list[Exception] = []

    def fit() -> None:
        try:
            trainer.fit(module, **where)
        except MisconfigurationException as error:
            refused.append(error)

    try:
        users_own("this training fails before its first batch", fit)
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # what Lightning makes of Ctrl-C
            raise KeyboardInterrupt from None
        what = "this training ends the process before its first batch is done"
        do = "leave out what calls `exit`"
        raise ValueError(explain(what, f"SystemExit({error.code})", do)) from error
    if refused:
        raise ValueError(
            explain(
                "Lightning refuses this training",
                str(refused[0]),
                "correct the module and its data, or pass another --accelerator",
            )
        ) from refused[0]


@contextmanager
def quietly() -> Iterator[None]:
    """Let Lightning say nothing of a fit that does not train, and nobody warn of it."""
    with without_banner(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def without_banner() -> Iterator[None]:
    """Keep out what Lightning says of each Trainer: devices, tips."""
    loggers = [
        logging.getLogger(f"{root}.pytorch.utilities.rank_zero")
        for root in ("lightning", "pytorch_lightning")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _plain_trainer(accelerator: str) -> Trainer:
    try:
        with quietly():
            return Trainer(
                accelerator=accelerator,
                devices=1,
                max_epochs=1000,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
            )
    except (MisconfigurationException, ValueError, RuntimeError) as error:
        raise ValueError(
            explain(
                "there is no such accelerator here",
                f"--accelerator {accelerator}: {str(error).splitlines()[0]}",
                "see `lightning-accel env`",
            )
        ) from error
