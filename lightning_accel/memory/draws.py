"""Which operations draw random numbers, and so give something else when they run again.

Whoever recomputes in backward must know: a dropout mask that is drawn anew belongs to another forward, and
the gradients are wrong without a word.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_SHARES = ("dropout_p", "dropout")
"""Arguments of attention kernels, which carry the tag of random operations also without any dropout."""


def draws(op: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Tell whether a call of an operation draws random numbers.

    >>> attention, x = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default, torch.ones(1)
    >>> draws(attention, (x, x, x), {}), draws(attention, (x, x, x, 0.1), {})
    (False, True)
    """
    if torch.Tag.nondeterministic_seeded not in getattr(op, "tags", ()):
        return False
    for at, argument in enumerate(op._schema.arguments):
        if argument.name in _SHARES:
            given = args[at] if at < len(args) else kwargs.get(argument.name)
            share = argument.default_value if given is None else given
            return not isinstance(share, (int, float)) or share != 0
    return True
