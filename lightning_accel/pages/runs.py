"""What a run left in its folder, read by someone who trusts nothing in it: half-written files, old ones, odd types.

A run is a folder with a `report.json`, or with the file of progress of a fit that goes on. What lies beside is read
too: Hydra's overrides, a tuner's JSON, the JSON of `lightning-accel plan`, the manifest of a bundle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_accel.errors import explain
from lightning_accel.measure.progress import ENDING, KEY
from lightning_accel.measure.report import Report
from lightning_accel.redact import redacted

_LARGEST = 64 * 2**20
_MOST_FOLDERS = 20_000
_SKIPPED = {"checkpoints", "wandb", "node_modules", "__pycache__"}


@dataclass
class Run:
    """One run as it was found; what is missing or damaged is empty, and `problems` says so.

    >>> Run(Path("runs/a"), report={"dense": {"params": 3}}).sides().dense.params
    3
    """

    folder: Path
    file: Path | None = None
    name: str = ""
    report: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    overrides: list[str] = field(default_factory=list)
    tuning: dict[str, Any] = field(default_factory=dict)
    plan: dict[str, Any] = field(default_factory=dict)
    bundle: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def place(self) -> str:
        """Where it is, without the folders above, which are nobody's business."""
        return "/".join(part for part in (self.file or self.folder).parts[-2:] if part != "/")

    @property
    def is_unreadable(self) -> bool:
        """Whether there is a file, and nothing of a run in it."""
        return self.file is not None and not self.report and not self.progress

    def sides(self) -> Report:
        """Return the report, with what is damaged left out."""
        plain: dict[str, Any] = {"dense": {}, "final": {}, "ratios": {}}
        for side in ("dense", "final"):
            given = mapping(self.report.get(side))
            plain[side] = {k: real(given.get(k)) for k in ("params", "macs", "steps_per_s")}
            plain[side] |= {k: reals(given.get(k)) for k in ("latency_ms", "metrics")}
        given = mapping(self.report.get("ratios"))
        plain["ratios"] = {k: real(given.get(k)) for k in ("params", "macs", "steps_per_s")}
        plain["ratios"]["latency"] = reals(given.get("latency"))
        rest = {k: v for k, v in self.report.items() if k not in plain}
        epochs = {"dense_validated_after_epoch", "final_validated_after_epoch"}
        rest = {k: reals(v) if k in epochs else v for k, v in rest.items()}
        rest["notes"] = texts(rest.get("notes"))
        rest["dense_metrics_after_epoch"] = real(rest.get("dense_metrics_after_epoch"))
        return Report.from_dict({**plain, **rest})

    def numbers(self) -> dict[str, float]:
        """Return every number that runs are compared by, under the names of `Report.flat` without `report/`."""
        flat = {key.removeprefix("report/"): v for key, v in self.sides().flat().items()}
        for key, value in reals(self.report.get("memory")).items():
            flat[f"memory_{key}"] = value
        return flat

    def history(self) -> dict[str, list[tuple[float, float | None]]]:
        """Return metrics by epoch; `None` stands for what is no finite number."""
        found = mapping(self.report.get("history")) or mapping(self.progress.get("history"))
        return {
            str(name): [(epoch, real(p[1])) for p in points if (epoch := _epoch(p)) is not None]
            for name, points in found.items()
            if isinstance(points, list)
        }

    def timeline(self) -> list[dict[str, Any]]:
        """Return what was done, in order."""
        found = self.report.get("timeline") or self.progress.get("timeline")
        return objects(found)

    def edits(self) -> list[float]:
        """Return the epochs before which the network was edited."""
        found = [edit.get("epoch") for edit in objects(self.report.get("edits"))]
        found += [e.get("epoch") for e in self.timeline() if e.get("num_changes") and e.get("step")]
        known = (real(epoch) for epoch in found)
        return sorted({float(epoch) for epoch in known if epoch is not None})


