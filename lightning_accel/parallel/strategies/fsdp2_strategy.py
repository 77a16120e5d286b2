"""FSDP2 for a LightningModule that knows nothing of it, in automatic and in manual optimization."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.optimizer import _optimizers_to_device
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import do_nothing_closure
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
)
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.arguments import flag, instance, one_of, whole
from lightning_accel.bridge.optimizers import optimizers_of
from lightning_accel.bridge.restore import averages
from lightning_accel.errors import Unsupported
from lightning_accel.parallel import folders, sharding
from lightning_accel.parallel.around_steps import AroundSteps
from lightning_accel.parallel.backends import backend_of
from lightning_accel.parallel.callbacks.rank_watch import watch_ranks
from lightning_accel.parallel.data_order import keep_order
from lightning_accel.parallel.meta import refuse_meta
from lightning_accel.parallel.restarts import begin_group
from lightning_accel.parallel.strategies.meta_start import SeesMeta, names_in, require_fillable
from lightning_accel.parallel.strategies.shard_files import ShardFiles
from lightning_accel.parallel.trial_steps import uses_of_fit
from lightning_accel.parallel.units import Units, check_units, find_units, given, perhaps_unused
from lightning_accel.parallel.uses import Uses

Checkpoints = Literal["whole", "sharded"]


class FSDP2Strategy(SeesMeta, ShardFiles):
    """Shard parameters, gradients and optimizer states of any LightningModule over all processes (FSDP2).

    The module stays as it is, with layers made in `__init__` or in `configure_model`. It is sharded once all edits of
    it are done and weights are loaded, before `configure_optimizers`. Units are found by structure and tried in a step
    on a copy: a module whose weights are read outside of its forward is gathered with the rest. Losses, weights and
    files are those of one process that sees the batches of all. After a run each process has the whole module in host
    memory again, as after any other strategy; with `checkpoints="sharded"` it stays sharded.

    Args:
        units: "auto", or names of the modules that are gathered by themselves; none of them is all at once.
        reshard_after_forward: Let go of a unit after its forward, and gather it again for backward: less memory.
        replicas: Number of copies; each is sharded over an equal share of the processes (HSDP).
        checkpoints: "whole" is one file as of one process; "sharded" is a folder with a file per process.
        sync_every_batch: With accumulation, average gradients of every batch: more traffic, less memory.
        broadcast_buffers: Give all processes the first one's buffers before a step, as DDP does.
        cpu_offload: Keep shards in host memory.
        mp_policy: Number formats of gathered weights and of sums, for `fully_shard`.
        process_group_backend: As in Lightning's strategies.
        timeout: As in Lightning's strategies.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is of another type.

    >>> from lightning.pytorch import Trainer
    >>> Trainer(accelerator="cpu", devices=1, strategy=FSDP2Strategy(), logger=False).strategy.units
    'auto'
    """

    def __init__(
        self,
        *,
        units: Literal["auto"] | Sequence[str] = "auto",
        reshard_after_forward: bool = True,
        replicas: int = 1,
        checkpoints: Checkpoints = "whole",
        sync_every_batch: bool = False,
        broadcast_buffers: bool = True,
        cpu_offload: bool = False,
        mp_policy: MixedPrecisionPolicy | None = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        one_of("checkpoints", checkpoints, ("whole", "sharded"))
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=checkpoints == "sharded",
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.units = check_units(units)
        self.reshard_after_forward = flag("reshard_after_forward", reshard_after_forward)
        self.replicas = whole(
            "replicas", replicas, do="pass 1, or a number that divides the processes"
        )
        self.sync_every_batch = flag("sync_every_batch", sync_every_batch)
        self.broadcast_buffers = flag("broadcast_buffers", broadcast_buffers)
        self.cpu_offload = flag("cpu_offload", cpu_offload)
        kind = "of torch.distributed.fsdp"
        do = f"pass a MixedPrecisionPolicy {kind}"
        self.mp_policy = instance("mp_policy", mp_policy, MixedPrecisionPolicy, kind, do, none=True)
        self.found = Units((), {})
        self._sharded = sharding.Sharded((), ())
        self._buffers: tuple[str, ...] = ()
        self._unsteady: list[str] = []
        self._around: AroundSteps | None = None
        self._written: tuple[str, ...] = ()
        self._moved: list[tuple[torch.nn.Parameter, torch.nn.Parameter]] = []
        self._folder: Path | None = None  # of shards that this run goes on from
        self._late: tuple[Mapping[str, Any], bool] | None = (
            None  # for weights that are not there yet
        )
        self._fills = (
            True  # whether `reset_parameters` gives weights that are on meta their numbers
        )
        self._sends = True  # whether the next backward sums gradients over processes

    # ---- processes

    @override
    def setup_environment(self) -> None:
        count = self.num_processes * self.num_nodes
        self._data_parallel_size = count // self._tensor_parallel_size  # type: ignore[operator]
        if count % self.replicas:
            raise ValueError(
                f"{count} processes make no {self.replicas} equal copies. Found: "
                f"replicas={self.replicas}. Do: pass a number that divides the processes."
            )
        begin_group(self)
        super().setup_environment()
        assert self.lightning_module is not None
        keep_order(self.lightning_module.trainer)
        watch_ranks(self.lightning_module.trainer)

    @property
    def mesh(self) -> DeviceMesh:
        """The processes, over which is sharded: one dimension, or copies by shards."""
        if self.replicas == 1:
            return self.device_mesh["data_parallel"]
        size = (self.replicas, self.world_size // self.replicas)
        return init_device_mesh(self.root_device.type, size, mesh_dim_names=("replicate", "shard"))

    @property
    def _shards(self) -> bool:
        """Whether there are several processes to shard over."""
        return True

    @property
    def _group(self) -> Any:
        return self.device_mesh["data_parallel"].get_group()

    @override
    def _get_process_group_backend(self) -> str:
        if self.cpu_offload and self.root_device.type == "cuda" and not self._process_group_backend:
            return "cuda:nccl,cpu:gloo"  # shards live on the host, and are made whole there
        return self._process_group_backend or backend_of(self.root_device)

    @override
    def model_to_device(self) -> None:
        """Move what is no shard: `fully_shard` placed those, and `Module.to` would make other objects of them."""
        assert self.model is not None
        sharding.place_rest(self.model, self.root_device, parameters=not self.cpu_offload)

    # ---- sharding

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.model is not None and self.accelerator is not None
        self.accelerator.setup(trainer)
        self.model = self.precision_plugin.convert_module(self.model)
        if self._layer_sync is not None:
            self.model = self._layer_sync.apply(self.model)
        self._shard(trainer)
        self.barrier()
        fits = trainer.state.fn == TrainerFn.FITTING
        if fits:
            self.setup_optimizers(trainer)
            for one in self.optimizers:  # one that was made before, or of a list that was
                sharding.move_optimizer(one, self._moved)
            self._moved = []
        self.setup_precision_plugin()
        if fits:
            _optimizers_to_device(self.optimizers, self.root_device)

    def _shard(self, trainer: Trainer) -> None:
        root = self.lightning_module
        assert isinstance(root, LightningModule)
        if not self._is_apart(root):
            sharding.require_alike(root)
            self._refuse_averages_in_folders(trainer)
            if self._tensor_parallel_size != 1 or len(self._all(trainer)) > 1:
                refuse_meta(root)
            self._fills = require_fillable(root, self._meta, self._given(root))
            sharding.equalise(root, self.root_device)
            self._choose(root, uses_of_fit(trainer, root) if self._shards else None)
            before = dict(root.named_parameters())
            sharding.refuse_hooks(before)
            self._shard_all(trainer)
            after = dict(root.named_parameters())
            self._moved = [(old, after[name]) for name, old in before.items()]
            self._tell()
        self._stand_around(trainer)
        if self._folder is not None:
            folders.load_model(root, self._folder)
        if (late := self._late) is not None:
            self._late = None
            self.load_model_state_dict(*late)

    def _refuse_averages_in_folders(self, trainer: Trainer) -> None:
        if self._save_distributed_checkpoint and len(self._all(trainer)) > 1:
            raise Unsupported(
                "a folder of shards holds the module's weights alone",
                "a callback that keeps an average of them",
                'pass checkpoints="whole", or leave the average out',
            )

    def _given(self, root: LightningModule) -> set[str]:
        """Return the names of what a checkpoint will fill."""
        if self._folder is not None:
            return set(root.state_dict())
        return names_in(*self._late, root) if self._late else set()

    def _is_apart(self, root: LightningModule) -> bool:
        """Whether this process has a part of the module only."""
        return sharding.is_sharded(root)

    def _choose(self, root: LightningModule, uses: Uses | None) -> None:
        """Decide which modules are units, and what is looked after beside them."""
        names = self.units
        self.found = find_units(root, uses) if isinstance(names, str) else given(root, names)
        self._buffers = tuple(name for name, _ in root.named_buffers())
        self._unsteady = perhaps_unused(root, uses, self.found)
        self._written = tuple(uses.written) if uses else ()

    def _shard_all(self, trainer: Trainer) -> None:
        """Shard the module and its averages."""
        for model in self._all(trainer):
            self._sharded = self._shard_one(model)
        self.model_to_device()

    @staticmethod
    def _all(trainer: Any) -> list[torch.nn.Module]:
        """Return the module, and the averages of it that callbacks keep."""
        root = trainer.lightning_module
        return [root, *averages(trainer.callbacks, root)]

    def _stand_around(self, trainer: Trainer) -> None:
        """Put around the module's steps, backward and clipping what sharding needs."""
        root = self.lightning_module
        assert root is not None
        self._around = AroundSteps(
            root,
            self.found.names,
            whole=self._sharded.whole,
            written=[n for n in self._written if n not in self._sharded.whole],
            unsteady=self._unsteady,
            group=self._group,
            fits=trainer.state.fn == TrainerFn.FITTING,
        )
        if self._sharded.whole:  # torch cannot clip shards and whole gradients together
            vars(self.precision_plugin)["clip_grad_by_norm"] = self._clip_by_norm

    def _stand_back(self) -> bool:
        """Take off what stands around the steps; whether that included toggles."""
        toggles = self._around is not None and self._around.toggles
        if self._around is not None:
            self._around.leave()
            self._around = None
        vars(self.precision_plugin).pop("clip_grad_by_norm", None)
        return toggles

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Let every process hold the whole module within, averages and optimizer states too; then shard anew.

        For what changes shapes or looks at the whole, at a step boundary: memory must hold all of it for a while.
        """
        root = self.lightning_module
        if root is None or not sharding.is_sharded(root):
            yield
            return
        trainer, toggles = root.trainer, self._stand_back()
        pairs, *_ = [list(sharding.unshard(model).values()) for model in self._all(trainer)]
        for optimizer in optimizers_of(trainer, root):
            sharding.move_optimizer(optimizer, pairs)
        yield  # an error ends the fit: it may be of this process alone, and the others would wait
        before = dict(root.named_parameters(remove_duplicate=False))
        optimizers = optimizers_of(trainer, root)
        modules = dict(root.named_modules())
        self.found = self.found._replace(names=tuple(n for n in self.found.names if n in modules))
        self._unsteady = [n for n in self._unsteady if n in before]
        self._written = tuple(n for n in self._written if n in before)
        self._shard_all(trainer)
        after = dict(root.named_parameters(remove_duplicate=False))
        for name, old in before.items():
            sharding.spread_gradient(old, after[name])
        for optimizer in optimizers:
            sharding.move_optimizer(optimizer, [(before[n], after[n]) for n in before])
        self._stand_around(trainer)
        if toggles and self._around is not None:
            self._around.begin()

    def _shard_one(self, model: torch.nn.Module) -> sharding.Sharded:
        make = partial(sharding.make, device=self.root_device, fills=self._fills)
        offload = CPUOffloadPolicy(pin_memory=self.root_device.type != "cpu")
        return sharding.shard(
            model,
            self.found.names,
            self.mesh,
            reshard_after_forward=self.reshard_after_forward,
            mp_policy=self.mp_policy,
            offload_policy=offload if self.cpu_offload else OffloadPolicy(),
            before=make,
        )

    def _tell(self) -> None:
        for line in self.found.told(self.world_size):
            rank_zero_info(line)

    # ---- steps

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        if self._around is not None:
            self._around.begin()

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._begin()
        return super().training_step(*args, **kwargs)

    @override
    def on_validation_start(self) -> None:
        super().on_validation_start()
        self._begin()

    def _begin(self) -> None:
        """Begin a step, or a loop of steps, from the first process's buffers and the shards as they are."""
        root = self.lightning_module
        if root is not None and self.broadcast_buffers and self._buffers:
            sharding.broadcast_buffers([root.get_buffer(n) for n in self._buffers], self._group)
        if self._around is not None:
            self._around.refresh()

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        root: Any = self.lightning_module
        if self.sync_every_batch or not isinstance(root, FSDPModule):
            yield
            return
        self._sends = sharding.send(root, False)
        try:
            yield
        finally:
            self._sends = sharding.send(root, True)

    @override
    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        assert self._around is not None
        closure_loss = self._around.before_backward(closure_loss)
        loss = super().backward(closure_loss, optimizer, *args, **kwargs)
        self._around.after_backward(sends=self._sends)
        return loss

    @override
    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        assert self._around is not None
        by_hand = args[0] if args else kwargs.get("closure")
        root = self.lightning_module
        automatic = root is not None and root.automatic_optimization
        self._around.before_step(closes=automatic or by_hand is not do_nothing_closure)
        result = super().optimizer_step(optimizer, *args, **kwargs)
        self._around.after_step()
        return result

    def _clip_by_norm(self, optimizer: Optimizer, clip_val: int | float) -> None:
        if clip_val > 0:
            sharding.clip_by_norm(self.precision_plugin.main_params(optimizer), clip_val)

    # ---- the end

    @override
    def teardown(self) -> None:
        self._stand_back()
        root = self.lightning_module
        if root is not None and root.trainer.state.status != TrainerStatus.INTERRUPTED:
            self._make_whole(root)
        super().teardown()

    def _make_whole(self, root: LightningModule) -> None:
        """Give every process the whole module in host memory; one that failed alone would wait for ever."""
        if sharding.is_sharded(root) and not self._save_distributed_checkpoint:
            for model in self._all(root.trainer):
                sharding.unshard(model, host=True)
            root.cpu()
