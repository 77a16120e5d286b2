"""What could go silently wrong when processes share a network: `tensor_situations.py FOLDER [NAME ...]`; a JSON per rank.

Each function returns numbers that should be 0.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torchmetrics
from lightning.pytorch import Callback
from results import write_results
from sharded import GPT, apart, data, made, trainer, weights
from split import Heads, ReadsWidth, Split
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import lightning_accel as la
from lightning_accel.strategies import TensorParallelStrategy

warnings.simplefilter("ignore")
torch.set_num_threads(1)
RANK = int(os.environ.get("LOCAL_RANK", "0"))
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
Found = dict[str, float]


def fit(module: Any, *, alone: bool = False, rows: Any = None, **given: Any) -> Any:
    kind = {"devices": 1} if alone else {"devices": 2, "strategy": TensorParallelStrategy()}
    ours = trainer(**kind, **given)
    torch.manual_seed(7)
    ours.fit(module, data(0, 1) if rows is None else rows)
    return ours


def both(make: Callable[[], Any], **given: Any) -> float:
    """Return the largest difference of the two fits."""
    one, two = made(make), made(make)
    fit(one, alone=True, **given)
    fit(two, **given)
    return apart(weights(one), weights(two))


def refused(make: Callable[[], Any], words: str, **given: Any) -> float:
    """Return 0 if a fit ends in an error of ours with these words."""
    try:
        fit(made(make), **given)
    except la.errors.AccelError as error:
        print(error)
        return float(words not in str(error))
    return 1.0


def other_batches() -> Found:
    return {"refused": refused(GPT, "need the same batch", rows=data(RANK, 2))}


def samplers() -> Found:
    """Lightning's sampler, and one that the user made for all processes, give those that share a network the same rows."""
    rows = data(0, 1).dataset
    found: Found = {}
    for name, seed in {"made by the user": 5, "by Lightning": 0}.items():
        one, two = made(GPT), made(GPT)
        whole = DistributedSampler(rows, num_replicas=1, rank=0, seed=seed)
        fit(one, alone=True, rows=DataLoader(rows, 8, sampler=whole))
        mine = (
            {"sampler": DistributedSampler(rows, 2, RANK, seed=seed)} if seed else {"shuffle": True}
        )
        fit(two, rows=DataLoader(rows, 8, **mine), use_distributed_sampler=True)
        found[name] = apart(weights(one), weights(two))
    return found


def batches_by_rank() -> Found:
    """The first batch is the same, and from the second epoch on there are others."""

    class Later(GPT):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [b.roll(RANK * self.current_epoch, 0) for b in batch] if self._trainer else batch

    return {"refused": refused(Later, "need the same batch")}


class WholeNorms(torch.optim.SGD):
    """Steps as long as the weight (LARS)."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad * p.norm() / (p.grad.norm() + 1e-9), alpha=-group["lr"])
        return loss


def optimizers() -> Found:
    class Lars(GPT):
        optimizer = staticmethod(lambda p: WholeNorms(p, 0.05))

    class Factored(GPT):
        optimizer = staticmethod(lambda p: torch.optim.Adafactor(p, 0.05))

    class Many(GPT):
        optimizer = staticmethod(
            lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True)
        )

    return {
        "lars": refused(Lars, "step each number by itself"),
        "adafactor": refused(Factored, "step each number by itself"),
        "rmsprop": both(Many),
    }


class Drops(Split):
    """Dropout on what every process has, and between the layers that are split."""

    def __init__(self, *, outside: float, inside: float, attention: float = 0.0) -> None:
        super().__init__(partial(Heads, 8, 4, dropout=attention), partial(nn.Dropout, inside))
        self.drop = nn.Dropout(outside)

    def embed(self, tokens: Tensor) -> Tensor:
        return self.drop(super().embed(tokens))


class Masks(Callback):
    """Keeps what dropout let through between split layers."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        pl_module.blocks[0].mlp[1].register_forward_hook(
            lambda m, args, out: self.seen.append((out != 0).detach()) if m.training else None
        )