def read_run(path: str | Path, root: Path | None = None) -> Run:
    """Read one run: its folder, or its `report.json`.

    Args:
        path: Where it is.
        root: A folder that links may not lead out of.

    Raises:
        ValueError: There is no run.
    """
    path = Path(path)
    file, moving = _files(path)
    if file is None and moving is None:
        raise ValueError(
            explain(
                "there is no run here: neither a report.json nor the progress of a fit",
                str(path),
                "name the folder of a run, or one that has runs in it",
            )
        )
    folder = (file or moving or path).parent
    run = Run(folder, file, folder.name or str(folder.resolve().name))
    if file is not None:
        run.report = _json(file, run.problems, root)
        if run.report and not {"dense", "final"} & set(run.report):
            run.problems.append(f"{file.name} is no report of this package")
            run.report = {}
    if moving is not None:
        run.progress = _json(moving, [], root)
        run.progress = run.progress if KEY in run.progress else {}
    if run.progress and run.report:
        # Progress goes when a fit has its report, so that this one is another fit's.
        run.problems.append("report.json is of an earlier fit, and not shown")
        run.report = {}
    _read_beside(run, root)
    return run


def find_runs(folder: str | Path) -> list[Run]:
    """Read every run below a folder, in the order of their paths; links are not followed.

    Names are what tells runs apart: their overrides where they have some, or else their paths below the folder.
    """
    root = Path(folder)
    runs = [read_run(path, root.resolve()) for path in sorted(_folders(root), key=_natural)]
    for run in runs:
        inner = run.folder.relative_to(root).as_posix()
        run.name = inner if inner != "." else root.resolve().name
    name_apart(runs)
    return runs


