"""Which linear layers to compute in float8, why the others are left, and how a layer changes and changes back.

Float8 halves the bytes of a product's operands and doubles the peak of a GPU's tensor cores; weights, gradients
and optimizer stay in their own format. Casting costs a pass over each operand, so narrow layers lose. The
arithmetic is torchao's (`torchao.float8`, the recipes of Micikevicius et al. 2022, arXiv 2209.05433), imported
when it is needed.

A layer is changed in place, by its class and four attributes: torchao's own conversion puts another module in
its place, which loses hooks and leaves whoever held the old one with a layer that no longer computes. Copies and
pickles are plain layers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from lightning_accel.arguments import one_of, whole
from lightning_accel.errors import NoEffect, Unsupported, explain
from lightning_accel.surgery import Change, Receipt, Select

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")

_CAPABILITY = (8, 9)
_MULTIPLE = 16  # of both dimensions, for float8 tensor cores
_MARK = "_accel_float8"
_HEAD = "the head: its logits need more than three bits; name it in `select` to convert it"
_FIRST = "sees the raw input, whose range is not the network's; name it in `select` to convert it"


def float8_linear(
    model: nn.Module,
    *,
    select: Select | str | Iterable[str] | None = None,
    recipe: str = "tensorwise",
    smallest: int = 1024,
    emulate: bool = False,
) -> Receipt:
    """Let the chosen linear layers of `model` compute in float8, in place; `restore` takes it back.

    Args:
        model: Holds the layers below it.
        select: Which layers; `None` is all but the head and one that sees the raw input.
        recipe: "tensorwise" is the fastest; "rowwise" and "rowwise_with_gw_hp" are more exact.
        smallest: The smallest number of inputs and of outputs of a layer that is worth it.
        emulate: Compute the same numbers without float8 hardware.

    Raises:
        ModuleNotFoundError: torchao is not installed.
        NoEffect: No layer is left, with the reason for each.

    Returns:
        A receipt; `skipped` has a reason for each linear layer that stays, `notes` the same as text.
    """
    check_recipe(recipe)
    check_smallest(smallest)
    reasons = why_not(model, select=select, smallest=smallest)
    chosen = [name for name, reason in reasons.items() if not reason]
    skipped = tuple(
        Change(name, "float8", _shape(model.get_submodule(name)), reason)
        for name, reason in reasons.items()
        if reason
    )
    if not chosen:
        listed = "; ".join(
            f"{change.name} {change.before}: {change.after}" for change in skipped[:6]
        )
        raise NoEffect(
            "no linear layer is left to compute in float8",
            listed or f"no nn.Linear in {type(model).__name__}",
            "choose others with `select`, lower `smallest`, or leave out float8",
        )
    require_torchao()
    config = _config(recipe, emulate)
    for name in chosen:
        _convert(model.get_submodule(name), config)
    changes = tuple(Change(name, "float8", "Linear", f"Float8Linear ({recipe})") for name in chosen)
    return Receipt(changes, (), skipped, _notes(model, chosen, skipped, recipe))


def restore(model: nn.Module) -> int:
    """Make every layer that `float8_linear` changed a plain `nn.Linear` again, and return how many.

    >>> restore(nn.Sequential(nn.Linear(16, 16)))
    0
    """
    converted = [module for module in model.modules() if _MARK in vars(module)]
    for module in converted:
        for name in vars(module).pop(_MARK):
            vars(module).pop(name, None)
        module.__class__ = nn.Linear
    return len(converted)


def why_not(
    model: nn.Module,
    *,
    select: Select | str | Iterable[str] | None = None,
    smallest: int = 1024,
) -> dict[str, str]:
    """Tell for each chosen linear layer why it cannot or should not compute in float8, "" where it can.

    Args:
        model: Holds the layers below it.
        select: Which layers; `None` is all but the head and one that sees the raw input.
        smallest: The smallest number of inputs and of outputs of a layer that is worth it.

    >>> net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 10))
    >>> why_not(net, select=["0", "2", "3"], smallest=64)
    {'0': '', '2': 'too small: 32 outputs, fewer than 64', '3': '10 outputs are no multiple of 16'}
    """
    chosen = Select.of(select).require(model)
    linears = {n: m for n, m in chosen.items() if n and isinstance(m, nn.Linear)}
    tied = _tied_weights(model)
    reasons = {name: _why_not(module, smallest, tied) for name, module in linears.items()}
    if select is None:
        for name, reason in _ends(model).items():
            reasons[name] = reasons.get(name) or reason
    return reasons


def check_recipe(recipe: Any) -> str:
    """Return the name of a recipe, or raise and list the known ones.

    >>> check_recipe("rowwise")
    'rowwise'
    """
    return one_of("recipe", recipe, RECIPES)


def check_smallest(smallest: Any) -> int:
    """Return the smallest width, or raise when it is no positive whole number.

    >>> check_smallest(1024)
    1024
    """
    return whole("smallest", smallest, do="pass 16 for every layer that fits")


def require_torchao() -> None:
    """Raise and name the extra when torchao is missing."""
    if importlib.util.find_spec("torchao") is None:
        raise ModuleNotFoundError(
            explain(
                "float8 training computes with torchao",
                "no module named 'torchao'",
                "run `pip install lightning-accel[float8]`",
            ),
            name="torchao",
        )


def require_hardware(device: torch.device) -> None:
    """Raise unless the device multiplies float8.

    >>> require_hardware(torch.device("cpu"))
    Traceback (most recent call last):
    lightning_accel.errors.Unsupported: float8 needs a GPU with compute capability 8.9 or more (Ada, Hopper,
    Blackwell), or an MI300. Found: cpu. Do: train in bf16 there, or pass `emulate=True` to study the numbers.
    """
    found = device.type
    if device.type == "cuda" and torch.cuda.is_available():
        found = torch.cuda.get_device_name(device)
        if torch.version.hip is not None:
            architecture = str(torch.cuda.get_device_properties(device).gcnArchName)
            if architecture.startswith(("gfx94", "gfx95")):
                return
        else:
            capability = torch.cuda.get_device_capability(device)
            if capability >= _CAPABILITY:
                return
            found = f"{found} with {capability[0]}.{capability[1]}"
    raise Unsupported(
        "float8 needs a GPU with compute capability 8.9 or more (Ada, Hopper, Blackwell), or an MI300",
        found,
        "train in bf16 there, or pass `emulate=True` to study the numbers",
    )


def _why_not(module: nn.Linear, smallest: int, tied: set[int]) -> str:
    if _MARK in vars(module):
        return "computes in float8 already"
    if type(module) is not nn.Linear:
        return f"a subclass of nn.Linear ({type(module).__name__}), whose forward may differ"
    if "forward" in vars(module):
        return "its forward was replaced"
    if module.weight.dtype not in (torch.float32, torch.bfloat16):
        return f"weights of {str(module.weight.dtype).removeprefix('torch.')}"
    if id(module.weight) in tied:
        return "shares its weight with a layer that is no nn.Linear, such as an embedding"
    widths = ((module.in_features, "inputs"), (module.out_features, "outputs"))
    for count, what in widths:
        if count % _MULTIPLE:
            return f"{count} {what} are no multiple of {_MULTIPLE}"
    for count, what in widths:
        if count < smallest:
            return f"too small: {count} {what}, fewer than {smallest}"
    return ""


def _tied_weights(model: nn.Module) -> set[int]:
    others = (m for m in model.modules() if not isinstance(m, nn.Linear))
    return {id(p) for module in others for p in module.parameters(recurse=False)}


def _ends(model: nn.Module) -> dict[str, str]:
    """Return the linear layers that see the raw input or give the output, in the order of the modules."""
    holders = [
        (name, module)
        for name, module in model.named_modules()
        if any(True for _ in module.parameters(recurse=False))
    ]
    linears = [name for name, module in holders if isinstance(module, nn.Linear) and name]
    ends = {linears[-1]: _HEAD} if linears else {}
    if linears and holders[0][0] == linears[0]:
        ends.setdefault(linears[0], _FIRST)
    return ends


def _config(recipe: str, emulate: bool) -> Any:
    from torchao.float8 import Float8LinearConfig

    made = Float8LinearConfig.from_recipe_name(recipe)
    # The gradient of a weight sums over all tokens, and a last batch may have any number of them.
    return dataclasses.replace(made, emulate=emulate, pad_inner_dim=True)


def _convert(module: nn.Module, config: Any) -> None:
    from torchao.float8 import convert_to_float8_training

    made = convert_to_float8_training(module, config=config)
    assert made.weight is module.weight and made.bias is module.bias
    added = {name: value for name, value in vars(made).items() if name not in vars(module)}
    vars(module).update(added)
    vars(module)[_MARK] = tuple(added)
    kind: Any = type(made)
    module.__class__ = _copied_plain(kind)


@lru_cache(maxsize=4)
def _copied_plain(kind: Any) -> type[nn.Linear]:
    """Return a class whose copies and pickles are plain layers, as those are that a prune is tried on."""
    return type(kind.__name__, (kind,), {"__reduce_ex__": _reduce})


def _reduce(self: nn.Linear, protocol: Any) -> tuple[Any, ...]:
    added = (_MARK, *vars(self)[_MARK])
    state = {name: value for name, value in vars(self).items() if name not in added}
    return object.__new__, (nn.Linear,), state


def _notes(
    model: nn.Module, chosen: list[str], skipped: tuple[Change, ...], recipe: str
) -> tuple[str, ...]:
    layers = dict(model.named_modules())
    inside = sum(_numel(layers[name]) for name in chosen)
    whole = inside + sum(_numel(layers[change.name]) for change in skipped)
    first = (
        f"{len(chosen)} linear layers in float8 ({recipe}), {inside / whole:.0%} of their weights"
    )
    return (first, *(f"left {c.name} {c.before}: {c.after}" for c in skipped))


def _numel(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters(recurse=False))


def _shape(module: nn.Module) -> str:
    return f"{module.in_features}x{module.out_features}"
