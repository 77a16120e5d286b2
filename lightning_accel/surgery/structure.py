"""The shape of a model as plain data: tensor sizes, the integers that its forward reads, blocks that are gone.

A pruned network differs from the one its class builds in tensor shapes, in attributes such as
`out_channels`, `num_heads` or `normalized_shape`, and in whole blocks that are bypassed. All are written down by
name, so that a fresh instance takes the same shape before weights load, with no example input, no trace and no
torch-pruning, and in both directions: the best checkpoint may be less pruned than the model is now.
(Replaying torch-pruning's own history gives silently wrong attention heads.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.errors import StructureMismatch
from lightning_accel.surgery.attributes import Size, as_size, get_size, is_size, set_size, sizes_of
from lightning_accel.surgery.bypass import (
    Bypass,
    Handing,
    bypass,
    checked,
    is_under,
    put_back,
    removed_blocks,
    whole_modules,
    whole_tensors,
)
from lightning_accel.surgery.receipt import Change, Receipt, summary

_REMEDY = "use the checkpoint with the code that wrote it; nothing was loaded"


@dataclass(frozen=True)
class Structure:
    """Shapes of named tensors, integer attributes of named modules, blocks that may go; the named ones only.

    `bypassed` says of each block that was ever removed how it hands on its input, or `None` where it is in place.
    Of a block that is gone, neither tensors nor attributes are named.

    >>> narrow = Structure.of(nn.Linear(4, 2))
    >>> wide = nn.Linear(4, 8)
    >>> bool(narrow.apply(wide)), wide.out_features, tuple(wide.weight.shape)
    (True, 2, (2, 4))
    """

    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    attributes: Mapping[str, Mapping[str, Size]] = field(default_factory=dict)
    bypassed: Mapping[str, Handing | None] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tensors or self.attributes or self.bypassed)

    def __repr__(self) -> str:
        """Write a summary of at most ten lines.

        >>> Structure.of(nn.Linear(4, 2))
        Structure(2 tensors, 1 modules)
          weight: 2x4
          bias: 2
        """
        lines = [f"  {name}: {text(shape)}" for name, shape in self.tensors.items()]
        counts = f"{len(self.tensors)} tensors, {len(self.attributes)} modules"
        blocks = [name for name, handing in self.bypassed.items() if handing is not None]
        if blocks:
            counts += f", without {', '.join(blocks)}"
        return summary(f"Structure({counts})", lines)

    @classmethod
    def of(cls, model: nn.Module) -> Structure:
        """Describe all of `model`."""
        return cls(
            {name: tuple(tensor.shape) for name, tensor in named_tensors(model)},
            {
                name: sizes
                for name, module in model.named_modules()
                if not isinstance(module, Bypass) and (sizes := dict(sizes_of(module)))
            },
            {name: one.handing for name, one in removed_blocks(model).items()},
        )

    def now(self, model: nn.Module) -> Structure:
        """Return what `model` has at present in the places that this structure names."""
        return self._of(model, dict(self.bypassed)).there()

    def built(self, model: nn.Module) -> Structure:
        """Return the same as if no block were gone, with all tensors of those that this structure takes out."""
        lost = {n: tuple(t.shape) for n, t in whole_tensors(model) if is_under(n, self._away())}
        found = self._of(model, {})
        return Structure(
            {**lost, **found.tensors}, found.attributes, dict.fromkeys(self.bypassed, None)
        )

    def there(self) -> Structure:
        """Return this structure without what is a part of a block that is gone."""
        away = self._away()
        if not away:
            return self
        return Structure(
            {n: s for n, s in self.tensors.items() if not is_under(n, away)},
            {n: s for n, s in self.attributes.items() if n not in away and not is_under(n, away)},
            self.bypassed,
        )

    def _of(self, model: nn.Module, bypassed: Mapping[str, Any]) -> Structure:
        """Return sizes of the whole model, and whether these blocks are gone."""
        tensors, modules = dict(whole_tensors(model)), dict(whole_modules(model))
        missing = {n: m for n, m in modules.items() if n in bypassed and isinstance(m, Bypass)}
        if not modules.keys() >= bypassed.keys():
            raise KeyError(next(name for name in bypassed if name not in modules))
        return Structure(
            {name: tuple(tensors[name].shape) for name in self.tensors},
            {
                name: {key: as_size(get_size(_built(modules[name]), key)) for key in sizes}
                for name, sizes in self.attributes.items()
            },
            {name: missing[name].handing if name in missing else None for name in bypassed},
        )

    def updated(self, other: Structure) -> Structure:
        """Return this structure with `other`'s entries added, `other`'s winning."""
        attributes = {name: dict(sizes) for name, sizes in self.attributes.items()}
        for name, sizes in other.attributes.items():
            attributes.setdefault(name, {}).update(sizes)
        tensors = {**self.tensors, **other.tensors}
        return Structure(tensors, attributes, {**self.bypassed, **other.bypassed})

    def apply(self, model: nn.Module) -> Receipt:
        """Give `model` these sizes in place. Parameters whose shape changes become zeros.

        Buffers that checkpoints do not hold are the same along a cut dimension, so they are shortened
        or repeated. Parameters stay the same objects, tied ones stay tied, flags and dtypes stay. Blocks
        go, or come back with zeros for weights.
        """
        changes = [Change(name, "put back") for name in put_back(model, self._in_place())]
        changes += [Change(one.name, "removed") for one in bypass(model, self._away())]
        there = self.there()
        tensors, modules = dict(named_tensors(model)), dict(model.named_modules())
        for name, shape in there.tensors.items():
            tensor = tensors[name]
            if tuple(tensor.shape) != tuple(shape):
                changes.append(Change(name, "resized", text(tensor.shape), text(shape)))
                data = tensor.new_zeros(shape)
                if not isinstance(tensor, nn.Parameter):
                    data = _repeated(tensor, shape)
                replace_data(model, tensor, data)
        for name, sizes in there.attributes.items():
            for key, size in sizes.items():
                set_size(modules[name], key, size)
        return Receipt(tuple(changes))

    def _away(self) -> dict[str, Handing]:
        return {name: handing for name, handing in self.bypassed.items() if handing is not None}

    def _in_place(self) -> list[str]:
        return [name for name, handing in self.bypassed.items() if handing is None]

    def check(self, model: nn.Module, limit: Structure | None = None) -> None:
        """Raise `StructureMismatch` unless every name exists here and every size is possible.

        Args:
            model: The model that would take this structure.
            limit: Sizes that must not be exceeded: pruning only makes things smaller.
        """
        limit = limit or Structure()
        tensors, modules = dict(whole_tensors(model)), dict(whole_modules(model))
        for name in self.bypassed:
            if not name or name not in modules:
                raise StructureMismatch(
                    "the stored structure names a block that the model lacks", name, _REMEDY
                )
        for name, shape in self.tensors.items():
            if name not in tensors:
                raise StructureMismatch(
                    "the stored structure names a tensor that the model lacks", name, _REMEDY
                )
            _check_size(name, tuple(shape), limit.tensors.get(name, tuple(tensors[name].shape)))
        for name, sizes in self.attributes.items():
            for key, size in sizes.items():
                module = _built(modules.get(name))
                if module is None or not is_size(get_size(module, key)):
                    raise StructureMismatch(
                        "the stored structure names an attribute that the model lacks",
                        f"{name}.{key}",
                        _REMEDY,
                    )
                present = as_size(get_size(module, key))
                _check_size(f"{name}.{key}", size, limit.attributes.get(name, {}).get(key, present))

    def to_dict(self) -> dict[str, Any]:
        """Return plain containers, safe for `torch.load(weights_only=True)`, with a digest."""
        plain: dict[str, Any] = {
            "tensors": {name: list(shape) for name, shape in self.tensors.items()},
            "attributes": {
                name: {k: v if isinstance(v, int) else list(v) for k, v in sizes.items()}
                for name, sizes in self.attributes.items()
            },
        }
        if self.bypassed:
            plain["bypassed"] = dict(self.bypassed)
        return {**plain, "digest": _digest(plain)}

    @classmethod
    def from_dict(cls, plain: Any) -> Structure:
        """Read `to_dict`'s form, and raise `StructureMismatch` when it was damaged or tampered with."""
        try:
            tensors = {str(k): tuple(map(_strict_int, v)) for k, v in plain["tensors"].items()}
            attributes = {
                str(name): {
                    str(k): tuple(map(_strict_int, v)) if isinstance(v, list) else _strict_int(v)
                    for k, v in sizes.items()
                }
                for name, sizes in plain["attributes"].items()
            }
            bypassed = {
                str(name): None if handing is None else checked(handing)
                for name, handing in plain.get("bypassed", {}).items()
            }
            sealed = plain["digest"]
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise StructureMismatch(
                "the stored structure cannot be read", f"{type(error).__name__}: {error}", _REMEDY
            ) from None
        read = cls(tensors, attributes, bypassed)
        if read.to_dict()["digest"] != sealed:
            raise StructureMismatch(
                "the stored structure does not match its own digest", str(sealed)[:16], _REMEDY
            )
        return read


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by name, a tied one under each of its names."""
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def replace_data(model: nn.Module, tensor: Tensor, data: Tensor) -> Tensor:
    """Put `data` behind a parameter or buffer of `model`, and return the tensor that holds it.

    The tensor object stays the same wherever autograd allows it, so that optimizers, hooks, tied
    layers and whoever else holds it follow along. Only where a live autograd graph still knows the
    old shape (a stored loss, say) a new parameter takes its place, under all of its names.
    """
    tensor.grad = None
    tensor.data = data
    if not isinstance(tensor, nn.Parameter) or not _graph_expects_other_shape(tensor):
        return tensor
    successor = nn.Parameter(data, requires_grad=tensor.requires_grad)
    successor.__dict__.update(vars(tensor))
    for module in model.modules():
        for leaf, held in module._parameters.items():
            if held is tensor:
                module._parameters[leaf] = successor
    return successor


def _repeated(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return `tensor` with each dimension cut to, or repeated up to, the size asked for."""
    for dim, size in enumerate(shape):
        places = torch.arange(size, device=tensor.device) % max(tensor.shape[dim], 1)
        tensor = tensor.index_select(dim, places)
    return tensor.contiguous()


def text(shape: Any) -> str:
    """Write a shape as people do: 64x3x3x3."""
    return "x".join(map(str, shape)) or "scalar"


def _graph_expects_other_shape(parameter: nn.Parameter) -> bool:
    if not parameter.requires_grad:
        return False
    node = torch.autograd.graph.get_gradient_edge(parameter).node
    (known,) = node._input_metadata
    return tuple(known.shape) != tuple(parameter.shape)


def _built(module: Any) -> Any:
    """Return the block itself where a module stands for one that is gone."""
    return module.husk.block if isinstance(module, Bypass) else module


def _strict_int(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{value!r} is not an integer")
    return value


def _check_size(name: str, size: Size, limit: Size) -> None:
    sizes = size if isinstance(size, tuple) else (size,)
    limits = limit if isinstance(limit, tuple) else (limit,)
    if len(sizes) != len(limits) or any(
        s != m and not 1 <= s <= m for s, m in zip(sizes, limits, strict=True)
    ):
        raise StructureMismatch(
            f"the stored structure gives `{name}` an impossible size",
            f"{size}, where the model's class builds {limit}",
            _REMEDY,
        )


def _digest(plain: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