def signature(folder: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a run below a folder does: names, times and sizes of its files, none of them read."""
    found = []
    for inner in _folders(folder):
        for path in (*inner.glob("*.json"), *inner.glob("bundle/manifest.json")):
            with suppress(OSError):  # it may go while we look
                known = path.stat()
                found.append((str(path), known.st_mtime_ns, known.st_size))
    return tuple(sorted(found))


def gather(paths: Sequence[str | Path]) -> list[Run]:
    """Read the runs that somebody named: each a run, or a folder with runs in it.

    Raises:
        ValueError: There is none in one of them.
    """
    found: list[Run] = []
    for path in map(Path, paths):
        inner = find_runs(path) if path.is_dir() else []
        if not inner:  # says what is wrong, and reads a report of another name
            inner = [read_run(path)]
        found += inner
    unique = list({run.file or run.folder: run for run in found}.values())
    name_apart(unique)
    return unique


def name_apart(runs: Sequence[Run]) -> None:
    """Give each run a name of its own.

    >>> runs = [Run(Path("x/a"), name="a"), Run(Path("y/a"), name="a"), Run(Path("y/a"), name="a")]
    >>> name_apart(runs)
    >>> [run.name for run in runs]
    ['x/a', 'y/a', 'y/a (2)']
    """
    swept = _swept(runs)
    if len(runs) > 1 and all(swept) and len(set(swept)) == len(runs):
        for run, words in zip(runs, swept, strict=True):
            run.name = words
        return
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = "/".join(run.folder.parts[-2:])
    seen: dict[str, int] = {}
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        run.name += f" ({seen[run.name]})" if seen[run.name] > 1 else ""


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping, an empty one for anything else.

    >>> mapping([1])
    {}
    """
    return value if isinstance(value, Mapping) else {}


def real(value: Any) -> float | None:
    """Return a finite number, or `None`.

    >>> real(3), real(True), real("3"), real(float("nan"))
    (3, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return value if abs(value) <= 1e300 else None


def reals(value: Any) -> dict[str, float]:
    """Return the finite numbers of a mapping.

    >>> reals({"a": 1, "b": None})
    {'a': 1}
    """
    known = {str(key): real(item) for key, item in mapping(value).items()}
    return {key: item for key, item in known.items() if item is not None}


def texts(value: Any) -> list[str]:
    """Return the lines of a list.

    >>> texts(["a", 3]), texts(None)
    (['a', '3'], [])
    """
    return [str(item) for item in value] if _is_list(value) else []


def objects(value: Any) -> list[dict[str, Any]]:
    """Return the objects of a list.

    >>> objects([{"a": 1}, 3]), objects("x")
    ([{'a': 1}], [])
    """
    return [item for item in value if isinstance(item, dict)] if _is_list(value) else []


def _files(path: Path) -> tuple[Path | None, Path | None]:
    """Return the report of a run and the file of its progress."""
    if path.is_file():
        return path, None
    if not path.is_dir():
        return None, None
    moving = sorted(path.glob(f"*{ENDING}"))
    named = [p.with_name(p.name.removesuffix(ENDING) + ".json") for p in moving]
    reports = [p for p in (path / "report.json", *named, *_numbered(path)) if p.is_file()]
    return (reports[0] if reports else None), (moving[0] if moving else None)


def _numbered(folder: Path) -> list[Path]:
    return sorted(folder.glob("report-[0-9]*.json"), reverse=True)


def _read_beside(run: Run, root: Path | None) -> None:
    tuning = run.report.get("tuning")
    run.tuning = dict(tuning) if isinstance(tuning, dict) else {}
    for path in sorted(run.folder.glob("*.json")):
        if path == run.file or path.name.endswith(ENDING):
            continue
        found = _json(path, [], root)
        if _is_list(found.get("bars")) and _is_list(found.get("trials")) and not run.tuning:
            run.tuning = found
        elif _is_list(found.get("groups")) and "change_of" in found:
            run.plan = found
    for name in ("bundle", "."):
        found = _json(run.folder / name / "manifest.json", [], root)
        if _is_list(found.get("candidates")) and "formats" in found:
            run.bundle = found
            break
    run.overrides = _overrides(run.folder / ".hydra" / "overrides.yaml", root)


def _overrides(path: Path, root: Path | None) -> list[str]:
    if not _is_within(path, root) or not path.is_file() or path.stat().st_size > 2**20:
        return []
    import yaml

    try:
        words: list[str] = redacted(texts(yaml.safe_load(path.read_text(encoding="utf-8"))))
        return words  # pages are sent to others
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return []


def _json(path: Path, problems: list[str], root: Path | None) -> dict[str, Any]:
    """Read an object; what cannot be read is a problem, and no error."""
    try:
        if not path.is_file():
            return {}
        if not _is_within(path, root):
            raise ValueError("a link that leads out of the folder")
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"larger than {_LARGEST >> 20} MiB")
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no object")
        return found
    except (OSError, ValueError, RecursionError) as error:
        problems.append(f"{path.name} could not be read: {str(error) or type(error).__name__}")
        return {}


def _is_within(path: Path, root: Path | None) -> bool:
    return root is None or path.resolve().is_relative_to(root)


def _folders(root: Path) -> Iterator[Path]:
    """Yield the folders with a run in them; a bundle, checkpoints and hidden folders have none."""
    for looked, (folder, inner, files) in enumerate(os.walk(root, followlinks=False)):
        inner[:] = [n for n in inner if n not in _SKIPPED and not n.startswith(".")]
        if looked > _MOST_FOLDERS:
            return
        if any(name == "report.json" or name.endswith(ENDING) for name in files):
            yield Path(folder)


def _natural(path: Path) -> list[Any]:
    """Sort 2 before 10."""
    return [(not part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.parts]


def _swept(runs: Sequence[Run]) -> list[str]:
    """Return the overrides in which each run differs, by the last word of their keys where that tells them apart."""
    given = [dict.fromkeys(run.overrides) for run in runs]
    shared = set.intersection(*map(set, given)) if given else set()
    differing = [[word for word in words if word not in shared] for words in given]
    keys = {word.partition("=")[0] for words in differing for word in words}
    ends = {key: key.lstrip("+~").rpartition(".")[2] for key in keys}
    short = ends if len(set(ends.values())) == len(keys) else {key: key for key in keys}

    def spelled(word: str) -> str:
        key, equals, value = word.partition("=")
        return f"{short[key]}{equals}{value}"

    return [" ".join(map(spelled, words)) for words in differing]


def _epoch(point: Any) -> float | None:
    return real(point[0]) if isinstance(point, list) and len(point) == 2 else None


def _is_list(value: Any) -> bool:
    return isinstance(value, list)
