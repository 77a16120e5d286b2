"""Errors a user can act on: what was wrong, what was found, what to do.

`ValueError` and `TypeError` are for arguments; the classes here are for situations of a model or a
Trainer. All of them carry the same three parts, joined by `explain`.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def explain(what: str, found: str = "", do: str = "") -> str:
    """Join the three parts of an error message.

    >>> explain("`ratio` must lie between 0 and 1", "1.5", "pass the share to remove, such as 0.5")
    '`ratio` must lie between 0 and 1. Found: 1.5. Do: pass the share to remove, such as 0.5.'
    """
    parts = [what, f"Found: {found}" if found else "", f"Do: {do}" if do else ""]
    return " ".join(part.strip().rstrip(".") + "." for part in parts if part.strip())


class AccelError(RuntimeError):
    """A situation of the model or the Trainer in which we stop rather than do something wrong.

    Args:
        what: What was wrong.
        found: What was found.
        do: What the user can do about it.
    """

    def __init__(self, what: str, found: str = "", do: str = "") -> None:
        super().__init__(explain(what, found, do))


class NoEffect(AccelError):
    """An edit that was asked for changed nothing: nothing matched, or nothing could be done."""


class Unsupported(AccelError):
    """The technique cannot work in this situation; the message names the alternative."""


class BrokenModel(AccelError):
    """The edited network no longer works; the original one was left as it was."""


class StructureMismatch(AccelError):
    """A stored structure does not describe this model or its tensors."""


class UnsafeFile(AccelError):
    """A checkpoint holds objects, and reading them would run code of the file's author."""


@contextmanager
def weights_alone(path: str | Path) -> Iterator[None]:
    """Say what stands in the way where `torch.load` refuses a file, mostly saved hyper-parameters.

    Raises:
        UnsafeFile: The file holds more than tensors and plain values.
    """
    try:
        yield
    except pickle.UnpicklingError as error:
        from torch.serialization import get_unsafe_globals_in_checkpoint

        found = get_unsafe_globals_in_checkpoint(path) if Path(path).is_file() else []
        found = sorted(found, key=lambda name: (name.startswith("builtins."), name))
        raise UnsafeFile(
            "a checkpoint holds more than weights and plain values, and so would be run as a program",
            f"{', '.join(found[:4]) or str(error).splitlines()[0]} in {path}",
            "keep such things out of it, `self.save_hyperparameters(ignore=[...])`; for a file that you trust "
            "say `load_from_checkpoint(Module, path, weights_only=False)`, or take out its weights once: "
            "`torch.save(torch.load(path, weights_only=False)['state_dict'], 'weights.pt')`",
        ) from None
