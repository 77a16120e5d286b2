"""A pruner of torch-pruning spelled by names, as a configuration file can say it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal, get_args

from torch import nn

from lightning_accel.arguments import one_of, open_share
from lightning_accel.errors import AccelError, NoEffect
from lightning_accel.surgery import Select

Kind = Literal["BasePruner", "GroupNormPruner", "BNScalePruner", "GrowingRegPruner"]
KINDS = get_args(Kind)
IMPORTANCES = (
    "GroupMagnitudeImportance",
    "GroupTaylorImportance",
    "BNScaleImportance",
    "LAMPImportance",
    "FPGMImportance",
    "RandomImportance",
)
OPTIONS = (
    *("alpha", "delta_reg", "global_pruning", "group_lasso", "head_pruning_ratio", "isomorphic"),
    *("iterative_steps", "max_pruning_ratio", "prune_head_dims", "prune_num_heads", "reg"),
    "round_to",
)


class TorchPruner:
    """Makes a pruner of torch-pruning for `StructuredPruning(pruner=)` or `prune(pruner=)`, from names and numbers.

    In Python, a function of your own says the same and more.

    Args:
        kind: One of `BasePruner`, `GroupNormPruner`, `BNScalePruner` and `GrowingRegPruner`.
        importance: Class of `torch_pruning.importance`, made with its defaults.
        pruning_ratio: Share of the channels to remove.
        ignored_layers: Name patterns of layers that stay whole. Those that make the output do so anyway.
        pruning_ratio_dict: Share by name pattern, for other shares than `pruning_ratio`.
        num_heads: Number of heads by name pattern of a linear layer, such as `{"*.qkv": 12}`.
        options: Whatever else the pruner takes as a number or a switch: `global_pruning`, `isomorphic`, `round_to`,
            `iterative_steps`, `max_pruning_ratio`, `prune_num_heads`, `prune_head_dims`, `head_pruning_ratio`,
            `reg`, `alpha`, `delta_reg`, `group_lasso`.

    Raises:
        ValueError: A name is none of these, or a share is none.
        TypeError: A share is no number.

    >>> TorchPruner("GroupNormPruner", options={"reg": 1e-4})
    TorchPruner('GroupNormPruner', importance='GroupMagnitudeImportance', pruning_ratio=0.5, options={'reg': 0.0001})
    """

    def __init__(
        self,
        kind: Kind = "BasePruner",
        *,
        importance: str = "GroupMagnitudeImportance",
        pruning_ratio: float = 0.5,
        ignored_layers: Iterable[str] = (),
        pruning_ratio_dict: Mapping[str, float] | None = None,
        num_heads: Mapping[str, int] | None = None,
        options: Mapping[str, float | bool | None] | None = None,
    ) -> None:
        one_of("kind", kind, KINDS)
        one_of("importance", importance, IMPORTANCES)
        for option in options or {}:
            one_of("options", option, OPTIONS)
        open_share("pruning_ratio", pruning_ratio)
        for pattern, share in (pruning_ratio_dict or {}).items():
            if share != 0 or isinstance(share, bool):  # 0 keeps a layer whole
                open_share(f"pruning_ratio_dict['{pattern}']", share)
        self.kind = kind
        self.importance = importance
        self.pruning_ratio = pruning_ratio
        self.ignored_layers = (
            (ignored_layers,) if isinstance(ignored_layers, str) else tuple(ignored_layers)
        )
        self.pruning_ratio_dict = dict(pruning_ratio_dict or {})
        self.num_heads = dict(num_heads or {})
        self.options = dict(options or {})

    def __repr__(self) -> str:
        said = [f"{key}={value!r}" for key, value in vars(self).items() if key != "kind" and value]
        return f"TorchPruner({', '.join([repr(self.kind), *said])})"

    def __call__(self, model: nn.Module, example: Any) -> Any:
        """Return the pruner for a model.

        Raises:
            NoEffect: A pattern matches no layer.
        """
        import torch_pruning

        kind = getattr(torch_pruning.pruner, self.kind)
        options = {k: v for k, v in self.options.items() if v is not None}
        known = inspect.signature(kind).parameters
        if odd := [name for name in options if name not in known]:
            raise AccelError(
                f"{self.kind} has no option `{odd[0]}`",
                f"{odd[0]}={options[odd[0]]!r}",
                f"leave it out: `options.{odd[0]}=null` where the preset sets it",
            )
        ignored = [m for p in self.ignored_layers for m in Select.of(p).require(model).values()]
        return kind(
            model,
            example,
            importance=getattr(torch_pruning.importance, self.importance)(),
            pruning_ratio=self.pruning_ratio,
            ignored_layers=ignored,
            pruning_ratio_dict=_of_modules(model, self.pruning_ratio_dict),
            num_heads=_linear(model, self.num_heads),
            # Its own defaults are dicts that all of its pruners share.
            in_channel_groups={},
            out_channel_groups={},
            **options,
        )


def _of_modules(model: nn.Module, by_pattern: Mapping[str, Any]) -> dict[nn.Module, Any]:
    return {
        module: value
        for pattern, value in by_pattern.items()
        for module in Select.of(pattern).require(model).values()
    }


def _linear(model: nn.Module, by_pattern: Mapping[str, int]) -> dict[nn.Module, int]:
    found: dict[nn.Module, int] = {}
    for pattern, value in by_pattern.items():
        mine: dict[nn.Module, int] = {
            module: value
            for module in Select.of(pattern).require(model).values()
            if isinstance(module, nn.Linear)
        }
        if not mine:
            raise NoEffect(
                "`num_heads` is by the name of a linear layer",
                pattern,
                "name the projection, such as '*.qkv'",
            )
        found.update(mine)
    return found
