"""One job of a Hydra app: seeds, one W&B run of its own with a name, ranks that agree, no secrets left behind.

Hydra runs the jobs of a sweep one after another in one process, and three things leak between them.
Lightning starts the other ranks with the command line of the whole sweep, so that they sweep again and
may train with other values (Lightning #18175, open). It leaves `LOCAL_RANK` in the environment, which
makes the next job wait for ranks that nobody starts. And W&B merges all jobs into the run that is open.
"""

from __future__ import annotations

import math
import netrc
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

import lightning_accel
from lightning_accel.allowed import refuse_foreign_wandb
from lightning_accel.errors import AccelError, explain
from lightning_accel.provenance import withheld
from lightning_accel.redact import names_secret, redacted, unsaid

_LEFT_BY_LIGHTNING = (
    "GROUP_RANK",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "NODE_RANK",
    "PL_GLOBAL_SEED",
    "PL_SEED_WORKERS",
    "WORLD_SIZE",
)
_OF_WANDB = ("WANDB_MODE", "WANDB_NAME", "WANDB_RUN_GROUP", "WANDB_TAGS")
_LONGEST_NAME, _LONGEST_TAG = 128, 64  # more is refused by W&B, which would end the run


@contextmanager
def job(cfg: Mapping[str, Any]) -> Iterator[None]:
    """Surround the body of a `@hydra.main` function; outside of Hydra it seeds and closes W&B.

    W&B works offline when no API key is found, decided before its first init. The runs of a sweep
    share one group, the name of the sweep's folder. A run is named by what distinguishes it, the swept
    words of its command line, and its tags are its preset and its techniques. What the logger of the
    configuration says of name, tags and group goes first, and so does what `WANDB_NAME` and the like say.

    Raises:
        ValueError: A secret was given on the command line, where `ps` and the loggers would show it; or a
            file of the present folder would have W&B send the user's key to another server.

    >>> with job({"seed": 1}):
    ...     int(torch.randint(100, ()))
    45
    """
    with ExitStack() as stack:
        stack.enter_context(unsaid(withheld(cfg).secrets))
        stack.enter_context(_environment())
        stack.enter_context(_closed_wandb())
        hydra = _hydra_config()
        if hydra is not None:
            _scrub(Path(hydra.runtime.output_dir) / str(hydra.output_subdir))
            _refuse_secrets(hydra.overrides.task)
            _name_run(hydra, cfg)
            if hydra.mode is not None and hydra.mode.name == "MULTIRUN":
                stack.enter_context(_one_of_a_sweep(hydra))
        if not (os.environ.get("WANDB_MODE") or _has_wandb_key()):
            os.environ["WANDB_MODE"] = "offline"
        if os.environ.get("WANDB_MODE", "online") not in ("offline", "disabled", "dryrun"):
            refuse_foreign_wandb()
        if cfg.get("seed") is not None:
            seed_everything(seed_of(cfg["seed"]), workers=True, verbose=False)
        yield


def seed_of(value: Any, name: str = "seed") -> int:
    """Return a seed that all generators take.

    Raises:
        ValueError: It is no whole number of 32 bits.

    >>> seed_of("7")
    7
    """
    try:
        seed = int(value)
    except (TypeError, ValueError, OverflowError):
        seed = -1
    if isinstance(value, bool) or not 0 <= seed < 2**32 or seed != float(value):
        raise ValueError(
            explain(f"`{name}` is a whole number from 0 to 2**32 - 1", repr(value), f"say {name}=0")
        )
    return seed


def refuse_nan(objective: float | Sequence[float] | None) -> None:
    """Raise where a NaN would end a whole sweep with an error of another language.

    hydra-optuna-sweeper before 1.4 does (hydra #2237), and its own way to go on is for jobs that fail.

    Raises:
        AccelError: The sweeper of this job cannot take what the job returns.
    """
    values = objective if isinstance(objective, (list, tuple)) else [objective]
    hydra = _hydra_config()
    swept = hydra is not None and hydra.mode is not None and hydra.mode.name == "MULTIRUN"
    if not swept or not any(isinstance(v, float) and math.isnan(v) for v in values):
        return
    if "optuna" in str(hydra.sweeper.get("_target_")) and _version("hydra-optuna-sweeper") < (1, 4):
        raise AccelError(
            "the objective of this job is NaN, which ends a sweep of hydra-optuna-sweeper",
            f"{objective}",
            "say hydra.sweeper.max_failure_rate=1, and the sweep goes on without this job",
        )


def begin_logging(logger: Any, config: Mapping[str, Any]) -> None:
    """Log a configuration, which begins the run of a logger; a training is not ended by who only keeps its books.

    A run that W&B's server turns away, for a wrong key or because it is not there, goes on offline. Where W&B fails later, the
    training goes on without it.
    """
    try:
        logger.log_hyperparams(config)
    except Exception as error:
        if not _is_of_wandb(error):
            raise
        do = "train on; `wandb sync` sends it later"
        rank_zero_warn(
            explain("W&B does not take this run, which is kept offline", _said(error), do)
        )
        os.environ["WANDB_MODE"] = "offline"
        sys.modules["wandb"].teardown()  # else it knows the mode from before
        logger.log_hyperparams(config)
    if any(base.__name__ == "WandbLogger" for base in type(logger).__mro__):
        logger.log_metrics = partial(_logged, logger, logger.log_metrics)


