"""`AttentionBackend`: one attention kernel while a Trainer runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch._dynamo import eval_frame
from typing_extensions import override

from lightning_accel.attention.backend import attention_backend, check, uses_attention
from lightning_accel.bridge.step import Around
from lightning_accel.bridge.technique import Context, Situation, Skipped, Technique
from lightning_accel.errors import explain


class AttentionBackend(Technique):
    """Compute `scaled_dot_product_attention` with one kernel where it can; with the others elsewhere.

    The choice holds for the whole process while the Trainer runs, and is undone afterwards. Networks that
    never call `scaled_dot_product_attention` are not affected, which the first training step tells; it cannot
    be seen in a process that compiles. `AutoTune` measures whether a kernel pays.

    Args:
        backend: "flash", "efficient", "cudnn" or "math".

    Raises:
        ValueError: The name is unknown.

    >>> AttentionBackend("flash").backend
    'flash'
    """

    needs = "process"
    is_global = True
    of_a_fit: ClassVar = {"_around": type(None)}
    name = "attention"
    tunable: ClassVar = {
        name: {"backend": name} for name in ("flash", "efficient", "cudnn", "math")
    }

    def __init__(self, backend: str) -> None:
        self.backend = check(backend)
        self._around: Around | None = None
        self._attends = False

    @override
    @classmethod
    def candidates(cls, situation: Situation) -> Iterator[str | Skipped]:
        device = situation.device.type
        if not situation.attends:
            yield Skipped("any", "the step never calls scaled_dot_product_attention")
        elif device == "cuda":
            yield from ("flash", "efficient", "cudnn")
        else:  # on a CPU flash is what PyTorch takes by itself
            yield "math"
            yield Skipped("cudnn", f"needs CUDA, this is {device}")

    @override
    @classmethod
    def describe(cls, value: str) -> str:
        return f"{value} attention"

    @override
    def effect(self, context: Context) -> AbstractContextManager[None]:
        return attention_backend(self.backend)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not _compiles():  # a look at compiled code compiles it once more
            self._attends = False
            self._around = Around(pl_module, "training_step", self._look)
            self.held(trainer).callback(self._unwatch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._around is None:
            return
        self._unwatch()
        if not self._attends:
            rank_zero_warn(
                explain(
                    "AttentionBackend has nothing to choose in this training",
                    f"no call of `scaled_dot_product_attention` in a step of {type(pl_module).__name__}",
                    "leave it out, or compute attention with that function",
                )
            )

    def _look(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given: list[Any] = []
        found = uses_attention(lambda: given.append(method(*args, **kwargs)))
        self._attends = self._attends or found
        return given[0]

    def _unwatch(self) -> None:
        if self._around is not None:
            self._around.remove()
        self._around = None


def _compiles() -> bool:
    """Whether this process has made anything to compile, also in functions that nobody can look into."""
    return any(backend is not None for backend in eval_frame.cached_backends.values())
