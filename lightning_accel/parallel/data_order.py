"""A training DataLoader keeps its order: Lightning shuffles one with `shuffle=False` under every distributed strategy.

`_process_dataloader` of Lightning 2.6 passes `shuffle=True` for training whatever the user's loader does (its
`data_connector.py`). So "the same script on two devices" is another order of data; here it is the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, SequentialSampler

_METHOD = "_prepare_dataloader"


def keep_order(trainer: Trainer) -> None:
    """Let the loaders of this Trainer that read in order do so on all processes together."""
    connector = trainer._data_connector
    if _METHOD not in vars(connector):
        vars(connector)[_METHOD] = partial(_prepared, getattr(connector, _METHOD))


def _prepared(prepare: Any, dataloader: Any, shuffle: bool, mode: Any) -> Any:
    in_order = isinstance(dataloader, DataLoader) and type(dataloader.sampler) is SequentialSampler
    return prepare(dataloader, shuffle=shuffle and not in_order, mode=mode)
