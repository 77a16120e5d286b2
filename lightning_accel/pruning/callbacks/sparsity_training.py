"""When a penalty acts: between backward and each optimizer step of a fit."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_accel.arguments import finite, one_of, open_share, whole
from lightning_accel.bridge import checks
from lightning_accel.bridge.copies import on_host
from lightning_accel.bridge.example import AtHand, find_example
from lightning_accel.bridge.hand import Hand
from lightning_accel.bridge.strategies import WholeWeights, gathers, in_parts, on_whole
from lightning_accel.bridge.technique import Technique
from lightning_accel.changed import changed, in_vain, written
from lightning_accel.errors import Unsupported, explain
from lightning_accel.pruning import sparsity
from lightning_accel.pruning.graph import Graph, Group
from lightning_accel.surgery import Receipt, Select, twin
from lightning_accel.surgery.call import first
from lightning_accel.surgery.optimizers import Steps
from lightning_accel.surgery.preserve import preserve_rng

_SAMPLES = 2  # enough to trace


class SparsityTraining(Technique):
    """Make units of a network small while it trains, so that cutting them later costs little.

    The penalty's exact gradient is added after backward and before gradient clipping, to what each
    optimizer holds. It acts on what can be pruned: the same groups that `StructuredPruning` finds.
    Put it before a `StructuredPruning` that cuts at a later epoch; groups follow each cut.

    Args:
        penalty: "slimming" (scales of batch norms), "group_lasso" (norms of whole units) or "growing"
            (squared norms of the units picked to go, rising until they are gone).
        strength: Factor of the penalty; with "growing", what is added to it every `every_n_steps` steps.
        ratio: With "growing", the share of each group's units to drive out.
        every_n_steps: With "growing", optimizer steps between two rises.
        ceiling: With "growing", the largest factor.
        select: Layers whose units are penalised: a `Select`, a name pattern or several.
        example: Arguments of the LightningModule's `forward`; by default as `StructuredPruning`.

    Raises:
        ValueError: An argument is out of range.
        TypeError: It is no number.

    >>> SparsityTraining("group_lasso", strength=1e-3).penalty
    'group_lasso'
    """

    of_a_fit: ClassVar = {"_hand": Hand, "_steps": type(None)}

    def __init__(
        self,
        penalty: sparsity.Penalty = "group_lasso",
        *,
        strength: float = 1e-4,
        ratio: float = 0.5,
        every_n_steps: int = 10,
        ceiling: float = 1.0,
        select: Select | str | Sequence[str] | dict[str, Any] | None = None,
        example: Any = None,
    ) -> None:
        one_of("penalty", penalty, sparsity.PENALTIES)
        finite("strength", strength, above=0.0, do="pass 1e-4, say")
        finite("ceiling", ceiling, above=0.0)
        open_share("ratio", ratio)
        whole("every_n_steps", every_n_steps, do="pass a number of steps, such as 10")
        self.penalty = penalty
        self.strength = strength
        self.ratio = ratio
        self.every_n_steps = every_n_steps
        self.ceiling = ceiling
        self.select = Select.of(select)
        self.example = example
        # Lightning asks for the key on every hook of every step.
        self._key = self._generate_state_key(penalty=penalty, select=str(self.select))
        self._before: dict[str, str] = {}  # settings of the fit that a checkpoint comes from
        self.groups: list[Group] = []
        self.picked: dict[str, Tensor] = {}
        self._began = -1
        self._hand = Hand()
        self._steps: Steps | None = None
        self._stepped = self._added = False

    @property
    @override
    def state_key(self) -> str:
        return self._key

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "picked": dict(self.picked),
            "began": self._began,
            "settings": self._settings(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.picked, self._began = dict(state_dict["picked"]), int(state_dict["began"])
        self._before = dict(state_dict.get("settings", {}))

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        checks.refuse_sharded(
            trainer.strategy, type(self).__name__, unless_gathered=True, cuts=False
        )
        self.groups, self.picked, self._began, self._before = [], {}, -1, {}

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        checks.require_optimizer(trainer, type(self).__name__)
        checks.refuse_lazy(pl_module, type(self).__name__)
        if self.picked:  # resumed
            difference = changed(self._before, self._settings())
            if difference:
                happens = "the units that were picked stay"
                rank_zero_warn(in_vain(type(self).__name__, difference, happens))
        self.leave(trainer)
        self.held(trainer).callback(self._release)
        self._hand.do(partial(self._begin, trainer, pl_module))

    @on_whole
    def _begin(self, trainer: Trainer, pl_module: LightningModule, at_hand: AtHand | None) -> None:
        self.groups = self._find(trainer, pl_module, at_hand)
        if self._began < 0:
            self._began = trainer.global_step
            if self.penalty == "growing":
                self.picked = sparsity.pick(pl_module, self.groups, ratio=self.ratio)
        self._gradients(trainer, pl_module)  # what cannot work is told now
        rank_zero_info(
            f"SparsityTraining: {self.penalty} on {len(self.groups)} groups of channels."
        )
        self._steps = Steps(pl_module.parameters, self._note_step)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._hand.take(batch)

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        held = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = in_parts(trainer, self._gradients(trainer, pl_module))
        sparsity.add_to_grad(pl_module, gradients, held=held)
        self._added = True

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        self._hand.drop()
        missed, self._stepped, self._added = self._stepped and not self._added, False, False
        if missed:
            raise Unsupported(
                "the penalty cannot reach an optimizer that is stepped past Lightning",
                "a step of which `on_before_optimizer_step` was not told",
                "step what `self.optimizers()` returns, not the optimizer inside it or one of your own",
            )

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.leave(trainer)

    @override
    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        """Find the groups of the smaller network; units that stay keep their part."""
        if self.groups:
            self._hand.do(partial(self._follow, trainer, pl_module, receipt))

    def _follow(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        receipt: Receipt,
        at_hand: AtHand | None,
    ) -> None:
        before, self.groups = self.groups, self._find(trainer, pl_module, at_hand)
        if self.penalty != "growing":
            return
        self.picked, lost = sparsity.follow_picked(self.picked, before, self.groups, receipt)
        if lost:
            rank_zero_warn(
                explain(
                    f"{len(lost)} groups could not follow the edit and are no longer driven out",
                    ", ".join(lost[:4]),
                    "start the fit anew to pick units of the smaller network",
                )
            )

    def _settings(self) -> dict[str, str]:
        """Return what is decided once; the other settings hold from the next step on."""
        return written({"ratio": self.ratio})

    def _note_step(self, _: Any) -> None:
        self._stepped = True

    def _release(self) -> None:
        self._hand.clear()
        if self._steps is not None:
            self._steps.stop()
            self._steps = None
        self._stepped = self._added = False

    def _gradients(self, trainer: Trainer, pl_module: LightningModule) -> sparsity.Gradients:
        model: Any = pl_module
        if gathers(trainer.strategy):  # one weight after another is made whole for a while
            model = WholeWeights(pl_module, self._names())
        if self.penalty == "slimming":
            return sparsity.slimming(model, self.groups, strength=self.strength)
        if self.penalty == "group_lasso":
            return sparsity.group_lasso(model, self.groups, strength=self.strength)
        rises = (trainer.global_step - self._began) // self.every_n_steps + 1
        factor = min(self.ceiling, self.strength * rises)
        strengths = {name: factor * units.double() for name, units in self.picked.items()}
        return sparsity.growing(model, self.groups, strengths=strengths)

    def _names(self) -> list[str]:
        """Return the weights that the groups are of.

        Raises:
            Unsupported: One is computed by a parametrization.
        """
        names = list(dict.fromkeys(m.tensor for g in self.groups for m in g.members))
        if computed := next((n for n in names if ".parametrizations." in f".{n}"), None):
            raise Unsupported(
                "a penalty on weights that are computed needs them whole",
                f"`{computed}`, under a strategy that shards or splits weights",
                "train with strategy='ddp', or leave the layer out by `select`",
            )
        return names

    def _find(
        self, trainer: Trainer, pl_module: LightningModule, at_hand: AtHand | None
    ) -> list[Group]:
        frozen = frozenset(n for n, p in pl_module.named_parameters() if not p.requires_grad)
        with on_host(trainer, pl_module) as module:
            calls = find_example(trainer, module, self.example, at_hand, reach=True)
            with preserve_rng(), torch.enable_grad():
                few = first(calls, _SAMPLES)
                graph = Graph(twin(module), few, select=self.select, frozen=frozen)
        return list(graph.groups)