def _logged(logger: Any, log: Any, *args: Any, **kwargs: Any) -> None:
    try:
        log(*args, **kwargs)
    except Exception as error:
        if not (_is_of_wandb(error) or isinstance(error, OSError)):
            raise  # a metric that is no number, say
        do = "train on; what was logged until now is in the run's folder, and other loggers go on"
        rank_zero_warn(explain("W&B has failed, and logs nothing from now on", _said(error), do))
        logger.log_metrics = lambda *_, **__: None


def _is_of_wandb(error: Exception) -> bool:
    return type(error).__module__.startswith("wandb")


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


@contextmanager
def _environment() -> Iterator[None]:
    names = (*_LEFT_BY_LIGHTNING, *_OF_WANDB)
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextmanager
def _closed_wandb() -> Iterator[None]:
    failed = True
    try:
        yield
        failed = False
    finally:
        if "wandb" in sys.modules:
            sys.modules["wandb"].finish(exit_code=int(failed))
            sys.modules["wandb"].teardown()  # else the next job keeps the name of this one


def _name_run(hydra: Any, cfg: Mapping[str, Any]) -> None:
    """Tell W&B, through the environment: what a logger is given goes before that."""
    given = [word for word in hydra.overrides.task if not word.lstrip("+").startswith("logger")]
    if hydra.mode is not None and hydra.mode.name == "MULTIRUN":
        given = [word for word in given if word not in sys.argv] or given
    name = redacted(" ".join(word.lstrip("+") for word in given)) or str(hydra.job.name)
    os.environ.setdefault("WANDB_NAME", name[:_LONGEST_NAME])
    os.environ.setdefault("WANDB_TAGS", ",".join(_tags(hydra.runtime.choices, cfg)))


def _tags(choices: Mapping[str, Any], cfg: Mapping[str, Any]) -> list[str]:
    """Return the preset, or its parts where several were chosen, and the techniques."""
    preset = choices.get("accel")
    parts = _plain(cfg.get("accel"))
    chosen = [Path(preset).stem] if isinstance(preset, str) else parts
    presets = list(chosen) if isinstance(chosen, (list, dict)) else []
    nodes = _plain(cfg.get("callbacks")) or {}
    targets = [str(node.get("_target_", "")) for node in nodes.values() if isinstance(node, dict)]
    techniques = [_folder(target) for target in targets if target.startswith("lightning_accel.")]
    found = [*presets, *sorted(set(techniques) - {"measure", "bridge"})]
    clean = [str(tag).replace(",", " ").strip()[:_LONGEST_TAG] for tag in found]
    return list(dict.fromkeys(tag for tag in clean if tag)) or ["none"]


def _folder(target: str) -> str:
    """Return the folder of a technique: `lightning_accel.StructuredPruning` is at home in `pruning`."""
    name = target.partition(".")[2]
    return lightning_accel._HOMES.get(name, name).partition(".")[0]


def _plain(node: Any) -> Any:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(node, resolve=False) if OmegaConf.is_config(node) else node


@contextmanager
def _one_of_a_sweep(hydra: Any) -> Iterator[None]:
    from omegaconf import read_write

    argv = sys.argv
    sys.argv = [argv[0], *hydra.overrides.task]
    with read_write(hydra.run):
        hydra.run.dir = hydra.runtime.output_dir
    if "WANDB_SWEEP_ID" not in os.environ:  # an agent of W&B groups by itself
        os.environ.setdefault("WANDB_RUN_GROUP", Path(hydra.sweep.dir).name)
    try:
        yield
    finally:
        sys.argv = argv
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _hydra_config() -> Any:
    from hydra.core.hydra_config import HydraConfig

    return HydraConfig.get() if HydraConfig.initialized() else None


def _version(package: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in metadata.version(package).split(".")[:2])
    except metadata.PackageNotFoundError:
        return (1, 4)  # another sweeper of that name


def _refuse_secrets(overrides: list[str]) -> None:
    for override in overrides:
        key, _, value = override.partition("=")
        if names_secret(key) and value not in ("", "null") and "${" not in value:
            raise ValueError(
                explain(
                    "a secret does not belong on the command line",
                    f"{key}=***",
                    f"put it into the environment and say '{key}=${{oc.env:NAME}}'",
                )
            )


@rank_zero_only
def _scrub(folder: Path) -> None:
    """Take the secrets out of what Hydra has already saved."""
    from omegaconf import OmegaConf

    for path in folder.glob("*.yaml"):
        saved = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        clean = redacted(saved)
        if clean != saved:
            OmegaConf.save(OmegaConf.create(clean), path)


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).netloc
    places = [os.environ.get("NETRC"), "~/.netrc", "~/_netrc"]
    for path in (Path(place).expanduser() for place in places if place):
        try:
            if path.is_file():
                return netrc.netrc(path).authenticators(host) is not None
        except (netrc.NetrcParseError, OSError):
            return False
    return False
