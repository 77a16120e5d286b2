"""DDP with what Lightning's leaves to its user: unused weights, short gradients on any backend, and uneven batches."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor
from torch.nn import Module
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.arguments import flag, one_of
from lightning_accel.errors import AccelError, explain
from lightning_accel.exact import widest
from lightning_accel.parallel.backends import backend_of
from lightning_accel.parallel.callbacks.rank_watch import watch_ranks
from lightning_accel.parallel.compress import compress
from lightning_accel.parallel.data_order import keep_order
from lightning_accel.parallel.meta import refuse_loose, refuse_meta
from lightning_accel.parallel.restarts import begin_group
from lightning_accel.parallel.strategies.meta_start import left_on_meta
from lightning_accel.parallel.trial_steps import uses_of_fit

Compression = Literal["bf16", "fp16"]


class AccelDDPStrategy(DDPStrategy):
    """Average gradients over processes that each hold the whole module.

    Over Lightning's `DDPStrategy`: weights that some step does not use are found by steps on a copy, so that no error of
    unused parameters ends the fit and nobody searches for them where there are none; gradients may travel in 16 bits
    on any device and backend; and processes with unlike numbers of rows may count by rows.

    Args:
        find_unused_parameters: "auto" tries two batches per process; `True` and `False` as in `DistributedDataParallel`.
        compression: "bf16" or "fp16": the format in which gradients are sent; sums are of that format too.
        weigh_rows: Count each row of all batches once, as one process does, where the last batch of a process is
            shorter: one more number per step is sent. Needs a loss that is a mean over the rows of its batch.
        gradient_as_bucket_view: As in `DistributedDataParallel`: no second copy of gradients.
        kwargs: As in Lightning's `DDPStrategy`.

    Raises:
        ValueError: An argument is out of range.
        TypeError: An argument is of another type.

    >>> AccelDDPStrategy(compression="bf16").compression
    'bf16'
    """

    def __init__(
        self,
        *,
        find_unused_parameters: Literal["auto"] | bool = "auto",
        compression: Compression | None = None,
        weigh_rows: bool = False,
        gradient_as_bucket_view: bool = True,
        **kwargs: Any,
    ) -> None:
        if unknown := set(kwargs) - _known():
            raise TypeError(
                explain(
                    "AccelDDPStrategy got an unexpected keyword argument",
                    ", ".join(sorted(unknown)),
                    "pass those of `DDPStrategy` and of `DistributedDataParallel`",
                )
            )
        flag("gradient_as_bucket_view", gradient_as_bucket_view)
        super().__init__(gradient_as_bucket_view=gradient_as_bucket_view, **kwargs)
        if find_unused_parameters != "auto":
            flag("find_unused_parameters", find_unused_parameters)
        self.find_unused_parameters = find_unused_parameters
        self.compression = one_of("compression", compression, ("bf16", "fp16"), none=True)
        self.weigh_rows = flag("weigh_rows", weigh_rows)
        self._known: LightningModule | None = None
        self._weight: Tensor | None = None

    @override
    def setup_environment(self) -> None:
        begin_group(self)
        super().setup_environment()
        assert self.lightning_module is not None
        keep_order(self.lightning_module.trainer)
        watch_ranks(self.lightning_module.trainer)

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        refuse_meta(self.lightning_module)
        refuse_loose(self.lightning_module)
        super().setup(trainer)

    @override
    def teardown(self) -> None:
        with left_on_meta(self):
            super().teardown()

    @override
    def _get_process_group_backend(self) -> str:
        return self._process_group_backend or backend_of(self.root_device)

    @override
    def _setup_model(self, model: Module) -> DistributedDataParallel:
        device = self.root_device
        if device.type in ("cpu", "cuda"):
            return super()._setup_model(model)
        # Lightning 2.6.6 opens a stream of CUDA on every other device too
        return DistributedDataParallel(model, device_ids=[device.index], **self._ddp_kwargs)

    @override
    def configure_ddp(self) -> None:
        root = self.lightning_module
        assert root is not None
        if self._known is not root:  # an edit wraps anew, and knows
            self._known = root
            self._ddp_kwargs["find_unused_parameters"] = self._finds(root)
        super().configure_ddp()
        if self.compression is not None:
            assert isinstance(self.model, DistributedDataParallel)
            dtype = torch.bfloat16 if self.compression == "bf16" else torch.float16
            self.model.register_comm_hook(dtype, compress)

    def _finds(self, root: LightningModule) -> bool:
        if self.find_unused_parameters != "auto":
            return bool(self.find_unused_parameters)
        if not root.automatic_optimization:  # each backward may be of other weights
            return True
        uses = uses_of_fit(root.trainer, root)
        learns = {name for name, p in root.named_parameters() if p.requires_grad}
        unused = sorted(learns.intersection(uses.unsteady() if uses else learns))
        if unused and uses:
            rank_zero_info(f"Not every step uses `{unused[0]}`: DDP looks for unused weights.")
        return bool(unused)

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.weigh_rows:
            self._weight = self._share(args[0] if args else next(iter(kwargs.values())))
        return super().training_step(*args, **kwargs)

    def _share(self, batch: Any) -> Tensor:
        """Return the rows of this process by the mean of all, in this step."""
        rows = torch.tensor(
            extract_batch_size(batch), dtype=widest(self.root_device), device=self.root_device
        )
        total = rows.clone()
        dist.all_reduce(total)
        return rows * self.world_size / total

    @override
    def backward(
        self, closure_loss: Tensor, optimizer: Optimizer | None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if self._weight is not None:
            root = self.lightning_module
            if root is not None and not root.automatic_optimization:
                raise AccelError(
                    "rows are weighed in one loss per batch",
                    "manual optimization with weigh_rows=True",
                    "weigh the losses in `training_step`, and leave `weigh_rows` out",
                )
            closure_loss = closure_loss * self._weight.to(closure_loss.dtype)
        return super().backward(closure_loss, optimizer, *args, **kwargs)


def _known() -> set[str]:
    """Return the arguments that Lightning's strategy takes, and those that it hands to torch."""
    both = (DDPStrategy.__init__, DistributedDataParallel.__init__)
    return {name for method in both for name in inspect.signature(method).parameters}
