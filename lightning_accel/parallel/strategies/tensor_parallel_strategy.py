"""Tensor parallelism for a LightningModule that knows nothing of it, alone or within FSDP2."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import override

from lightning_accel.arguments import whole
from lightning_accel.bridge.optimizers import optimizers_of
from lightning_accel.bridge.parts import parts_of
from lightning_accel.errors import Unsupported, explain
from lightning_accel.parallel import sharding
from lightning_accel.parallel.strategies.fsdp2_strategy import FSDP2Strategy
from lightning_accel.parallel.tensor import files
from lightning_accel.parallel.tensor.around_tensor import AroundTensor, same_batch, set_group
from lightning_accel.parallel.tensor.elementwise import require_elementwise
from lightning_accel.parallel.tensor.plan import TensorPlan, plan_tensor
from lightning_accel.parallel.tensor.proof import Proved, proved_plan
from lightning_accel.parallel.tensor.split import SplitModel
from lightning_accel.parallel.tensor.trial import (
    calls_of_run,
    copies,
    hooked_steps_of_run,
    steps_of_run,
    with_copies,
)
from lightning_accel.parallel.uses import Uses
from lightning_accel.surgery import Structure
from lightning_accel.surgery.call import Call


class TensorParallelStrategy(FSDP2Strategy):
    """Split the layers of any LightningModule over processes, and shard what each has over the others (FSDP2).

    No plan is written: a process computes with the network pruned to its own units, as the pruner's trace knows them
    (channels of an MLP, heads with their queries, keys and values, groups of queries), and the outputs of the layers that
    read them are summed. Before it trains, a step on a copy proves losses, gradients and weights equal to those of the
    whole network; what is not equal stays whole on every process. Files are those of one process.

    Args:
        tensor_parallel_size: Processes that share one network; "auto" is all of one node. They see the same batches; with
            more processes, those at the same place of each network shard their part (FSDP2).
        kwargs: As in `FSDP2Strategy`; `replicas` and "sharded" checkpoints are not supported.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is of another type.
        Unsupported: Copies or checkpoints of shards are asked for.

    >>> TensorParallelStrategy(tensor_parallel_size=2).plan is None
    True
    """

    def __init__(
        self, *, tensor_parallel_size: Literal["auto"] | int = "auto", **kwargs: Any
    ) -> None:
        for name, plain in (("replicas", 1), ("checkpoints", "whole")):
            if kwargs.get(name, plain) != plain:
                raise Unsupported(
                    f"tensor parallelism has no other `{name}` than {plain!r}",
                    repr(kwargs[name]),
                    "leave it out, or use `FSDP2Strategy`",
                )
        super().__init__(**kwargs)
        if tensor_parallel_size != "auto":
            whole("tensor_parallel_size", tensor_parallel_size)
        self._asked = tensor_parallel_size
        self._proved: Proved | None = None
        self._splits: list[SplitModel] = []
        self._named: tuple[SplitModel, list[dict[int, str]]] | None = None
        """How the module of this run is, or was, split, and the names of its optimizers' parameters."""
        self._calls: tuple[Call, ...] = ()
        self._metrics: list[Any] = []
        self._has_optimizers = False
        self._epoch: int | None = None

    @property
    def plan(self) -> TensorPlan | None:
        """What is split, once the strategy is set up."""
        return self._proved.plan if self._proved else None

    # ---- processes

    @override
    def setup_environment(self) -> None:
        size = self.num_processes if self._asked == "auto" else self._asked
        count = self.num_processes * self.num_nodes
        if count % size:
            raise ValueError(
                explain(
                    f"{count} processes make no whole number of networks of {size}",
                    f"tensor_parallel_size={size}",
                    "pass a number that divides the processes",
                )
            )
        self._tensor_parallel_size = size
        super().setup_environment()

    @property
    def _across(self) -> Any:
        """The processes that share one network."""
        return self.device_mesh["tensor_parallel"].get_group()

    @property
    @override
    def _shards(self) -> bool:
        return self.device_mesh["data_parallel"].size() > 1 or not self._is_split_at_all

    @property
    def _is_split_at_all(self) -> bool:
        """Whether there are several processes per network; with one, this is `FSDP2Strategy`."""
        return self.device_mesh["tensor_parallel"].size() > 1

    @property
    def _split(self) -> SplitModel | None:
        return self._splits[0] if self._splits else None

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduce over the processes that see other data: those that share a network have the same value."""
        return super().reduce(tensor, self._of_data(group), reduce_op)

    @override
    def all_gather(self, tensor: Tensor, group: Any = None, sync_grads: bool = False) -> Tensor:
        """Gather from the processes that see other data."""
        return super().all_gather(tensor, self._of_data(group), sync_grads)

    def _of_data(self, group: Any) -> Any:
        """Return a group, or where all processes are meant those that see other data."""
        return self._group if group in (None, dist.group.WORLD) else group

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        votes = torch.tensor(int(decision), device=self.root_device)
        dist.all_reduce(votes, dist.ReduceOp.MIN if all else dist.ReduceOp.MAX)
        return bool(votes)

    # ---- splitting

    @override
    def _is_apart(self, root: LightningModule) -> bool:
        return bool(self._splits) or super()._is_apart(root)

    @override
    def _choose(self, root: LightningModule, uses: Uses | None) -> None:
        super()._choose(root, uses)
        if not self._is_split_at_all:
            return
        self._calls = calls_of_run(root.trainer, root)
        same_batch([call[1:] for call in self._calls], self._across)
        self._prove(root)
        self._metrics = set_group(root, self._group)

    def _prove(self, root: LightningModule) -> None:
        """Plan for the shapes of now, and prove it on copies."""
        trainer = root.trainer
        self._proved = proved_plan(
            partial(self._planned, root),
            copies(trainer, root),
            steps_of_run(trainer, root, self._calls),
            self._across,
            later=hooked_steps_of_run(trainer, root),
        )
        self._refuse_hooks(root)

    def _refuse_hooks(self, root: LightningModule) -> None:
        """Raise where a module has hooks on gradients that are parts: no trial runs them."""
        assert self._proved is not None
        for name in sorted(self._proved.plan.layers | self._proved.inside):
            module = root.get_submodule(name)
            if module._backward_hooks or module._backward_pre_hooks:
                raise Unsupported(
                    "hooks on the gradients of layers that are split see one process's part",
                    f"`{name}` has one",
                    "take it off, or use `accel_fsdp`",
                )

    def _planned(self, root: LightningModule, without: Mapping[str, str]) -> TensorPlan:
        """Return the plan of the first process."""
        found: list[Any] = [None, None]
        if self.is_global_zero:
            try:
                size = self.device_mesh["tensor_parallel"].size()
                plan = plan_tensor(root, self._calls, size, without=without)
                found[0] = with_copies(plan, parts_of(root.trainer, root))
            except Exception as error:  # the others wait for it
                found[1] = error
        dist.broadcast_object_list(found)
        if found[1] is not None:
            raise found[1]
        return found[0]

    @override
    def _shard_all(self, trainer: Trainer) -> None:
        if self._is_split_at_all and not self._splits:
            fits = trainer.state.fn == TrainerFn.FITTING
            if fits:
                self.setup_optimizers(trainer)
            self._split_all(trainer)
            if fits:
                files.split_states(self.optimizers, self._splits[0])
        if self._shards:
            super()._shard_all(trainer)
        else:
            self._sharded = sharding.Sharded((), ())
            self.model_to_device()

    def _split_all(self, trainer: Trainer) -> None:
        assert self._proved is not None
        for model in self._all(trainer):
            hooks = model is self.lightning_module
            split = SplitModel(model, self._proved.plan, self._across, hooks=hooks)
            split.partial = self._proved.partial
            split.draws.regions = set(self._proved.draws)
            split.inside = set(self._proved.inside)
            self._splits.append(split)

    @override
    def _stand_around(self, trainer: Trainer) -> None:
        root, split = self.lightning_module, self._split
        if self._shards:
            super()._stand_around(trainer)
        if root is None or split is None:
            return
        self._around: Any = AroundTensor(root, split, self._across, self._around)
        vars(self.precision_plugin)["clip_grad_by_norm"] = self._clip_by_norm

    @override
    def _clip_by_norm(self, optimizer: Any, clip_val: int | float) -> None:
        if clip_val > 0 and self._split is not None:
            named = self._split.model.named_parameters()
            parts = {id(p) for n, p in named if n in self._split.kept}
            parameters = self.precision_plugin.main_params(optimizer)
            sharding.clip_by_norm(parameters, clip_val, parts, self._across)

    @override
    def _tell(self) -> None:
        if self._shards:
            super()._tell()
        if self.plan is not None:
            rank_zero_info(repr(self.plan))

    @override
    def setup(self, trainer: Trainer) -> None:
        self._has_optimizers = False
        super().setup(trainer)
        if trainer.state.fn == TrainerFn.FITTING and self._splits:
            for optimizer in self.optimizers:
                require_elementwise(optimizer)
            self._note_names()

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        if not self._has_optimizers:  # they are made while weights have their whole shapes
            super().setup_optimizers(trainer)
            self._has_optimizers = True

    def _note_names(self) -> None:
        split = self._splits[0]
        self._named = split, [files.names_of(split, optimizer) for optimizer in self.optimizers]

    def whole_structure(self, found: Structure) -> Structure:
        """Return sizes of the whole module in place of those of this process's part."""
        return self._splits[0].whole_structure(found) if self._splits else found

    @override
    def in_parts(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if (split := self._split) is not None:
            tensors = {name: split.part(name, value) for name, value in tensors.items()}
        return super().in_parts(tensors)

    @override
    def whole_tensor(self, name: str, value: Tensor) -> Tensor:
        full = super().whole_tensor(name, value)
        return full if self._split is None else self._split.whole(name, full)

    @contextmanager
    @override
    def gathered(self) -> Iterator[None]:
        root = self.lightning_module
        if root is None or not self._splits:
            with super().gathered():
                yield
            return
        with self._regathered(root.trainer):
            optimizers = optimizers_of(root.trainer, root)
            files.join_states(optimizers, self._splits[0])
            self._join()
            yield
            self._prove(root)
            self._split_all(root.trainer)
            files.split_states(optimizers, self._splits[0])

    @contextmanager
    def _regathered(self, trainer: Trainer) -> Iterator[None]:
        """Let this process's part be whole within, if it is sharded, and nothing stand around it."""
        if self._shards:
            with super().gathered():
                yield
        else:
            self._stand_back()
            yield
            self._stand_around(trainer)
            self._around.begin()
        self._note_names()

    def _join(self, *, host: bool = False) -> None:
        for split in self._splits:
            split.join(host=host)
        self._splits.clear()

    # ---- steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        if self._splits:
            if self._epoch != (epoch := self.lightning_module.trainer.current_epoch):
                self._around.begin_epoch(align=self._epoch is not None)
                self._epoch = epoch
            self._around.begin_step((args, kwargs))
        return super().training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._splits:
            self._around.begin_evaluation((args, kwargs))
        return super().validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        if self._splits:
            self._around.begin_evaluation((args, kwargs))
        return super().test_step(*args, **kwargs)

    # ---- files

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        if self._split is not None:
            state = files.parts_of_model(checkpoint["state_dict"], self._split)
            checkpoint = {**checkpoint, "state_dict": state}
        super().load_model_state_dict(checkpoint, strict)

    @override
    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        states = checkpoint["optimizer_states"]
        if (split := self._split) is not None:
            pairs = zip(states, self.optimizers, strict=False)
            states = [files.parts_of_optimizer(state, split, one) for state, one in pairs]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    @override
    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        if self._named is not None:  # after the run too, when optimizers alone are in parts
            split, names = self._named
            checkpoint = files.whole_checkpoint(checkpoint, split, names, keep=self.is_global_zero)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def _make_whole(self, root: LightningModule) -> None:
        for metric in self._metrics:
            metric.process_group = None
        super()._make_whole(root)
        if self._splits:
            self._join(host=True)
            root.cpu()
