"""Words for teachers that cannot teach: weights that do not fit, and answers that are no numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_accel.errors import AccelError

_SHOWN = 3


def misfit(network: nn.Module, stored: Mapping[str, Tensor]) -> tuple[str, str]:
    """Return which keys do not fit a network, and what can be done.

    >>> misfit(nn.Linear(1, 1), {"net.weight": nn.Linear(1, 1).weight, "net.bias": nn.Linear(1, 1).bias})[1]
    "load the part of it whose keys begin with 'net.', without that, or pass the module that holds `net`"
    """
    own = network.state_dict()
    missing, unknown = [k for k in own if k not in stored], [k for k in stored if k not in own]
    sizes = [
        f"{key} {tuple(stored[key].shape)} for {tuple(own[key].shape)}"
        for key in own
        if key in stored and stored[key].shape != own[key].shape
    ]
    kinds = {"missing": missing, "unknown": unknown, "of another size": sizes}
    found = "; ".join(
        f"{len(keys)} keys {kind}: {_few(keys)}" for kind, keys in kinds.items() if keys
    )
    heads = {key.partition(".")[0] for key in unknown if key.partition(".")[2] in own}
    for head in sorted(heads):
        if all(f"{head}.{key}" in stored for key in own):
            return found, (
                f"load the part of it whose keys begin with '{head}.', without that, or pass the module that "
                f"holds `{head}`"
            )
    return found, "pass the module that the checkpoint was saved from"


def lacks_numbers(answer: Mapping[str, Tensor], values: Sequence[Tensor]) -> Tensor:
    """Tell, on the device, whether losses are no numbers (NaN) because a teacher's answers hold some that are none.

    >>> import torch
    >>> nan = torch.tensor(float("nan"))
    >>> lacks_numbers({"logits": nan}, [nan]), lacks_numbers({"logits": torch.ones(1)}, [nan])
    (tensor(True), tensor(False))
    """
    sums = [value.float().sum() for value in answer.values()]
    return torch.stack(sums).isnan().any() & torch.stack([v.detach() for v in values]).isnan().any()


def not_a_number(
    answer: Mapping[str, Tensor], names: Sequence[str], precision: str, where: str
) -> AccelError:
    """Return the error for answers that hold what is no number.

    Args:
        answer: What the teachers said last.
        names: Of their classes.
        precision: In which they run.
        where: The batch.
    """
    counts = {name: (int(value.isnan().sum()), value) for name, value in answer.items()}
    held = [
        f"{bad} of {value.numel()} numbers of its `{name.partition(':')[2] or name}` {tuple(value.shape)}, in {where}"
        for name, (bad, value) in counts.items()
        if bad
    ]
    return AccelError(
        f"the teacher {', '.join(names)} gives what is no number (NaN), and the student would learn it",
        f"{'; '.join(held) or f'a batch before {where}'}; its precision is {precision!r}",
        "run it with Teacher(..., precision='32-true') where 16 bits are too short, and look at its weights and at this "
        "batch, which may hold NaN itself",
    )


def _few(keys: Sequence[str]) -> str:
    rest = len(keys) - _SHOWN
    return ", ".join(keys[:_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