def dropout() -> Found:
    found = {"outside only": both(partial(Drops, outside=0.5, inside=0.0))}
    for name, given in {
        "hidden": {"inside": 0.5},
        "attention": {"inside": 0.0, "attention": 0.5},
    }.items():
        module, masks = made(partial(Drops, outside=0.3, **given)), Masks()
        fit(module, callbacks=[masks])
        mine = weights(module)
        theirs = [None, None]
        dist.all_gather_object(theirs, (mine, masks.seen[0]))
        found[f"{name}, processes"] = apart(theirs[0][0], theirs[1][0])
        if name == "hidden":
            found["masks are alike"] = float(torch.equal(theirs[0][1], theirs[1][1]))
        found[f"{name}, nothing learned"] = float(
            apart(mine, weights(made(partial(Drops, outside=0.3, **given)))) < 1e-3
        )
        again = made(partial(Drops, outside=0.3, **given))
        fit(again, callbacks=[la.ActivationCheckpointing()])
        found[f"{name}, recomputed"] = apart(mine, weights(again))
    return found


def random_by_rank() -> Found:
    class Noise(GPT):
        def embed(self, tokens: Tensor) -> Tensor:
            x = super().embed(tokens)
            noise = torch.randn(
                x.shape, generator=torch.Generator().manual_seed(self.global_rank), dtype=x.dtype
            )
            return x + noise

    return {"refused": refused(Noise, "Found")}


