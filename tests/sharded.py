"""Modules that know nothing of sharding, used in every way that people use theirs; and fits of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.attention
import torch.nn.functional as F
import torch.utils.checkpoint
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, Sampler, TensorDataset

VOCABULARY, LENGTH, ROWS, BATCH = 24, 8, 32, 8


class Attention(nn.Module):
    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = (
            f(x).view(b, t, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(b, t, d))


class Block(nn.Module):
    def __init__(self, d: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.n1, self.n2, self.att = nn.LayerNorm(d), nn.LayerNorm(d), Attention(d, heads)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.att(self.n1(x))
        return x + self.mlp(self.n2(x))


class GPT(LightningModule):
    """Layers in `__init__`, one optimizer."""

    optimizer: Any = staticmethod(lambda p: torch.optim.SGD(p, 0.05, momentum=0.9))

    def __init__(self, depth: int = 3, d: int = 8) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(VOCABULARY, d), nn.Embedding(LENGTH, d)
        self.blocks = nn.ModuleList(Block(d, 2) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, VOCABULARY, bias=False)
        self.losses: list[float] = []

    def embed(self, tokens: Tensor) -> Tensor:
        return self.tok(tokens) + self.pos(torch.arange(tokens.shape[1], device=tokens.device))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]).flatten(0, 1), batch[1].flatten())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.loss(batch), sync_dist=True)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test", self.loss(batch), sync_dist=True)

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).argmax(-1)

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Adam(GPT):
    optimizer = staticmethod(lambda p: torch.optim.AdamW(p, 3e-3))


class Tied(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.tok.weight


class TiedBlocks(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].mlp[0].weight = self.blocks[0].mlp[0].weight


class SharedBlock(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.blocks[0]] * 3)


class Frozen(GPT):
    def __init__(self) -> None:
        super().__init__()
        self.tok.requires_grad_(False)
        self.blocks[0].requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


class OwnParameter(GPT):
    """A parameter of the module itself, and a step that never calls `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(8))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = self.embed(batch[0]) + self.shift
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(x).flatten(0, 1), batch[1].flatten())


class Scalar(GPT):
    """A temperature, as CLIP has it: a parameter without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * self.scale.exp()


class ScalarInBlock(GPT):
    """A scalar within each block, as layer scale has it."""

    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.gain = nn.Parameter(torch.tensor(0.5))
            block.register_forward_hook(lambda m, a, y: y * m.gain)


class AroundForward(GPT):
    """Parts of a block are called, never the block."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block.att(block.n1(x))
            x = x + block.mlp(block.n2(x))
        return self.head(self.norm(x))


class ReadsWeight(GPT):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) + 1e-2 * self.blocks[0].mlp[0].weight.pow(2).sum()


class Penalty(GPT):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) + 1e-3 * sum(p.pow(2).sum() for p in self.parameters())


class Twice(GPT):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch) + 0.5 * self.loss([batch[1], batch[0]])


class PeeksFirst(GPT):
    """A generate-like loop without gradients before the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            guess = self(batch[0]).argmax(-1)
            for _ in range(2):
                guess = self(guess).argmax(-1)
        return self.loss([batch[0], batch[1]]) + 0.1 * self.loss([guess, batch[1]])


class SkipsByData(GPT):
    """Which blocks run hangs on the batch, as in layer drop."""

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for index, block in enumerate(self.blocks):
            if index != 1 or int(tokens.sum()) % 2:
                x = block(x)
        return self.head(self.norm(x))


class Experts(GPT):
    """Each token goes to one of several networks; some of them get none."""

    def __init__(self) -> None:
        super().__init__(depth=1)
        kinds = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)) for _ in range(4)]
        self.experts, self.router = nn.ModuleList(kinds), nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.blocks[0](self.embed(tokens))
        gates, out = self.router(x).softmax(-1), torch.zeros_like(x)
        best = gates.argmax(-1)
        for index, expert in enumerate(self.experts):
            where = best == index
            if where.any():
                out[where] = expert(x[where]) * gates[where][:, index : index + 1]
        return self.head(self.norm(x + out))


class Towers(LightningModule):
    """Two encoders of one class, each half of all weights, and a loss over both."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (Tower() for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(0.1))

    def loss(self, batch: Any) -> Tensor:
        a, b = self.one(batch[0]), self.two(batch[1])
        return F.mse_loss(a * self.scale.exp(), b + 1.0)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(VOCABULARY, 8)
        self.layers = nn.ModuleList(Block(8, 2) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tok(tokens)
        for layer in self.layers:
            x = layer(x)
        return x.mean(1)


class Convolutions(LightningModule):
    """Blocks of different widths, with batch norm; the last statistics are those of the first process."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Embedding(VOCABULARY, 4)
        self.body = nn.Sequential(
            Residual(4), Residual(4), nn.Conv1d(4, 8, 1), Residual(8), Residual(8)
        )
        self.head = nn.Linear(8, VOCABULARY)

    def loss(self, batch: Any) -> Tensor:
        x = self.body(self.stem(batch[0]).transpose(1, 2))
        return F.cross_entropy(self.head(x.mean(-1)), batch[1][:, 0])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1, momentum=0.9)


class BatchNorm(Convolutions):
    """Running statistics, of which every process would have its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body.append(nn.BatchNorm1d(8))


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(width, width, 3, padding=1), nn.GroupNorm(2, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.conv(x)).relu()


class Late(GPT):
    """Layers that are made in `configure_model`, which shards nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.late = None

    def configure_model(self) -> None:
        if self.late is None:
            generator = torch.Generator().manual_seed(7)
            self.late = nn.Linear(VOCABULARY, VOCABULARY).to(self.dtype)
            with torch.no_grad():
                for p in self.late.parameters():
                    p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) / 10)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.late(super().forward(tokens))


class Manual(GPT):
    """A generator and a discriminator by hand, toggled."""

    toggles, zeroes_all, second, units = True, False, True, None

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.gain = nn.Parameter(torch.ones(8))

    def configure_optimizers(self) -> Any:
        maker = [
            *self.tok.parameters(),
            *self.pos.parameters(),
            *self.blocks.parameters(),
            self.gain,
        ]
        judge = [*self.norm.parameters(), *self.head.parameters()]
        return torch.optim.SGD(maker, 0.1), torch.optim.SGD(judge, 0.2, momentum=0.5)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        makes, judges = self.optimizers()
        for optimizer, sign in ((judges, 1.0), (makes, -1.0))[: 2 if self.second else 1]:
            if self.toggles:
                self.toggle_optimizer(optimizer)
            x = self.embed(batch[0]) * self.gain
            for block in self.blocks:
                x = block(x)
            loss = sign * self.head(self.norm(x)).sigmoid().mean() + 0.1 * x.pow(2).mean()
            for one in (makes, judges) if self.zeroes_all else (optimizer,):
                one.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            if self.toggles:
                self.untoggle_optimizer(optimizer)


class ManualAll(Manual):
    toggles, zeroes_all = False, True


class ManualOne(Manual):
    second = False


class ManualAccumulates(Manual):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        makes, judges = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            self.clip_gradients(makes, 0.05, "norm")
            for one in (makes, judges):
                one.step()
                one.zero_grad()


class ManualSkips(SkipsByData):
    """By hand, and of one block nobody may have a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


class Teacher(GPT):
    """A target network within, that follows by hand (BYOL): in the step, by `data`, or before gradients are zeroed."""

    where = "step"

    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.blocks).requires_grad_(False)
        self.centre = nn.Parameter(torch.zeros(8), requires_grad=False)

    def move(self) -> None:
        with torch.no_grad():
            for mine, its in zip(self.blocks.parameters(), self.target.parameters(), strict=True):
                if self.where == "data":
                    its.data = 0.9 * its.data + 0.1 * mine.data
                else:
                    its.mul_(0.9).add_(mine, alpha=0.1)
            self.centre.mul_(0.9).add_(self.blocks[0].mlp[2].bias, alpha=0.1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.where != "hook":
            self.move()
        x = aim = self.embed(batch[0])
        for mine, its in zip(self.blocks, self.target, strict=True):
            x, aim = mine(x), its(aim)
        return F.mse_loss(x, aim.detach() + 0.1 + self.centre) + self.loss(batch)

    def on_before_zero_grad(self, optimizer: Any) -> None:
        if self.where == "hook":
            self.move()

    def configure_optimizers(self) -> Any:
        return self.optimizer([p for p in self.parameters() if p.requires_grad])


class TeacherData(Teacher):
    where = "data"


class AssignsOnce(GPT):
    """A weight that learns gets other data in the first step: later ones must not compute with that for ever."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.global_step:
            self.norm.weight.data = self.norm.weight.data * 0.5
        return self.loss(batch)


class TeacherHook(Teacher):
    where = "hook"


class ManualClamps(Manual):
    """Weights are clamped by hand in the middle of a manual step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        super().training_step(batch, batch_idx)
        with torch.no_grad():
            for p in self.parameters():
                p.clamp_(-0.2, 0.2)
        self.makes_once_more(batch)

    def makes_once_more(self, batch: Any) -> None:
        makes, _ = self.optimizers()
        makes.zero_grad()
        self.manual_backward(self.loss(batch))
        with torch.no_grad():
            self.gain.mul_(0.9)
        makes.step()


class ManualLikeTheDocs(Manual):
    """Gradients are zeroed after the step, before the optimizer is untoggled, as Lightning's own GAN does it."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        for optimizer, sign in zip(self.optimizers(), (1.0, -1.0), strict=True):
            self.toggle_optimizer(optimizer)
            x = self.embed(batch[0]) * self.gain
            for block in self.blocks:
                x = block(x)
            self.manual_backward(sign * self.head(self.norm(x)).sigmoid().mean() + x.pow(2).mean())
            optimizer.step()
            optimizer.zero_grad()
            self.untoggle_optimizer(optimizer)


class ManualClipsItself(GPT):
    """Between backward and step gradients are read, clipped and scaled with torch's own functions."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        nn.utils.clip_grad_norm_(self.parameters(), 0.05)
        for p in self.parameters():
            p.grad.mul_(0.5)
        optimizer.step()
        optimizer.zero_grad()


class ManualLBFGS(GPT):
    """The optimizer runs backward itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer = self.optimizers()

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self.loss(batch)
            self.manual_backward(loss)
            return loss

        optimizer.step(closure=closure)


class MadeEarly(GPT):
    """The optimizer is made in `__init__`, and weights are marked that shall not decay."""

    def __init__(self) -> None:
        super().__init__()
        self.double()
        for p in self.norm.parameters():
            p.no_decay = True
        groups = [
            {"params": [p for p in self.parameters() if hasattr(p, "no_decay")]},
            {
                "params": [p for p in self.parameters() if not hasattr(p, "no_decay")],
                "weight_decay": 0.5,
            },
        ]
        self.own = torch.optim.SGD(groups, 0.05, momentum=0.9)

    def configure_optimizers(self) -> Any:
        return self.own


class Marked(GPT):
    """Weights are marked in `__init__`, and the marks are read in `configure_optimizers`."""

    def __init__(self) -> None:
        super().__init__()
        for p in self.blocks.parameters():
            p.no_decay = True

    def configure_optimizers(self) -> Any:
        decays = [p for p in self.parameters() if not getattr(p, "no_decay", False)]
        rests = [p for p in self.parameters() if getattr(p, "no_decay", False)]
        return torch.optim.SGD([{"params": decays, "weight_decay": 0.5}, {"params": rests}], 0.05)


class LooksInHooks(GPT):
    """The network is called in hooks between backward and step, and between steps."""

    seen = torch.arange(LENGTH).unsqueeze(0)

    def look(self) -> None:
        with torch.no_grad():
            self.noted = float(self(self.seen).sum())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.look()

    def on_train_batch_end(self, *_: Any) -> None:
        self.look()
        with torch.no_grad():
            self.norm.weight.mul_(0.99)


class Reentrant(GPT):
    """A part that runs in every other step, recomputed in the old way, in which nobody can look ahead."""

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(8, 8)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x = self.embed(batch[0])
        if batch_idx % 2:
            x = x + torch.utils.checkpoint.checkpoint(self.extra, x, use_reentrant=True)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), batch[1].flatten())


class GradientPenalty(GPT):
    """Gradients of the output with respect to the input are part of the loss (WGAN-GP)."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        given = self.embed(batch[0]).detach().requires_grad_(True)
        x = given
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            for block in self.blocks:
                x = block(x)
            slope = torch.autograd.grad(self.norm(x).pow(2).sum(), given, create_graph=True)[0]
            return self.loss(batch) + 1e-3 * (slope.flatten(1).norm(dim=1) - 1).pow(2).mean()


class ReadsRates(SkipsByData):
    """The step asks for optimizers and schedules, that are not made when steps are tried."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.lr_schedulers().step()
        return self.loss(batch)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]


class Case(NamedTuple):
    """A module, the Trainer's arguments, and those of the strategy."""

    make: Callable[[], LightningModule]
    trainer: dict[str, Any] = {}
    strategy: dict[str, Any] = {}
    by_ddp: bool = False
    """Whether the truth is Lightning's DDP: a step that hangs on the rows of a batch is another one for each process."""


CASES: dict[str, Case] = {
    "sgd": Case(GPT),
    "adam": Case(Adam),
    "clip by norm": Case(Adam, {"gradient_clip_val": 0.05}),
    "clip by value": Case(GPT, {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
    "accumulation": Case(GPT, {"accumulate_grad_batches": 2}),
    "accumulation, clipped": Case(Adam, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}),
    "accumulation, all sent": Case(GPT, {"accumulate_grad_batches": 2}, {"sync_every_batch": True}),
    "tied embedding and head": Case(Tied),
    "tied blocks": Case(TiedBlocks),
    "shared block": Case(SharedBlock),
    "frozen": Case(Frozen),
    "own parameter": Case(OwnParameter),
    "scalar": Case(Scalar),
    "scalar, clipped": Case(Scalar, {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2}),
    "scalar in a block": Case(ScalarInBlock),
    "around forward": Case(AroundForward),
    "reads a weight": Case(ReadsWeight),
    "penalty": Case(Penalty),
    "twice": Case(Twice),
    "peeks first": Case(PeeksFirst),
    "skips by data": Case(SkipsByData, by_ddp=True),
    "skips by data, accumulated": Case(SkipsByData, {"accumulate_grad_batches": 2}, by_ddp=True),
    "skips by data, manual": Case(ManualSkips, by_ddp=True),
    "experts": Case(Experts),
    "towers": Case(Towers),
    "convolutions": Case(Convolutions),
    "batch norm": Case(BatchNorm, by_ddp=True),
    "late": Case(Late),
    "all at once": Case(GPT, {}, {"units": ()}),
    "kept after forward": Case(GPT, {}, {"reshard_after_forward": False}),
    "in host memory": Case(GPT, {}, {"cpu_offload": True}),
    "copies of shards": Case(GPT, {}, {"replicas": 2}),
    "target that follows": Case(Teacher),
    "target that follows by data": Case(TeacherData),
    "data assigned once": Case(AssignsOnce),
    "target that follows in a hook": Case(TeacherHook),
    "manual, clamped": Case(ManualClamps),
    "manual, like the docs": Case(ManualLikeTheDocs),
    "manual, like the docs, in one unit": Case(ManualLikeTheDocs, {}, {"units": ()}),
    "manual, clips itself": Case(ManualClipsItself),
    "manual, clips itself, in one unit": Case(ManualClipsItself, {}, {"units": ()}),
    "made early": Case(MadeEarly),
    "marked": Case(Marked),
    "looks in hooks": Case(LooksInHooks),
    "reentrant": Case(Reentrant),
    "gradient penalty": Case(GradientPenalty),
    "reads rates": Case(ReadsRates, by_ddp=True),
    "manual, toggled": Case(Manual),
    "manual, all zeroed": Case(ManualAll),
    "manual, one optimizer": Case(ManualOne),
    "manual, in one unit": Case(Manual, {}, {"units": ()}),
    "manual, all zeroed, in one unit": Case(ManualAll, {}, {"units": ()}),
    "manual, accumulated and clipped": Case(ManualAccumulates),
}


class Fixed(Sampler[list[int]]):
    """Batches of given rows."""

    def __init__(self, rows: list[list[int]]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)


def data(rank: int, world: int) -> DataLoader[Any]:
    """Each process gets its rows of every global batch, in order."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH + 1), generator=generator)
    part = BATCH // world
    rows = [list(range(i + rank * part, i + (rank + 1) * part)) for i in range(0, ROWS, BATCH)]
    return DataLoader(TensorDataset(tokens[:, :-1], tokens[:, 1:]), batch_sampler=Fixed(rows))


def made(make: Callable[[], LightningModule], seed: int = 3) -> LightningModule:
    torch.manual_seed(seed)
    return make().double()


def trainer(**given: Any) -> Trainer:
    plain = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 2,
        "enable_model_summary": False, "enable_checkpointing": False, "num_sanity_val_steps": 0,
        "use_distributed_sampler": False,
    }  # fmt: skip
    return Trainer(**{**plain, **given})


class Share(Callback):
    """Notes which share of the parameters this process holds at the end of a fit."""

    share = 0.0

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        local = sum(getattr(p, "_local_tensor", p).numel() for p in pl_module.parameters())
        self.share = local / sum(p.numel() for p in pl_module.parameters())


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Return whole parameters and buffers by name."""
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    full = {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in state.items()}
    return {n: t.detach().clone() for n, t in full.items()}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the largest difference of two states with the same names."""
    assert list(one) == list(other)
    return max(float((a - other[n]).abs().max()) for n, a in copy.copy(one).items())
