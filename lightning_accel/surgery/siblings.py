"""The parts of a network that stand beside each other, among which blocks repeat."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def siblings(network: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield children by name, those of plain containers in place of the container.

    >>> [name for name, _ in siblings(nn.ModuleDict({"body": nn.Sequential(nn.ReLU(), nn.ReLU())}))]
    ['body.0', 'body.1']
    """
    for child_name, child in network.named_children():
        full = f"{name}.{child_name}".strip(".")
        if type(child) in _CONTAINERS:
            yield from siblings(child, full)
        else:
            yield full, child


def is_called(module: nn.Module) -> bool:
    """Tell whether a module has a forward and parameters, and is no metric."""
    forward = type(module).forward is not nn.Module.forward or "forward" in vars(module)
    return forward and not is_metric(module) and any(True for _ in module.parameters())


def is_metric(module: nn.Module) -> bool:
    """Tell whether this is of torchmetrics, by name: the package need not be imported."""
    return any(base.__module__.startswith("torchmetrics") for base in type(module).__mro__)
