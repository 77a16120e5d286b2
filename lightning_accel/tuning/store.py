"""Answers of earlier searches on disk, found by a fingerprint of everything that they depend on.

Module (classes, shapes, the code of its forwards and of `training_step`), batch shapes, optimizer,
clipping, precision, hardware, threads, versions, tier, techniques and the order of magnitude of the
run's length. A file that cannot be read is a miss.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import CodeType
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch import __version__ as lightning_version
from torch import Tensor
from torch.utils._pytree import tree_flatten

import lightning_accel
from lightning_accel import hardware
from lightning_accel.places import written_whole
from lightning_accel.tuning.report import FORMAT, TuneReport


def default_folder() -> Path:
    """Return where answers are kept: `lightning_accel/tuning` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(home).expanduser() / "lightning_accel" / "tuning"


def about(device: torch.device) -> dict[str, Any]:
    """Return hardware and versions in a few words."""
    found = hardware.describe(device)
    return {
        "device": found.name or found.kind,
        "cores": found.num_cores,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": str(torch.__version__),
        "lightning": lightning_version,
        "lightning_accel": lightning_accel.__version__,
    }


def fingerprint(
    trainer: Trainer,
    pl_module: LightningModule,
    batches: list[Any],
    *,
    steps: int,
    asked: Mapping[str, Any],
) -> str:
    """Return a digest of what an answer depends on.

    Args:
        trainer: A Trainer within a fit.
        pl_module: The module, with its optimizers in the Trainer.
        batches: Batches in place.
        steps: The length of the run; only its power of two counts.
        asked: The arguments of the search.
    """
    text = json.dumps(
        {
            "format": FORMAT,
            "about": about(trainer.strategy.root_device),
            "modules": [_described(name, m) for name, m in pl_module.named_modules()],
            "tensors": [
                (name, *_shape(t), t.requires_grad)
                for name, t in (*pl_module.named_parameters(), *pl_module.named_buffers())
            ],
            "step": _code(type(pl_module).training_step),
            "batches": [_tree(batch) for batch in batches],
            "optimizers": [
                (type(o).__qualname__, sorted((k, str(v)) for k, v in o.defaults.items()))
                for o in trainer.optimizers
            ],
            "trainer": [
                type(trainer.precision_plugin).__qualname__,
                str(trainer.precision),
                type(trainer.strategy).__qualname__,
                str(trainer.gradient_clip_val),
                str(trainer.gradient_clip_algorithm),
                trainer.accumulate_grad_batches,
                _techniques(trainer),
                torch.get_float32_matmul_precision(),
            ],
            "steps": int(math.log2(max(steps, 1))),
            "asked": dict(asked),
        },
        sort_keys=True,
        default=str,
    )
    return hashlib.sha256(text.encode()).hexdigest()


def load(folder: Path, key: str) -> TuneReport | None:
    """Return an earlier answer, or `None`."""
    try:
        found = TuneReport.from_dict(json.loads((folder / f"{key}.json").read_text()))
    except (OSError, ValueError, RecursionError):  # a file that is none of ours
        return None
    found.cached = True
    return found


def save(folder: Path, key: str, report: TuneReport) -> str | None:
    """Keep an answer, whole or not at all; return why it could not be kept."""
    text = report.to_json()
    try:
        with written_whole(folder / f"{key}.json") as part:
            part.write_text(text)
    except OSError as error:
        return f"the answer could not be kept in {folder}: {error}"
    return None


def _techniques(trainer: Trainer) -> list[str]:
    """Return the callbacks of this package, which change what a step is; but not the tuner's own."""
    kinds = [type(c) for c in trainer.callbacks]  # type: ignore[attr-defined]
    names = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
    ours = [n for n in names if n.startswith("lightning_accel.") and ".tuning." not in n]
    return sorted(ours)


def _described(name: str, module: torch.nn.Module) -> list[str]:
    own = type(module)
    numbers = {
        k: v
        for k, v in sorted(vars(module).items())
        if isinstance(v, (bool, int, float, str)) and not k.startswith("_")
    }
    return [name, f"{own.__module__}.{own.__qualname__}", str(numbers), _code(own.forward)]


def _code(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return _digest(code) if isinstance(code, CodeType) else ""


def _digest(code: CodeType) -> str:
    inner = [_digest(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    text = repr((code.co_code, code.co_names, inner))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _tree(batch: Any) -> list[Any]:
    leaves, spec = tree_flatten(batch)
    shapes = [_shape(v) if isinstance(v, Tensor) else type(v).__qualname__ for v in leaves]
    return [str(spec), shapes]


def _shape(tensor: Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype)]
