"""`FrozenPredict`: frozen copies answer for the networks while predicting, testing or validating."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.distributed.tensor import DTensor
from typing_extensions import override

from lightning_accel.arguments import instance
from lightning_accel.bridge.evaluation import EvaluationBatches
from lightning_accel.bridge.restore import register
from lightning_accel.bridge.technique import Context, Technique
from lightning_accel.compilation.frozen.freeze import Frozen, check_arguments, frozen
from lightning_accel.compilation.region import Backend, check
from lightning_accel.errors import NoEffect, Unsupported, explain
from lightning_accel.surgery import Select

_SLOWER = 1.1
"""How many times as long a frozen copy may take before that is told."""


class FrozenPredict(Technique, EvaluationBatches):
    """Predict, test or validate with copies of the networks that inductor froze: weights baked in.

    The first batch and some later ones run both and are compared: a network whose copy is off goes on as it is,
    with a warning and the figures; so does one that writes anything or draws random numbers in its forward. The
    copy follows weights, attributes, modes and hooks. The module is bit-equal afterwards. Compiling takes its time at every call of the
    Trainer, so this is for long evaluations; measure short ones.

    Args:
        select: Networks to freeze: a `Select`, a name pattern or several; by default all of the module.
        precision: "bf16-true" for copies in bfloat16: fast where the hardware is, and off by about 1 %.
        channels_last: Whether copies of convolutional networks are channels last.
        tolerance: How far outputs may be off: norm of the difference by norm. By default 1e-4, with
            bfloat16 weights 3e-2.
        check_every_n_calls: At how many calls both run and are compared, besides the first, second, fourth, eighth ...,
            and the first of each dataloader. None for never but at the first of a new copy, which is part of making it.
        backend: As in `torch.compile`; only inductor freezes.

    Raises:
        Unsupported: In a fit, or at the start of an evaluation on shards.
        NoEffect: After the first batch, when it called none of the networks.

    >>> FrozenPredict(precision="bf16-true", channels_last=True).precision
    'bf16-true'
    """

    of_a_fit: ClassVar = {"networks": list}

    def __init__(
        self,
        select: Select | str | Iterable[str] | dict[str, Any] | None = None,
        *,
        precision: str | None = None,
        channels_last: bool = False,
        tolerance: float | None = None,
        check_every_n_calls: int | None = 128,
        backend: Backend = "inductor",
    ) -> None:
        check_arguments(precision, channels_last, tolerance, check_every_n_calls)
        if not callable(backend):
            instance("backend", backend, str, "a name", "pass 'inductor'")
        self.select = Select.of(select)
        self.precision = precision
        self.channels_last = channels_last
        self.tolerance = tolerance
        self.check_every_n_calls = check_every_n_calls
        self.backend = backend
        self.networks: list[Frozen] = []
        self._told: set[str] = set()
        self._loader = 0

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        register(pl_module)  # a pruned checkpoint loads here too
        if stage == "fit":
            raise Unsupported(
                "frozen networks cannot learn",
                "FrozenPredict in the callbacks of a fit",
                "give it to a Trainer that predicts, tests or validates",
            )
        check(self.backend, None)

    @override
    @contextmanager
    def effect(self, context: Context) -> Iterator[None]:
        self._told, self._loader = set(), 0
        with frozen(
            context.module,
            select=self.select,
            precision=self.precision,
            channels_last=self.channels_last,
            tolerance=self.tolerance,
            check_every_n_calls=self.check_every_n_calls,
            itself=False,
            backend=self.backend,
        ) as self.networks:
            yield

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if any(isinstance(p, DTensor) for p in pl_module.parameters()):
            raise Unsupported(
                "frozen networks hold whole weights, and this strategy gives each process a shard",
                type(trainer.strategy).__name__,
                "evaluate with strategy='ddp' or in one process, where the module and its files are whole",
            )
        self._enter_anew(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.leave(trainer)
        self._tell()

    on_test_end = on_predict_end = on_validation_end

    @override
    def on_evaluation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, dataloader_idx: int
    ) -> None:
        for network in self.networks:
            network.renew()
            if dataloader_idx != self._loader:
                network.check()
        self._loader = dataloader_idx

    @override
    def on_evaluation_batch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._prove()

    def _prove(self) -> None:
        if not any(network.num_calls for network in self.networks):
            names = ", ".join(f"`{network.name}`" for network in self.networks)
            raise NoEffect(
                f"freezing {names} had no effect",
                "the first batch did not call it as a module in evaluation and without gradients",
                "select the modules that are called, or leave FrozenPredict out",
            )
        for network in self.networks:
            if network.reason and network.name not in self._told:
                self._told.add(network.name)
                rank_zero_warn(
                    explain(
                        f"`{network.name}` runs as it is, not frozen",
                        network.reason,
                        network.advice,
                    )
                )

    def _tell(self) -> None:
        for network in self.networks:
            if network.error is not None:
                rank_zero_info(
                    f"FrozenPredict: `{network.name}` was off by {network.error:.2g}; "
                    f"{network.num_missed} of {network.num_calls} calls were of another size"
                )
            slowdown = network.costs.slowdown()
            if not network.reason and slowdown is not None and slowdown > _SLOWER:
                rank_zero_warn(
                    explain(
                        f"`{network.name}` was slower frozen than it is",
                        f"{slowdown:.2f}x as long by the shortest of {network.costs.num_pairs} calls of each",
                        "leave it out by `select=Select(exclude=...)`, or predict in larger batches",
                    )
                )
