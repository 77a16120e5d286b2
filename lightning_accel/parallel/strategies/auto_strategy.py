"""The strategy that a plan of memory chooses, once the module and its data are there and before they are on a device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_accel.arguments import whole
from lightning_accel.errors import explain
from lightning_accel.hardware import memory_of
from lightning_accel.parallel import folders
from lightning_accel.parallel.choice import (
    NODE,
    ROOM,
    Tried,
    amount,
    needs,
    options,
    reason,
    size,
    tried,
)
from lightning_accel.parallel.fit_workload import workload_of
from lightning_accel.parallel.meta import on_meta
from lightning_accel.parallel.planning import Option, processes
from lightning_accel.parallel.strategies.accel_ddp_strategy import AccelDDPStrategy
from lightning_accel.parallel.strategies.fsdp2_strategy import FSDP2Strategy
from lightning_accel.parallel.strategies.meta_start import SeesMeta
from lightning_accel.parallel.strategies.one_device import OneDevice
from lightning_accel.parallel.trial_steps import uses_of_fit
from lightning_accel.surgery.preserve import preserve_rng

_STATES = 4
"""Weights, gradients and two optimizer states, where no step can be planned; as much again is left for activations."""


class AutoStrategy(SeesMeta, AccelDDPStrategy):
    """Choose copies (`accel_ddp`) where they fit into the devices' memory, else shards (`accel_fsdp`).

    With one device it is Lightning's own for that, at once. With several it is DDP until all edits of the module are done
    and weights are loaded; then the first process plans a step on tensors without numbers, and tells in one line what was
    chosen and why. From there on the Trainer has the chosen strategy, as if it had been named. What would change the
    training is recommended and not done: `ActivationCheckpointing()` where activations are what does not fit, and split
    layers, whose processes share their batches.

    What relies on whole weights (masks, `AutoTune` and others that refuse shards) lets it stay with copies, which is told.

    Args:
        memory: Of each device, as bytes or "80GiB"; "auto" asks the device, and divides that of a host by its processes.
        process_group_backend: As in Lightning's strategies.
        timeout: As in Lightning's strategies.

    Raises:
        ValueError: `memory` is no size.
        TypeError: It is of another type.

    >>> AutoStrategy(memory="80GiB").memory == 80 * 2**30
    True
    """

    def __init__(
        self,
        *,
        memory: int | str = "auto",
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        self._given: dict[str, Any] = {
            "process_group_backend": process_group_backend,
            "timeout": timeout,
        }
        super().__init__(**self._given)
        known = memory if memory == "auto" or not isinstance(memory, str) else size(memory)
        self.memory: int | None = (
            None if known == "auto" else whole("memory", known, do="pass 'auto', or '80GiB'")
        )
        self.chosen: Option | None = None
        """What was chosen last."""
        self.why = ""
        """The reason."""
        self._folder: Path | None = None
        self._late: Any = None
        self._relied_on = False
        self._fitted = False

    # ---- until there is a choice

    def stay_whole(self) -> None:
        """Note that somebody relies on whole weights from here on."""
        self._relied_on = True

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Let every process hold the whole module within, as it does until there is a choice."""
        yield

    @property
    def _count(self) -> int:
        return self.num_processes * self.num_nodes

    @override
    def _configure_launcher(self) -> None:
        if self._count > 1:  # one device needs none, and goes in a notebook
            super()._configure_launcher()

    @override
    def connect(self, model: LightningModule) -> None:
        super().connect(model)
        self._relied_on, self._folder, self._late = False, None, None

    @override
    def setup_environment(self) -> None:
        if self._count > 1:
            super().setup_environment()
            return
        self.chosen = Option("single")
        rank_zero_info("accel_auto: one device, and nothing to choose.")
        self._hand_over(OneDevice(self.root_device))

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        """Let layers of `configure_model` be made in host memory, as strategies that shard do."""
        with self.precision_plugin.tensor_init_context():
            yield

    @override
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        path = Path(self.broadcast(checkpoint_path))
        if folders.is_folder(path):  # read by shards, as soon as there are some
            self._folder = path
            return folders.values(path)
        return super().load_checkpoint(checkpoint_path, weights_only)

    @override
    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        root = self.lightning_module
        if self._folder is None and root is not None and on_meta(root):
            self._late = checkpoint, strict
        elif self._folder is None:
            super().load_model_state_dict(checkpoint, strict)

    # ---- the choice

    @override
    def setup(self, trainer: Trainer) -> None:
        self._fitted = trainer.state.fn == TrainerFn.FITTING
        with preserve_rng():
            self.chosen, self.why = self._choose(trainer)
        name = f"accel_{self.chosen.strategy} on {self._count} devices"
        rank_zero_info(f"accel_auto: {name}: {self.why}.")
        if self.chosen.strategy == "ddp":
            super().setup(trainer)
            return
        kept: Any = "sharded" if self._folder is not None else "whole"
        strategy = FSDP2Strategy(checkpoints=kept, **self._given)
        strategy._folder, strategy._late = self._folder, self._late
        strategy._meta = self._meta
        self._late = None
        with preserve_rng():  # its seeds were set when this strategy began
            self._hand_over(strategy)
        strategy.setup(trainer)

    def _hand_over(self, strategy: Any) -> None:
        """Put another strategy into the Trainer, in the middle of its setup."""
        root = self.lightning_module
        assert root is not None
        strategy._accelerator, strategy._checkpoint_io = self._accelerator, self._checkpoint_io
        strategy._precision_plugin, strategy._launcher = self._precision_plugin, self._launcher
        if not isinstance(strategy, SingleDeviceStrategy):
            strategy.parallel_devices = self.parallel_devices
            strategy.cluster_environment = self.cluster_environment
            strategy.num_nodes, strategy._layer_sync = self.num_nodes, self._layer_sync
            vars(strategy)["connect"] = partial(self._connect_again, strategy)
        root.trainer._accelerator_connector.strategy = strategy
        Strategy.connect(strategy, root)
        strategy.setup_environment()

    def _connect_again(self, strategy: Strategy, model: LightningModule) -> None:
        """Begin another run: with what was chosen, or for another module, or a first fit, with a choice."""
        fits = model.trainer.state.fn == TrainerFn.FITTING
        if model is self.lightning_module and (self._fitted or not fits):
            Strategy.connect(strategy, model)
            return
        model.trainer._accelerator_connector.strategy = self
        self.connect(model)

    def _choose(self, trainer: Trainer) -> tuple[Option, str]:
        """Return the way to train and the reason, the same on all processes."""
        root = self.lightning_module
        assert root is not None
        memory = self._memory()
        if self._folder is not None:
            return Option("fsdp", self._count), "it goes on from a folder of shards"
        if on_meta(root):
            return Option("fsdp", self._count), "weights are on the meta device"
        if self._relied_on:
            return Option("ddp", self._count), "a callback relies on whole weights"
        if not memory:
            return Option("ddp", self._count), "the device does not say how much memory it has"
        failed = ""
        if self._fitted:
            found, failed = self._planned(trainer, root, memory)
            if found:
                return self._best(found, memory)
        return self._by_weights(root, memory, failed)

    def _memory(self) -> int:
        """Return the bytes of the smallest device; 0 where one does not say."""
        own = self.memory
        if own is None:
            own = memory_of(self.root_device)
            own //= self.num_processes if self.root_device.type == "cpu" else 1
        everywhere: list[int] = [0] * self._count
        dist.all_gather_object(everywhere, own)
        return min(everywhere)

    def _planned(
        self, trainer: Trainer, root: LightningModule, memory: int
    ) -> tuple[list[Tried], str]:
        """Return what was looked at until something fits; nothing, and why, where no step can be planned."""
        found: list[Tried] = []
        uses = None
        trainer.fit_loop.setup_data()  # which the fit itself does next, and then finds done
        for option in options(self._count):
            if option.tensor > min(NODE, self.num_processes):
                continue
            if option.strategy != "ddp" and uses is None:
                uses = uses_of_fit(trainer, root)
            one, failed = self._looked_at(trainer, root, option, memory, uses)
            if failed:
                return [], failed
            found.append(one)
            if one.fits and _is_ours(option):
                break
        return found, ""

    def _looked_at(
        self, trainer: Trainer, root: LightningModule, option: Option, memory: int, uses: Any
    ) -> tuple[Any, str]:
        """Plan on the first process; the others hear of it."""
        told: list[Any] = [None, ""]
        if self.is_global_zero:
            try:
                with workload_of(trainer, root) as work:
                    told[0] = tried(work._replace(uses=uses), option, memory)
                if told[0].estimate is None and option.strategy == "ddp":
                    told[1] = told[0].why
            except Exception as error:  # whatever a user's step does with tensors that hold nothing
                told[1] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        else:
            with processes(option):
                pass
        dist.broadcast_object_list(told)
        return told[0], told[1]

    def _best(self, found: list[Tried], memory: int) -> tuple[Option, str]:
        """Return the first that fits as the training is, and recommend what would fit before that."""
        fits = [one for one in found if one.fits]
        ours = [one for one in fits if _is_ours(one.option)]
        if fits[:1] != ours[:1] or not fits:
            what = "copies do not fit as they are" if ours else "no strategy fits as it is"
            rank_zero_warn(explain(what, f"{amount(memory)} per device", _advice(fits)))
        shards = [one for one in found if one.option.strategy == "fsdp"]
        chosen = (ours or shards)[0]
        return chosen.option, reason(found, chosen, memory)

    def _by_weights(self, root: LightningModule, memory: int, failed: str) -> tuple[Option, str]:
        """Choose by the size of the weights: for evaluation, and for steps that cannot be planned."""
        weights = sum(p.numel() * p.element_size() for p in root.parameters())
        need = weights * (2 * _STATES if self._fitted else 2)
        name = "ddp" if need <= memory * ROOM else "fsdp"
        why = f"weights are {amount(weights)}, and {amount(memory)} are there"
        if failed:
            failed = failed.partition(" Do: ")[0]
            why = f"no step could be planned ({failed}), so its weights decide: {why}"
        return Option(name, self._count), why


def _is_ours(option: Option) -> bool:
    """Whether an option is one to choose without being asked: it trains as the user's script says."""
    return not option.checkpointing and option.tensor == 1


def _advice(fits: list[Tried]) -> str:
    if not fits:
        return "use more devices, or smaller batches"
    option = fits[0].option
    does = ["add ActivationCheckpointing() to the callbacks"] if option.checkpointing else []
    if option.tensor > 1:
        does.append(
            f"pass TensorParallelStrategy(tensor_parallel_size={option.tensor}), whose processes share their batches"
        )
    return f"{' and '.join(does)}: {needs(fits[0])}"
