"""What people report of tensor parallelism elsewhere, put on ours: `tensor_strangers.py FOLDER`; a JSON per rank.

Each function is named after its report, and returns numbers that should be 0.
"""

from __future__ import annotations

import os
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from results import write_results
from sharded import GPT, Adam, apart, data, made, trainer, weights
from split import Heads, ReadsWidth, Split
from torch import Tensor, nn

from lightning_accel.parallel.sharding import norm
from lightning_accel.strategies import TensorParallelStrategy

warnings.simplefilter("ignore")
torch.set_num_threads(1)
RANK = int(os.environ.get("LOCAL_RANK", "0"))
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
Found = dict[str, float]


def both(make: Any, **given: Any) -> float:
    """Return the largest difference between a fit alone and one in two processes."""
    one, two = made(make), made(make, 3 + 10 * RANK)
    trainer(devices=1, **given).fit(one, data(0, 1))
    trainer(devices=2, strategy=TensorParallelStrategy(), **given).fit(two, data(0, 1))
    return apart(weights(one), weights(two))


class Low(nn.Module):
    """A linear layer that rests, and a low-rank change of it that learns, which begins as nothing."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = nn.Linear(base.in_features, 2, bias=False)
        self.b = nn.Linear(2, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.b(self.a(x))


class Adapters(Split):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.mlp[0], block.mlp[2] = Low(block.mlp[0]), Low(block.mlp[2])
            block.att.qkv, block.att.o = Low(block.att.qkv), Low(block.att.o)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def adapters_opacus_789() -> Found:
    """Low-rank adapters on split layers did not converge; one factor had a part of its gradient (mcore-bridge #173)."""
    return {"apart": both(Adapters)}


class Plain(GPT):
    """Two layers and an activation between."""

    def __init__(self) -> None:
        super().__init__(depth=0)
        self.net = nn.Sequential(nn.Linear(8, 32), nn.GELU("tanh"), nn.Linear(32, 8))

    def embed(self, tokens: Tensor) -> Tensor:
        return self.net(super().embed(tokens))


def two_layers_pytorch_144359() -> Found:
    """The output of two split layers was not that of whole ones."""
    return {"apart": both(Plain)}


def nanogpt_17() -> Found:
    """Splitting the MLP of nanoGPT ended in an error of clipping."""
    return {"apart": both(partial(Split, partial(ReadsWidth, 8, 4)), gradient_clip_val=0.05)}


def norm_counts_once_nemo_rl_3788() -> Found:
    """Weights that every process has were counted once per process in the norm of gradients."""
    found: Found = {}

    class Looks(Split):
        def __init__(self) -> None:
            super().__init__(partial(Heads, 8, 4, normed=True))
            self.norms: list[float] = []

    class OfStrategy(TensorParallelStrategy):
        def _clip_by_norm(self, optimizer: Any, clip_val: Any) -> None:
            split = self._split
            parts = {id(p) for n, p in split.model.named_parameters() if n in split.kept}
            split.model.norms.append(float(norm(split.model.parameters(), parts, self._across)))
            super()._clip_by_norm(optimizer, clip_val)

    one, two = made(Looks), made(Looks)

    class Alone(type(one)):  # type: ignore[misc]
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            self.norms.append(float(torch.stack([p.grad.norm() for p in self.parameters()]).norm()))

    one.__class__ = Alone
    trainer(devices=1, gradient_clip_val=0.05).fit(one, data(0, 1))
    trainer(devices=2, strategy=OfStrategy(), gradient_clip_val=0.05).fit(two, data(0, 1))
    found["norms"] = max(abs(a - b) for a, b in zip(one.norms, two.norms, strict=True))
    found["apart"] = apart(weights(one), weights(two))
    return found


class Gated(nn.Module):
    """Heads whose outputs go through one norm for all, and a gate (gated delta networks)."""

    def __init__(self) -> None:
        super().__init__()
        self.qkvg, self.o = nn.Linear(8, 4 * 8), nn.Linear(8, 8)
        self.out_norm = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v, g = self.qkvg(x).view(b, t, 4, -1, 2).unbind(2)
        y = F.scaled_dot_product_attention(
            *(p.transpose(1, 2) for p in (q, k, v)), is_causal=True
        ).transpose(1, 2)
        y = F.rms_norm(y, (2,)) * self.out_norm * g.sigmoid()
        return self.o(y.flatten(2))


def shared_norm_of_heads_megatron_7452() -> Found:
    """The gradient of a norm's weight that all heads share was one process's part."""
    return {
        "apart": both(lambda: Split(Gated)),
        "adam": both(lambda: Split(Gated), gradient_clip_val=0.05),
    }


def replicas_begin_alike_nemo_automodel_3822() -> Found:
    """Weights that every process has differed from the start, with other seeds."""
    return {"apart": both(Adam)}


def heads_do_not_divide_adaptthink_1() -> Found:
    """Three heads for two processes were refused (DeepSpeed #3634 too)."""
    return {"apart": both(partial(Split, partial(Heads, 8, 3)))}


def fewer_groups_than_processes_torchtitan_2577() -> Found:
    """One group of queries for two processes ended in a reshape of an empty tensor."""
    return {"apart": both(partial(Split, partial(Heads, 8, 4, groups=1)))}


def begins_as_alone_megatron_bridge_5840() -> Found:
    """Weights were drawn by the width of a part, so that results hung on the number of processes."""
    module = made(Split)
    before = weights(module)
    trainer(devices=2, strategy=TensorParallelStrategy(), max_epochs=0).fit(module, data(0, 1))
    return {"apart": apart(before, weights(module))}


def one_file_lightning_21357() -> Found:
    """A checkpoint of one file could not be loaded in a plain process."""
    path = FOLDER / "one.ckpt"
    module = made(Adam)
    ours = trainer(devices=2, strategy=TensorParallelStrategy())
    ours.fit(module, data(0, 1))
    ours.save_checkpoint(path)
    ours.strategy.barrier()
    return {"apart": apart(weights(module.float()), weights(Adam.load_from_checkpoint(path)))}


REPORTS = {
    f.__name__: f
    for f in (
        adapters_opacus_789, two_layers_pytorch_144359, nanogpt_17, norm_counts_once_nemo_rl_3788,
        shared_norm_of_heads_megatron_7452, replicas_begin_alike_nemo_automodel_3822, heads_do_not_divide_adaptthink_1,
        fewer_groups_than_processes_torchtitan_2577, begins_as_alone_megatron_bridge_5840, one_file_lightning_21357,
    )
}  # fmt: skip

if __name__ == "__main__":
    write_results(REPORTS, sys.argv[2:], FOLDER / f"{RANK}.json")
