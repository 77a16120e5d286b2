"""When to deploy: `Deploy`, at the end of a fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from typing_extensions import override

from lightning_accel.arguments import flag, instance, one_of
from lightning_accel.arguments import path as as_path
from lightning_accel.bridge.data import is_stream
from lightning_accel.bridge.example import AtHand, find_example
from lightning_accel.bridge.hand import reads_once
from lightning_accel.bridge.paced import report_path
from lightning_accel.bridge.restore import as_saved
from lightning_accel.bridge.strategies import gathers, holding, whole
from lightning_accel.errors import AccelError, Unsupported, explain
from lightning_accel.export.bundle import Bundle
from lightning_accel.export.deploy import check_arguments, check_formats, deploy
from lightning_accel.export.place import free
from lightning_accel.export.signature import private_key
from lightning_accel.places import free as free_name
from lightning_accel.places import is_there
from lightning_accel.surgery.call import Call


class Deploy(Callback):
    """At the end of a fit, write the trained network as files that run without its code, proved and measured here.

    What is deployed is the LightningModule, called as `forward` is, with what its first network receives from a batch;
    where it has no `forward`, the one network that its training step calls. The fit is as without it, bit for bit, and an error in here becomes a warning: a finished
    training is never lost. Only the first process writes. Nothing is written after `fast_dev_run`.

    Args:
        to: Where the bundle goes; by default `bundle` where the fit's logs are, with a number where that is taken.
        weights: "last", which are the averaged ones where a callback averages; or "best", those of the best checkpoint.
        formats: As in `deploy`.
        dynamic: As in `deploy`.
        batch: As in `deploy`.
        min_speedup: As in `deploy`.
        budget_s: As in `deploy`.
        example: Arguments of `forward`; by default `example_input_array`, or what the first network receives.
        pre: As in `deploy`.
        post: As in `deploy`.
        sign: As in `deploy`: the file of a private key, looked at when the fit begins.
        overwrite: Whether a bundle that is at `to` is replaced.

    Attributes:
        bundle: What was written last.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is of another kind.

    >>> Deploy("outputs/net", formats=["onnx"]).to
    PosixPath('outputs/net')
    """

    def __init__(
        self,
        to: str | PathLike[str] | None = None,
        *,
        weights: Literal["last", "best"] = "last",
        formats: str | Sequence[str] = ("auto",),
        dynamic: bool | Mapping[str, Mapping[int, str]] = True,
        batch: int | None = None,
        min_speedup: float = 1.0,
        budget_s: float = 3.0,
        example: Any = None,
        pre: nn.Module | None = None,
        post: nn.Module | None = None,
        sign: str | PathLike[str] | None = None,
        overwrite: bool = False,
    ) -> None:
        super().__init__()
        self.to: Path | None = as_path("to", to, none=True)
        self.weights: str = one_of("weights", weights, ("last", "best"))
        for name, part in (("pre", pre), ("post", post)):
            instance(name, part, nn.Module, "a module", "pass an nn.Module", none=True)
        check_arguments(dynamic=dynamic, batch=batch, min_speedup=min_speedup, budget_s=budget_s)
        self.formats = check_formats(formats)
        self.dynamic, self.batch, self.min_speedup = dynamic, batch, min_speedup
        self.budget_s = budget_s
        self.example, self.pre, self.post = example, pre, post
        self.sign: Path | None = as_path("sign", sign, none=True)
        self.overwrite: bool = flag("overwrite", overwrite)
        self.bundle: Bundle | None = None
        self._keeps = False
        self._at_hand: AtHand | None = None

    def __getstate__(self) -> dict[str, Any]:
        # For launchers that pickle the Trainer: what is open cannot travel.
        return {**vars(self), "bundle": None, "_at_hand": None}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and self.to is not None and trainer.is_global_zero:
            free(self.to, self.overwrite)  # better now than after the training
        if stage == "fit" and self.sign is not None and trainer.is_global_zero:
            private_key(self.sign)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._at_hand = None
        self._keeps = self.example is None and (is_stream(trainer) or reads_once(trainer))

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._keeps:
            return
        self._keeps = False
        with _told_not_raised("no batch of the stream could be kept for the deployment"):
            # A copy, because a step may write into its batch.
            self._at_hand = AtHand(move_data_to_device(deepcopy(batch), torch.device("cpu")))

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        with _told_not_raised("the trained network was not deployed"):
            strategy = trainer.strategy
            if not gathers(strategy) and holding(strategy) not in ("whole", "replicated"):
                raise Unsupported(
                    "no process holds the whole network",
                    type(strategy).__name__,
                    "load the checkpoint on one device, and call `deploy`",
                )
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if hasattr(callback, "before_deployment"):
                    callback.before_deployment(trainer, pl_module)
            with whole(trainer):
                self._deploy(trainer, pl_module)

    def _deploy(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # On all ranks, because a training step may communicate; what follows does not.
        kept, self._at_hand = self._at_hand, None
        device = trainer.strategy.root_device
        at_hand = kept and AtHand(move_data_to_device(kept.batch, device))
        call = _one(pl_module, find_example(trainer, pl_module, self.example, at_hand))
        if not trainer.is_global_zero:
            return
        module = pl_module if self.weights == "last" else _at_its_best(trainer, pl_module)
        network: nn.Module = module.get_submodule(call.name)
        self.bundle = deploy(
            network,
            call,
            to=self._place(trainer),
            formats=self.formats,
            dynamic=self.dynamic,
            batch=self.batch,
            min_speedup=self.min_speedup,
            budget_s=self.budget_s,
            pre=self.pre,
            post=self.post,
            sign=self.sign,
            overwrite=self.overwrite,
        )
        rank_zero_info(f"{self.bundle.table}\n- in {self.bundle.path}")

    def _place(self, trainer: Trainer) -> Path:
        if self.to is not None:
            return self.to
        return free_name(report_path(trainer).with_name("bundle"), lambda path: not is_there(path))


def _at_its_best(trainer: Trainer, pl_module: LightningModule) -> LightningModule:
    """Return a copy of the module as its best checkpoint has it.

    Raises:
        Unsupported: There is none, or it is in pieces.
    """
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not path or Path(path).is_dir():
        raise Unsupported(
            "the best weights are those of a checkpoint in one file",
            repr(path) if path else "no best checkpoint",
            "add ModelCheckpoint(monitor=...), or pass weights='last'",
        )
    return as_saved(pl_module, path)


def _one(pl_module: LightningModule, calls: tuple[Call, ...]) -> Call:
    """Return the call of the module itself, or of the one network that it calls.

    Raises:
        AccelError: There are several.
    """
    if is_overridden("forward", pl_module):
        # A step that calls the networks and not `forward` gives the first of them what `forward` takes.
        return next((call for call in calls if call.name == ""), calls[0]._replace(name=""))
    if len(calls) == 1:
        return calls[0]
    raise AccelError(
        "a deployment is of one network",
        f"the training step calls {', '.join(call.name for call in calls)}",
        "give the LightningModule a `forward` that does what is to be deployed, and pass `example=`",
    )


@contextmanager
def _told_not_raised(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever happens here, the training is done
        rank_zero_warn(
            explain(
                what, f"{type(error).__name__}: {error}", "call `deploy` on the module to see more"
            )
        )
