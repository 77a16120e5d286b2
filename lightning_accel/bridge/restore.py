"""A pruned model comes back from its checkpoint, with nothing asked of the user.

Lightning loads weights before any callback sees the checkpoint, and `save_weights_only=True` drops
every callback's state. The only hooks on both paths are the LightningModule's own
`on_save_checkpoint` and `on_load_checkpoint`, so those two are wrapped on the instance: the first
adds the present structure to the checkpoint as plain data, the second gives the module the stored
shape just before its weights load. Weight averages that callbacks keep take the same shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from lightning_accel.bridge.checks import refuse_lazy
from lightning_accel.bridge.hyper import as_values
from lightning_accel.bridge.strategies import sizes_now
from lightning_accel.errors import StructureMismatch, explain, weights_alone
from lightning_accel.parallel import folders
from lightning_accel.quantization.state import quantization_of, quantized_as
from lightning_accel.surgery import Structure
from lightning_accel.surgery.bypass import is_under, whole_tensors
from lightning_accel.surgery.structure import named_tensors, text
from lightning_accel.surgery.twin import twin

ModuleT = TypeVar("ModuleT", bound=LightningModule)

KEY = "lightning_accel"
QUANTIZATION = "lightning_accel_quantization"
_README = (
    "This network was pruned, and is smaller than what its class builds: a plain `load_from_checkpoint` or "
    "`load_state_dict` ends in size mismatches. Load it with "
    "`lightning_accel.load_from_checkpoint(YourModule, path)`, or with the same callbacks in the Trainer. "
    "`structure` holds the present shapes, `dense` those before the first prune."
)
_RECORD = "_accel_pristine"
_BESIDE = "_accel_beside"


def register(pl_module: LightningModule, beside: tuple[Any, Any] | None = None) -> None:
    """Let checkpoints of this instance carry its structure, and take it back; idempotent.

    The instance keeps this for life, so that `trainer.save_checkpoint` after a fit is covered too.

    Args:
        pl_module: The instance.
        beside: What does the same for what others keep beside it: `beside.saved` and `beside.collected`.
    """
    if beside is not None:
        vars(pl_module)[_BESIDE] = beside
    if _RECORD not in vars(pl_module):
        vars(pl_module)[_RECORD] = Structure()
        pl_module.on_save_checkpoint = partial(_save, pl_module, pl_module.on_save_checkpoint)  # type: ignore[method-assign]
        pl_module.on_load_checkpoint = partial(_load, pl_module, pl_module.on_load_checkpoint)  # type: ignore[method-assign]


def pristine(pl_module: LightningModule) -> Structure:
    """Return what the module had, before our first edit, in each place that was ever edited."""
    register(pl_module)
    found: Structure = vars(pl_module)[_RECORD]
    return found


def remember(pl_module: LightningModule, before: Structure) -> None:
    """Add places that an edit is about to change; what was remembered earlier wins."""
    vars(pl_module)[_RECORD] = before.updated(pristine(pl_module))


def averages(callbacks: list[Callback], pl_module: LightningModule) -> Iterator[nn.Module]:
    """Yield the copies of `pl_module` that callbacks keep, each once: moving and stochastic weight averages."""
    names = {name for name, _ in pl_module.named_parameters()}
    found: list[nn.Module] = []
    for callback in callbacks:
        for held in vars(callback).values():
            for copy in (held, getattr(held, "module", None)):
                if not isinstance(copy, nn.Module) or copy is pl_module or copy in found:
                    continue
                found.append(copy)
                if names and {name for name, _ in copy.named_parameters()} == names:
                    yield copy


def load_from_checkpoint(
    cls: type[ModuleT], path: str | Path, *, weights_only: bool = True, **kwargs: Any
) -> ModuleT:
    """Load a module that was pruned during training: `Cls.load_from_checkpoint` for any checkpoint.

    Args:
        cls: The user's LightningModule class, which needs to know nothing of this package.
        path: The checkpoint, pruned or not; of a sharded training the folder, which this process then reads whole.
        weights_only: Keep `True` for files whose origin you do not control.
        kwargs: What `Cls.load_from_checkpoint` takes: `map_location`, `strict`, hyper-parameters.

    Raises:
        StructureMismatch: The stored structure does not fit the class or the stored tensors.
        TypeError: `cls` is no class of a LightningModule, or `path` no path.
        FileNotFoundError: There is no such file.
        UnsafeFile: The file holds objects, or hyper-parameters that name code, and `weights_only` is `True`.
    """

    if not (isinstance(cls, type) and hasattr(cls, "load_from_checkpoint")):
        found = cls.__name__ if isinstance(cls, type) else f"{type(cls).__name__}, no class"
        raise TypeError(
            explain(
                "`cls` is a LightningModule class", found, "pass the class: MyModule, 'last.ckpt'"
            )
        )
    if not isinstance(path, (str, PathLike)):
        raise TypeError(
            explain("`path` is a checkpoint's path", repr(path), "pass 'last.ckpt', say")
        )
    if "://" not in str(path) and not Path(path).exists():
        raise FileNotFoundError(
            explain(
                "there is no such checkpoint", str(path), "check the path and the present folder"
            )
        )

    if folders.is_folder(Path(path)):
        with TemporaryDirectory() as place:
            file = Path(place) / "gathered.ckpt"
            torch.save(folders.gathered(Path(path)), file)
            return load_from_checkpoint(cls, file, weights_only=weights_only, **kwargs)

    def on_load_checkpoint(self: LightningModule, checkpoint: dict[str, Any]) -> None:
        self.__class__ = cls
        register(self)
        self.on_load_checkpoint(checkpoint)

    once: Any = type(cls.__name__, (cls,), {"on_load_checkpoint": on_load_checkpoint})
    kwargs = {"map_location": _here, **kwargs}
    with weights_alone(path):
        if weights_only:
            kwargs = {**kwargs, **as_values(cls, path, kwargs)}
        loaded: ModuleT = once.load_from_checkpoint(path, weights_only=weights_only, **kwargs)
    return loaded


def _here(storage: Any, location: str) -> Any:
    """Put a tensor where it was, or to the CPU if this process lacks that device: Lightning knows CUDA and MPS only."""
    found = torch.accelerator.current_accelerator(check_available=True)
    kind = location.partition(":")[0]
    return None if kind == "cpu" or (found is not None and found.type == kind) else storage


def as_saved(pl_module: ModuleT, path: str | Path) -> ModuleT:
    """Return a copy of a module with shapes, kinds and weights of one of its checkpoints.

    Raises:
        StructureMismatch: The checkpoint is of another network.
        UnsafeFile: It holds objects besides tensors and plain data.
    """
    with weights_alone(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    made = twin(pl_module).cpu()
    vars(made).pop(_BESIDE, None)  # what lies beside the module is not copied, and stays as it is
    _load(made, lambda checkpoint: None, checkpoint)
    made.load_state_dict(checkpoint["state_dict"])
    return made


def _save(pl_module: LightningModule, users_own: Any, checkpoint: dict[str, Any]) -> None:
    users_own(checkpoint)
    before = pristine(pl_module)
    if before:
        checkpoint[KEY] = {
            "readme": _README,
            "structure": sizes_now(before, pl_module).to_dict(),
            "dense": before.to_dict(),
        }
    quantization = quantization_of(pl_module)
    if quantization:
        checkpoint[QUANTIZATION] = quantization
    if _BESIDE in vars(pl_module):
        vars(pl_module)[_BESIDE][0](pl_module, checkpoint, checkpoint.get(KEY) or {})


def _load(pl_module: LightningModule, users_own: Any, checkpoint: dict[str, Any]) -> None:
    structure = stored_structure(pl_module, checkpoint)
    before = structure.built(pl_module).updated(pristine(pl_module))
    target = before.updated(structure).there()
    _check_tensors(pl_module, target, checkpoint.get("state_dict") or {})
    _tell_another_size(pl_module, target)
    remember(pl_module, before)
    beside = vars(pl_module).get(_BESIDE)
    cut_beside = beside[1](pl_module, checkpoint) if beside is not None else None
    trainer = getattr(pl_module, "_trainer", None)
    copies = list(averages(trainer.callbacks if trainer is not None else [], pl_module))
    target.apply(pl_module)
    stored = checkpoint.get(KEY)
    if cut_beside is not None and isinstance(stored, dict) and "dense" in stored:
        cut_beside(structure, Structure.from_dict(stored["dense"]))
    for average in copies:
        target.apply(average)
    for module in (pl_module, *copies):
        quantized_as(module, checkpoint.get(QUANTIZATION, {}))
    users_own(checkpoint)


def stored_structure(pl_module: LightningModule, checkpoint: Mapping[str, Any]) -> Structure:
    """Return the structure that a checkpoint carries, empty for a network that was never pruned.

    Raises:
        StructureMismatch: It is damaged, or is that of another network or another width.
    """
    if checkpoint.get(KEY) is None:
        return Structure()
    refuse_lazy(pl_module, "loading a pruned network")
    stored = checkpoint[KEY] if isinstance(checkpoint[KEY], dict) else {}
    structure = Structure.from_dict(stored.get("structure"))
    structure.check(pl_module, limit=pristine(pl_module))
    if "dense" in stored:  # files of 0.1.0 have none
        built = structure.built(pl_module).updated(pristine(pl_module))
        _check_origin(pl_module, structure, Structure.from_dict(stored["dense"]), built)
    return structure


def _check_origin(
    pl_module: LightningModule, structure: Structure, dense: Structure, built: Structure
) -> None:
    """Raise unless the pruned network came from one of the sizes that this class builds here."""
    if structure.now(pl_module) == structure and not pristine(pl_module):
        return  # built in the pruned sizes already
    pairs = [(name, size, built.tensors.get(name)) for name, size in dense.tensors.items()]
    for name, sizes in dense.attributes.items():
        there = built.attributes.get(name, {})
        pairs += [
            (f"{name}.{key}", _listed(v), _listed(there.get(key))) for key, v in sizes.items()
        ]
    for name, stored, present in pairs:
        if present is not None and tuple(stored) != tuple(present):
            raise StructureMismatch(
                "the checkpoint holds a pruned network that was of another size before",
                f"`{name}` was {text(stored)} before the first prune, and is {text(present)} in this model",
                "build the model with the hyper-parameters of the one that was pruned; nothing was loaded",
            )


def _listed(size: Any) -> Any:
    return (size,) if isinstance(size, int) else size


def _tell_another_size(pl_module: LightningModule, target: Structure) -> None:
    """Warn when a module that was pruned here gets another structure for a test or a prediction."""
    trainer = getattr(pl_module, "_trainer", None)
    fitting = trainer is None or trainer.state.fn == "fit"
    if fitting or not pristine(pl_module) or target.now(pl_module) == target:
        return
    present = sum(p.numel() for p in pl_module.parameters())
    sizes = {n: prod(s) for n, s in target.tensors.items()}
    away = {name for name, handing in target.bypassed.items() if handing is not None}
    whole = {id(p): (n, p) for n, p in whole_tensors(pl_module) if isinstance(p, nn.Parameter)}
    stored = sum(sizes.get(n, p.numel()) for n, p in whole.values() if not is_under(n, away))
    rank_zero_warn(
        explain(
            "the checkpoint holds another structure than the network has, which takes it on",
            f"{stored:,} parameters in the checkpoint, {present:,} in the network",
            "nothing if you meant this checkpoint, else load one that was saved after the last prune",
        )
    )


def _check_tensors(pl_module: LightningModule, target: Structure, stored: dict[str, Any]) -> None:
    present = dict(named_tensors(pl_module))
    for name, tensor in stored.items():
        expected = target.tensors.get(name)
        if expected is not None and tuple(tensor.shape) != tuple(expected):
            raise StructureMismatch(
                f"the stored structure and the stored tensor disagree about `{name}`",
                f"{text(expected)} in the structure, {text(tensor.shape)} in the tensor",
                "use an undamaged checkpoint; nothing was loaded",
            )
    missing = [name for name in target.tensors if name in present and stored and name not in stored]
    persistent = set(pl_module.state_dict(keep_vars=True))
    missing = [name for name in missing if name in persistent]
    if missing and pl_module.strict_loading:
        raise StructureMismatch(
            "the stored structure names a tensor that the checkpoint lacks",
            missing[0],
            "use an undamaged checkpoint; nothing was loaded",
        )