def clipped_by_hand() -> Found:
    """By the norm of one process's part: in a hook of the module, which is tried, and of a callback, which is not."""

    class Clips(GPT):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            nn.utils.clip_grad_norm_(self.parameters(), 0.01)

    class FromOutside(Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            nn.utils.clip_grad_norm_(pl_module.parameters(), 0.01)

    return {
        "module": refused(Clips, "in a hook of the module"),
        "callback": refused(GPT, "compute different gradients", callbacks=[FromOutside()]),
    }


def backward_by_hand() -> Found:
    class ByHand(Split):
        def __init__(self) -> None:
            super().__init__(partial(Heads, 8, 4, normed=True))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.loss(batch).backward()
            optimizer.step()

    return {"refused": refused(ByHand, "manual_backward")}


def precisions() -> Found:
    found = {}
    for precision, limit in {"bf16-mixed": 2e-2, "bf16-true": 5e-2, "32-true": 1e-5}.items():
        one, two = (made(Split).float() for _ in range(2))
        fit(one, alone=True, precision=precision)
        fit(two, precision=precision)
        found[precision] = max(apart(weights(one.float()), weights(two.float())) - limit, 0.0)
    one, two = (made(Split).float() for _ in range(2))
    for module, alone in ((one, True), (two, False)):
        fit(module, alone=alone, plugins=[la.AutocastPrecision("bf16-mixed")])
    found["AutocastPrecision"] = max(apart(weights(one), weights(two)) - 2e-2, 0.0)
    return found


def resumed_in_short_formats() -> Found:
    """A run that was interrupted goes on as one that was not, bit for bit, in the formats that round most."""
    found = {}
    for precision in ("bf16-mixed", "bf16-true"):
        make = lambda: made(lambda: Split(partial(Heads, 8, 4, normed=True, dropout=0.2))).float()  # noqa: E731
        whole, path = make(), FOLDER / f"{precision}.ckpt"
        fit(whole, precision=precision, max_epochs=2)
        first, second = make(), make()
        ours = fit(first, precision=precision, max_epochs=1)
        ours.save_checkpoint(path)
        state = torch.get_rng_state()
        ours.strategy.barrier()
        kind = {"devices": 2, "strategy": TensorParallelStrategy()}
        again = trainer(**kind, precision=precision, max_epochs=2)
        torch.set_rng_state(state)
        again.fit(second, data(0, 1), ckpt_path=path)
        found[precision] = apart(weights(whole.float()), weights(second.float()))
    return found


class Measures(GPT):
    """Logs sums and a metric that counts."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.mean = torchmetrics.SumMetric(), torchmetrics.MeanMetric()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        self.seen.update(len(batch[0]))
        self.mean.update(loss)
        self.log("seen", self.seen)
        self.log("mean", self.mean)
        self.log("sum", loss, sync_dist=True, reduce_fx="sum")
        self.gathered = self.all_gather(batch[0]).shape


def metrics() -> Found:
    """Rows count once, whatever they are summed by."""
    module, loader = made(Measures), data(0, 1)
    with torch.no_grad():
        losses = [float(module.loss(batch)) for batch in loader]
    ours = trainer(devices=2, strategy=TensorParallelStrategy())
    (values,) = ours.validate(module, loader, verbose=False)
    ours.fit(module, loader, loader)
    return {
        "seen": abs(values["seen"] - 32),
        "seen in a fit": abs(float(ours.callback_metrics["seen"]) - 32),
        "mean": abs(values["mean"] - sum(losses) / 4),
        "sum": abs(values["sum"] - sum(losses)),
        "gathered": float(module.gathered.numel() != 8 * 8),
        "group": float(module.seen.process_group is not None),
    }


def compiled() -> Found:
    kinds = {"reads its width": partial(Split, partial(ReadsWidth, 8, 4)), "fused": Split}
    callbacks = {
        "aot": lambda: la.BlockCompile(backend="aot_eager"), "checkpointing": la.ActivationCheckpointing,
    }  # fmt: skip
    return {
        f"{k}, {c}": both(make, callbacks=[call()])
        for k, make in kinds.items()
        for c, call in callbacks.items()
    }


def uneven() -> Found:
    """Three heads, and 17 hidden channels, go to two processes."""

    class Odd(Split):
        def __init__(self) -> None:
            super().__init__(lambda: Heads(8, 3, groups=3))
            for block in self.blocks:
                block.mlp = nn.Sequential(nn.Linear(8, 17), nn.ReLU(), nn.Linear(17, 8))

    return {"apart": both(Odd, gradient_clip_val=0.05)}


def fused_optimizer() -> Found:
    return {"apart": both(GPT, callbacks=[la.FusedOptimizer()])}


def evaluated_only() -> Found:
    """Predict, test and validate of a module that never trains."""
    found = {}
    sides = []
    for alone in (True, False):
        module, loader = made(Split), data(0, 1)
        kind = {"devices": 1} if alone else {"devices": 2, "strategy": TensorParallelStrategy()}
        ours = trainer(**kind)
        sides.append([torch.cat(ours.predict(module, loader)).double()])
        sides[-1].append(torch.tensor(ours.test(module, loader, verbose=False)[0]["test"]))
        sides[-1].append(torch.tensor(ours.validate(module, loader, verbose=False)[0]["val"]))
    for name, one, two in zip(("predict", "test", "validate"), *sides, strict=True):
        found[name] = float((one - two).abs().max())
    return found


def hooks() -> Found:
    """What hooks of the module do with weights and gradients is tried: norms of each, noise, limits, logged values."""

    def scaled(self: Any, *_: Any) -> None:
        for p in self.parameters():
            if p.grad is not None:
                p.grad.div_(p.grad.norm() + 1e-3)

    def noisy(self: Any, *_: Any) -> None:
        for p in self.parameters():
            p.grad.add_(torch.randn_like(p), alpha=1e-3)

    @torch.no_grad()
    def limited(self: Any, *_: Any) -> None:
        for p in self.parameters():
            p.mul_(0.1 / p.norm().clamp_min(0.1))

    def told(self: Any, *_: Any) -> None:
        self.log("norm", torch.stack([p.grad.norm() for p in self.parameters()]).norm())

    def again(self: Any, *_: Any) -> None:
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    def backward(self: Any, loss: Tensor) -> None:
        loss.backward()
        scaled(self)

    kinds = {
        "on_after_backward": scaled, "configure_gradient_clipping": scaled, "on_before_optimizer_step": noisy,
        "on_train_batch_end": limited, "on_before_zero_grad": told, "on_train_start": again, "backward": backward,
    }  # fmt: skip
    found = {
        name: refused(
            lambda name=name, hook=hook: type("Hooked", (GPT,), {name: hook})(depth=1),
            "in a hook of the module",
        )
        for name, hook in kinds.items()
    }

    class Harmless(Split):
        """What each number does by itself is right in parts, weights whose gradients are to be added included."""

        def __init__(self) -> None:
            super().__init__(partial(Heads, 8, 4, normed=True))

        def on_after_backward(self) -> None:
            for p in self.parameters():
                p.grad.clamp_(-1e-3, 1e-3)

        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                for p in self.parameters():
                    p.mul_(0.999)

    class Gradients(GPT):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[0].mlp[2].register_full_backward_hook(
                lambda m, given, _: tuple(g / g.norm() for g in given)
            )

    return {
        **found,
        "harmless": both(Harmless),
        "of a layer": refused(Gradients, "hooks on the gradients of layers"),
    }


def later() -> Found:
    """What begins after the steps that were tried."""

    class Penalty(GPT):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            extra = 1e-3 * self.blocks[0].mlp[2].weight.norm() if self.current_epoch else 0.0
            return self.loss(batch) + extra

    class Swaps(GPT):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch:
                self.blocks[0].mlp[1] = nn.Softmax(-1)

    class Unfreezes(Split):
        def __init__(self) -> None:
            super().__init__(partial(Heads, 8, 4, normed=True))
            self.norms = [p for block in self.blocks for p in block.att.norm.parameters()]
            for p in self.norms:
                p.requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            for p in self.norms:
                p.requires_grad_(self.current_epoch > 0)

    class Batches(GPT):
        """Inputs alone differ, of a network without shortcuts: the sums of parts give the same loss everywhere."""

        def __init__(self) -> None:
            super().__init__(depth=0)
            self.net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8))

        def embed(self, tokens: Tensor) -> Tensor:
            return self.net(super().embed(tokens))

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            step = self.trainer.fit_loop.epoch_loop.batch_idx if self.trainer.training else 0
            return [batch[0].roll(self.global_rank, 0), batch[1]] if step >= 2 else batch

    class Validates(GPT):
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            later = self.trainer.validating and self.global_step > 0
            return [b.roll(self.global_rank, 0) for b in batch] if later else batch

    def validated() -> float:
        loader = data(0, 1)
        try:
            trainer(devices=2, strategy=TensorParallelStrategy()).fit(
                made(Validates), loader, loader
            )
        except la.errors.AccelError as error:
            return float("same batch" not in str(error))
        return 1.0

    return {
        "penalty": refused(Penalty, "different losses"),
        "module": refused(Swaps, "was changed after it was split"),
        "unfrozen": both(Unfreezes),
        "batches": refused(Batches, "different losses or batches"),
        "validation": validated(),
    }


def of_whole_shapes() -> Found:
    """Optimizers are made while weights have their whole shapes."""

    class Rates(GPT):
        def configure_optimizers(self) -> Any:
            return torch.optim.Adagrad(
                [{"params": [p], "lr": 0.1 / p.numel() ** 0.5} for p in self.parameters()]
            )

    class Closure(Split):
        def __init__(self) -> None:
            super().__init__(partial(Heads, 8, 4, normed=True))
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()

            def closure() -> Tensor:
                optimizer.zero_grad()
                loss = self.loss(batch)
                self.manual_backward(loss)
                return loss

            optimizer.step(closure=closure)

    class Centred(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            loss = None if closure is None else torch.enable_grad()(closure)()
            for p in (
                p
                for group in self.param_groups
                for p in group["params"]
                if p.grad is not None and p.dim() > 1
            ):
                p.grad -= p.grad.mean(1, keepdim=True)
            super().step()
            return loss

    class Rows(GPT):
        optimizer = staticmethod(lambda p: Centred(p, 0.05))

    return {
        "rates": both(Rates),
        "closure": both(Closure),
        "rows": refused(Rows, "each number by itself"),
    }


def names_in_files() -> Found:
    """Exact names win over endings, and what has none is told."""

    class Twice(Split):
        def __init__(self) -> None:
            super().__init__()
            self.other = nn.ModuleDict(
                {
                    "blocks": nn.ModuleList(
                        [nn.ModuleDict({"mlp": nn.ModuleList([nn.Linear(8, 8)])})]
                    )
                }
            )

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return (
                self.loss(batch)
                + self.other["blocks"][0]["mlp"][0](self.tok(batch[0])).pow(2).mean()
            )

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            checkpoint["kept"] = [p.detach() for p in self.blocks.parameters()]

    class Saves(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(path)

    path, module = FOLDER / "names.ckpt", made(Twice)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(module, callbacks=[Saves()]).strategy.barrier()
    is_told = any("parts of tensors" in str(warning.message) for warning in told)
    state = torch.load(path, weights_only=True)["state_dict"]
    return {"file": apart(dict(module.state_dict()), state), "told": float(is_told != (RANK == 0))}


def planted() -> Found:
    """Faults of the sums that a proof must refuse, each in a network that is split rightly without it."""
    from lightning_accel.parallel.tensor import split

    def halves(ctx: Any, x: Tensor, bias: Any, group: Any) -> Tensor:
        ctx.group = group
        return x.clone()

    def twice(ctx: Any, x: Tensor, bias: Any, group: Any) -> Tensor:
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    own = split.SplitModel.__init__

    def mixed(self: Any, model: Any, plan: Any, group: Any, **given: Any) -> None:
        own(self, model, plan, group, **given)
        for name in self.kept:
            if name.endswith("mlp.0.weight"):
                with torch.no_grad():
                    self.model.get_parameter(name).copy_(self.model.get_parameter(name).roll(1, 0))

    copied, summed = split._Copied, split._Summed
    faults: dict[str, tuple[Any, str, Any]] = {
        "outputs are not summed": (summed, "forward", staticmethod(halves)),
        "the bias counts twice": (summed, "forward", staticmethod(twice)),
        "gradients are not summed": (copied, "backward", staticmethod(lambda ctx, g: (g, None))),
        "gradients are summed twice": (
            summed, "backward", staticmethod(lambda ctx, g: (summed.apply(g, None, ctx.group), None, None)),
        ),
        "weights of other units": (split.SplitModel, "__init__", mixed),
    }  # fmt: skip
    found = {"none": float(both(Split) > 1e-12)}
    for name, (home, attribute, fault) in faults.items():
        right = vars(home)[attribute]
        setattr(home, attribute, fault)
        try:
            words = "" if name == "weights of other units" else "no layer can be split"
            module = made(Split)
            ours = trainer(devices=2, strategy=TensorParallelStrategy())
            try:
                ours.fit(module, data(0, 1))
                split_anyway = {
                    g.name.partition(".")[2].partition(".")[2] for g in ours.strategy.plan.groups
                }
                found[name] = float(bool(words) or "mlp.0" in split_anyway)
            except la.errors.NoEffect as error:
                found[name] = float(words not in str(error))
        finally:
            setattr(home, attribute, right)
    return found


def sizes() -> Found:
    """A number of processes that makes no whole networks is refused."""
    try:
        trainer(devices=2, strategy=TensorParallelStrategy(tensor_parallel_size=3)).fit(
            made(GPT), data(0, 1)
        )
    except ValueError as error:
        return {"refused": float("make no whole number" not in str(error))}
    return {"refused": 1.0}


SITUATIONS = {
    f.__name__: f
    for f in (
        other_batches, samplers, batches_by_rank, optimizers, dropout, random_by_rank, clipped_by_hand, backward_by_hand, precisions, resumed_in_short_formats,
        metrics, compiled, uneven, fused_optimizer, evaluated_only, sizes, planted, hooks, later, of_whole_shapes,
        names_in_files,
    )
}  # fmt: skip

if __name__ == "__main__":
    write_results(SITUATIONS, sys.argv[2:], FOLDER / f"{RANK}.json")
