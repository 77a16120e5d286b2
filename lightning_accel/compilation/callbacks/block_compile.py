"""`BlockCompile`: compile as the last edit before training, again after a prune, and prove that it worked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from lightning_accel.arguments import flag, flags, instance, one_of, whole
from lightning_accel.bridge.evaluation import EvaluationBatches
from lightning_accel.bridge.technique import Context, Situation, Skipped, Technique
from lightning_accel.compilation.backends import backend_for
from lightning_accel.compilation.blocks import compile_blocks, find_blocks
from lightning_accel.compilation.explain import Capture, captures, table
from lightning_accel.compilation.recompile_policy import batch_sizes
from lightning_accel.compilation.region import (
    Backend,
    ask,
    check,
    expect,
    pause,
    recompile,
    settle,
    unsettle,
    without_effect,
)
from lightning_accel.errors import AccelError, NoEffect, Unsupported, explain
from lightning_accel.measure.table import Table
from lightning_accel.seldom import check_seldom
from lightning_accel.surgery import Receipt, Select, Stage
from lightning_accel.surgery.compiled import is_compiled

_ANSWERS = ("warn", "raise", "ignore")
_REPEATS = ("eager", "compile", "raise")
_RAGGED = ("auto", "ignore")


class BlockCompile(Technique, EvaluationBatches):
    """Compile the networks inside the LightningModule, and check that this had an effect.

    Repeated blocks are compiled once per kind, other networks as a whole, in place: names in checkpoints
    stay the same, and copies are uncompiled. After the first step every called target must have captured
    a graph. After a prune all is compiled anew, once. The module stays compiled after the fit.

    After the warm-up, a call that no graph fits runs eagerly rather than be compiled in mid-training; it is
    counted and told with the reason. If most calls of an epoch do so, what changed is there to stay, and
    the next epoch may compile again, as it may after parameters were frozen or thawed. Code that the
    user's own graph breaks split off is counted only as part of the block around it. Where batches of two
    sizes will come, the last one being ragged, the batch dimension is dynamic; otherwise all is static.
    The CUDA graphs of mode="reduce-overhead" pay where the host cannot launch kernels as fast as they
    run, which is small batches of small networks on a GPU; they need one shape and more memory.

    What is compared are results of forward, at some calls: what a helper of yours reads from a file or the environment,
    and what changes between a forward and its backward, is not seen at the others. And backend="eager" draws dropout anew
    in whatever is recomputed (`torch.utils.checkpoint`, `ActivationCheckpointing`), which is torch's own doing and
    shows in gradients alone: train with "inductor" or "aot_eager" there.

    Args:
        select: Networks or blocks to compile: a `Select`, a name pattern or several; by default all
            networks of the module. What is named here must be called in the first training step.
        blocks: Whether to look for repeated blocks; `False` compiles each network as a whole.
        backend: "auto" is inductor, or what a TPU needs; or a name known to `torch.compile`.
        mode: A mode of inductor, such as "reduce-overhead" or "max-autotune".
        dynamic: As in `torch.compile`; `None` lets the batch become dynamic when its size changes.
        fullgraph: Raise where a graph would break.
        on_graph_break: "warn", "raise" or "ignore", after the first step.
        on_recompile: After the warm-up: "eager", "raise", or "compile" as often as dynamo wants.
        warmup_steps: Batches of the warm-up; by default the first epoch with its validation.
        ragged: "auto" marks the batch dimension where sizes differ; "ignore" leaves it to dynamo, which
            captures twice there. Unused where `dynamic` says what to do.
        check_every_n_calls: At how many calls a block is compared with itself uncompiled, besides the first, second, fourth
            ..., the first of each epoch and dataloader, and those after changes of what it reads. One that differs
            runs as it is from then on, with a warning and a row in `report`. None for never.

    Raises:
        ValueError: A name is unknown, or `check_every_n_calls` is below 1; backends and modes are checked at setup.

    >>> BlockCompile(select="net", on_graph_break="raise").on_graph_break
    'raise'
    """

    needs = "weights"
    stage: ClassVar[Stage] = Stage.COMPILE
    name = "compilation"
    tunable: ClassVar = {
        "blocks": {},
        "whole": {"blocks": False},
        "with CUDA graphs": {"blocks": False, "mode": "reduce-overhead"},
        "with autotuning": {"blocks": False, "mode": "max-autotune-no-cudagraphs"},
    }

    def __init__(
        self,
        select: Select | str | Iterable[str] | dict[str, Any] | None = None,
        *,
        blocks: bool = True,
        backend: Backend = "auto",
        mode: str | None = None,
        dynamic: bool | None = None,
        fullgraph: bool = False,
        on_graph_break: str = "warn",
        on_recompile: str = "eager",
        warmup_steps: int | None = None,
        ragged: str = "auto",
        check_every_n_calls: int | None = 64,
    ) -> None:
        one_of("on_graph_break", on_graph_break, _ANSWERS)
        one_of("on_recompile", on_recompile, _REPEATS)
        one_of("ragged", ragged, _RAGGED)
        whole("warmup_steps", warmup_steps, none=True, do="pass 100, say")
        flags(blocks=blocks, fullgraph=fullgraph)
        flag("dynamic", dynamic, none=True)
        if not callable(backend):
            instance("backend", backend, str, "a name", "pass 'auto'")
        self.named = select is not None
        self.select = Select.of(select)
        self.blocks = blocks
        self.backend = backend
        self.mode = mode
        self.dynamic = dynamic
        self.fullgraph = fullgraph
        self.on_graph_break = on_graph_break
        self.on_recompile = on_recompile
        self.warmup_steps = warmup_steps
        self.ragged = ragged
        self.check_every_n_calls = check_seldom(check_every_n_calls)
        self._loader = 0
        self.captures: list[Capture] = []
        self._unproved = False
        self._final: tuple[Table, dict[str, int]] | None = None
        self._sizes = {True: frozenset[int](), False: frozenset[int]()}
        self._batches = 0
        self._told: set[tuple[int, str]] = set()

    @property
    def report(self) -> Table:
        """Graphs, graph breaks and recompilations of the last fit or evaluation, one row each."""
        return self._final[0] if self._final else table(self.captures)

    @property
    def totals(self) -> dict[str, int]:
        """How many graphs, graph breaks and recompilations there were."""
        if self._final:
            return self._final[1]
        return {
            "graphs": sum(c.graphs for c in self.captures),
            "graph_breaks": sum(len(c.breaks) for c in self.captures),
            "recompilations": sum(len(c.recompilations) for c in self.captures),
            "eager_calls": sum(sum(c.eager.values()) for c in self.captures),
        }

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        check(self._backend(trainer), self.mode)
        self.captures, self._final = [], None
        self._sizes = {True: frozenset(), False: frozenset()}
        self._batches, self._told = 0, set()
        super().setup(trainer, pl_module, stage)

    @override
    @classmethod
    def candidates(cls, situation: Situation) -> Iterator[str | Skipped]:
        if is_compiled(situation.module):
            yield Skipped("any", "the module is compiled already")
            return
        device = situation.device.type
        try:
            backend_for(device)
            parts, wholes = (
                find_blocks(situation.module, blocks=b, itself=False) for b in (True, False)
            )
        except (NoEffect, Unsupported) as error:
            yield Skipped("any", str(error))
            return
        same = parts.keys() == wholes.keys()
        yield Skipped("blocks", "no block repeats: the same as whole") if same else "blocks"
        yield "whole"
        for value in ("with CUDA graphs", "with autotuning"):
            yield value if device == "cuda" else Skipped(value, f"needs CUDA, this is {device}")

    @override
    @classmethod
    def describe(cls, value: str) -> str:
        return f"compiled {value}"

    @override
    @contextmanager
    def effect(self, context: Context) -> Iterator[Receipt]:
        """Compile what is not, and anew what was reshaped by a checkpoint; the module stays compiled."""
        module = context.module
        receipt = recompile(module) + compile_blocks(
            module,
            select=self.select,
            blocks=self.blocks,
            itself=False,
            backend=self._backend(context.trainer),
            mode=self.mode,
            dynamic=self.dynamic,
            fullgraph=self.fullgraph,
            # On a copy a tuner compares results itself, and times nothing else than the step.
            check_every_n_calls=None if context.is_copy else self.check_every_n_calls,
        )
        if not context.is_copy:
            self._collect(module)
        try:
            yield receipt
        finally:
            unsettle(module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        limit = trainer.num_training_batches
        self._expect(pl_module, trainer.train_dataloader, [limit], training=True)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_validation_start(trainer, pl_module)
        self._expect(pl_module, trainer.val_dataloaders, trainer.num_val_batches)

    @override
    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_test_start(trainer, pl_module)
        self._expect(pl_module, trainer.test_dataloaders, trainer.num_test_batches)

    @override
    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_predict_start(trainer, pl_module)
        self._expect(pl_module, trainer.predict_dataloaders, trainer.num_predict_batches)

    @override
    def on_model_edit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stay: what was edited is captured anew afterwards, and the warm-up goes on."""

    @override
    def on_model_edit_end(
        self, trainer: Trainer, pl_module: LightningModule, receipt: Receipt
    ) -> None:
        """Compile anew what another edit reshaped."""
        self._capture_anew(pl_module)

    def on_model_hooks_change(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Capture anew where hooks came or went, which graphs do not notice."""
        self._capture_anew(pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._begin_step()

    @override
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        self._prove(pl_module)
        self._batches += 1
        if self.warmup_steps and self._batches % self.warmup_steps == 0:
            self._settle(pl_module, training=True)

    @override
    def on_evaluation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, dataloader_idx: int
    ) -> None:
        self._begin_step()
        if dataloader_idx != self._loader:
            self._loader = dataloader_idx
            ask(pl_module)

    @override
    def on_evaluation_batch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit":  # what a sanity check calls is not what training calls
            self._prove(pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.warmup_steps and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._settle(pl_module, training=False)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._final = None
        pause(pl_module, False)
        self._capture_anew(pl_module)  # someone may have frozen or thawed parameters
        ask(pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.warmup_steps is None:
            self._settle(pl_module)
        # What others compile between epochs and after training, to measure it, is not of the training.
        pause(pl_module)
        self._final = self.report, self.totals

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rank_zero_info(self.report.to_text())
        values = {f"compilation/{name}": float(count) for name, count in self.totals.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)

    def _capture_anew(self, pl_module: LightningModule) -> None:
        receipt = recompile(pl_module)
        if receipt:
            self.receipt = self.receipt + receipt
            self._collect(pl_module)

    def _collect(self, pl_module: LightningModule) -> None:
        current = captures(pl_module)
        self._unproved = self._unproved or any(c not in self.captures for c in current)
        past = [c for c in self.captures if c not in current and c.called]
        self.captures = past + current
        for training, sizes in self._sizes.items():
            refuse = self.on_recompile == "raise"
            expect(pl_module, training=training, sizes=sizes, refuse=refuse)

    def _expect(
        self,
        pl_module: LightningModule,
        loaders: Any,
        limits: Sequence[float],
        *,
        training: bool = False,
    ) -> None:
        """Note which sizes of batch these loaders will bring."""
        if self.ragged == "auto":
            self._sizes[training] |= batch_sizes(loaders, limits)
            self._collect(pl_module)
        ask(pl_module)

    def _settle(self, pl_module: LightningModule, training: bool | None = None) -> None:
        if self.on_recompile != "compile":
            settle(pl_module, training=training)

    def _begin_step(self) -> None:
        if self.mode is not None:  # CUDA graphs reuse the memory of the step before
            torch.compiler.cudagraph_mark_step_begin()

    def _prove(self, pl_module: LightningModule) -> None:
        """After the first step, raise for targets without effect, and tell of graph breaks."""
        self._tell_eager()
        if not self._unproved:
            return
        self._unproved = False
        current = captures(pl_module)
        for capture in without_effect(pl_module):
            why = f": {capture.failures[0]}" if capture.failures else ""
            raise NoEffect(
                f"compiling `{capture.name}` had no effect",
                f"no graph was captured in the first step{why}",
                f"leave it out with select=Select(exclude={tuple(capture.targets)!r})",
            )
        uncalled = [name for capture in current for name in capture.uncalled]
        if (self.named and uncalled) or not any(capture.called for capture in current):
            raise NoEffect(
                f"compiling `{', '.join(uncalled)}` had no effect",
                "the first step did not call it as a module",
                "select the modules that are called, such as 'net' rather than a list of layers",
            )
        self._tell_breaks(current)

    def _tell_breaks(self, current: list[Capture]) -> None:
        broken = [(c.name, at, why) for c in current for at, why in c.breaks.items()]
        if not broken or self.on_graph_break == "ignore":
            return
        what = f"compiled targets have {len(broken)} graph break(s), each of which costs speed"
        found = "; ".join(f"`{name}` at {at}: {why}" for name, at, why in broken[:8])
        do = "rewrite these lines, exclude the target, or pass on_graph_break='ignore'"
        if self.on_graph_break == "raise":
            raise AccelError(what, found, do)
        rank_zero_warn(explain(what, found, do))

    def _tell_eager(self) -> None:
        """Warn once of each block that runs eagerly, wholly or in part."""
        for capture in self.captures:
            if capture.limits and (id(capture), "limit") not in self._told:
                self._told.add((id(capture), "limit"))
                rank_zero_warn(
                    explain(
                        f"dynamo gave up on compiling `{capture.name}`: what its graphs do not fit "
                        "runs eagerly from now on",
                        f"a limit on recompilations was reached, the last for: {capture.limits[0]}",
                        "give it inputs of fewer shapes, pass dynamic=True, or exclude it by `select`",
                    )
                )
            if capture.eager and (id(capture), "eager") not in self._told:
                self._told.add((id(capture), "eager"))
                rank_zero_warn(
                    explain(
                        f"`{capture.name}` would have been compiled again after the warm-up, "
                        "and runs eagerly where no graph fits",
                        next(iter(capture.eager)),
                        "nothing if this is rare; or make the warm-up longer by `warmup_steps`, or "
                        "pass on_recompile='compile'",
                    )
                )

    def _backend(self, trainer: Trainer) -> Backend:
        if self.backend != "auto":
            return self.backend
        return backend_for(trainer.strategy.root_device.type)
