"""What a user passes to a tuner, checked where it comes in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils._pytree import tree_leaves

from lightning_accel.arguments import whole
from lightning_accel.errors import explain
from lightning_accel.pages.plots import ENDINGS, check_ending


def sizes_of(sizes: Any) -> tuple[int, ...]:
    """Return batch sizes.

    >>> sizes_of([32, 64])
    (32, 64)
    """
    if isinstance(sizes, (str, bytes)) or not isinstance(sizes, Sequence):
        raise TypeError(
            explain("`batch_sizes` is a list of sizes", repr(sizes), "pass some, such as [64, 128]")
        )
    return tuple(whole("batch_sizes", size) for size in sizes)


def path_of(report: Any) -> tuple[Path, ...]:
    """Return the files of a report, whose endings say what they will be.

    >>> path_of("tuned.yaml")
    (PosixPath('tuned.yaml'),)
    """
    given = [report] if isinstance(report, (str, Path)) else report
    if not isinstance(given, Sequence) or not all(isinstance(p, (str, Path)) for p in given):
        raise TypeError(explain("`report` is a file or several", repr(report), "pass 'tuned.yaml'"))
    known = (".yaml", ".yml", ".json", ".svg", ".png", ".pdf", ".md", ".txt")
    for path in given:
        if Path(path).suffix not in known:
            raise ValueError(
                explain("unknown form of a report", repr(str(path)), f"end in {', '.join(known)}")
            )
        if Path(path).suffix in ENDINGS:
            check_ending(Path(path))
    return tuple(Path(path) for path in given)


def folder_of(cache: Any, default: Path) -> Path | None:
    """Return the folder of earlier answers, or `None` for no cache.

    >>> folder_of(False, Path("answers")) is None
    True
    """
    if isinstance(cache, bool):
        return default if cache else None
    if not isinstance(cache, (str, Path)) or not str(cache):
        raise TypeError(
            explain("`cache` is a folder, true or false", repr(cache), "pass 'tuning_cache'")
        )
    return Path(cache).expanduser()


def readable(data: Any) -> Any:
    """Return what `Trainer.fit` can read: a LightningDataModule, or something to iterate, or several in a tree.

    >>> readable([range(3), {"a": [range(2)]}])
    [range(0, 3), {'a': [range(0, 2)]}]
    """
    leaves = [] if hasattr(data, "train_dataloader") else tree_leaves(data)
    wrong = [d for d in leaves if isinstance(d, (str, bytes)) or not hasattr(d, "__iter__")]
    if wrong and data is not None:
        raise TypeError(
            explain(
                "`data` is a DataLoader, several, or a LightningDataModule",
                repr(wrong[0])[:80],
                "pass what `Trainer.fit` takes, or `None` where the module brings its own",
            )
        )
    return data
