"""A technique that has not acted yet leaves the fit bit for bit the plain fit: one law, tables of what it is put on.

The law and its tables of techniques and situations are in `plain.py`, modules and loaders in `odd.py`.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import odd
import plain
import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision.precision import Precision
from plain import Case, Run, Team, assert_same

import lightning_accel
from lightning_accel import (
    ActivationCheckpointing,
    BlockCompile,
    Distillation,
    FrozenPredict,
    FusedOptimizer,
    MemoryFormat,
    StructuredPruning,
    WeightMasks,
)
from lightning_accel.errors import AccelError
from lightning_accel.tuning import benchmark_pool
from lightning_accel.tuning.search import Search

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # odd programs are warned of all kinds of things
    pytest.mark.usefixtures("clean_dynamo"),
]


@pytest.fixture(autouse=True)
def nothing_wins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Let a search measure single steps, and find that nothing is faster."""
    judged: list[str] = []
    judge = Search._judge

    def lose(self: Search, technique: str, *given: Any) -> Any:
        judged.append(technique)
        return judge(self, technique, *given)._replace(verdict="not taken")

    monkeypatch.setattr(Search, "_judge", lose)
    monkeypatch.setattr(benchmark_pool, "_BLOCK_S", 1e-9)
    return judged


def hold(case: Case, team: Team, kwargs: dict[str, Any], folder: Path) -> None:
    """Let a situation happen with a team and without, and compare all that is left."""

    def follow(team_: Team | None, where: Path) -> dict[str, Any]:
        where.mkdir(parents=True)
        return plain.follow(case, team_, team.beside, {**kwargs, "default_root_dir": str(where)})

    assert_same(follow(team, folder / "with"), follow(None, folder / "plain"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "team"),
    [
        pytest.param(case, team, id="-".join((*team.names, *case)), marks=[pytest.mark.slow] * slow)
        for case, team, slow in plain.cases()
    ],
)
def test_nothing_tells_a_technique_that_has_not_acted(
    trainer_kwargs: dict[str, Any], tmp_path: Path, case: Case, team: Team
) -> None:
    try:
        hold(case, team, trainer_kwargs, tmp_path)
    except AssertionError as error:
        error.add_note(f"alone: {_alone(case, team, trainer_kwargs, tmp_path)}")
        raise


def _alone(case: Case, team: Team, kwargs: dict[str, Any], folder: Path) -> dict[str, str]:
    """Try each member of a team that failed alone."""
    found = {}
    for name in team.names:
        try:
            hold(case, Team((name,)), kwargs, folder / name)
        except (AssertionError, AccelError) as error:
            found[name] = str(error)[:200]
    return found


def test_each_technique_meets_every_module_loader_and_situation() -> None:
    assert {name for team in plain.TEAMS for name in team} | {"frozen"} == {*plain.TECHNIQUES}
    met = [(n, part) for case, team, _ in plain.cases() for n in team.names for part in case]
    for name, technique in plain.TECHNIQUES.items():
        for kind in (odd.MODULES, odd.LOADERS, plain.SITUATIONS):
            missing = [p for p in kind if (name, p) not in met and p not in technique.apart]
            # Of a case in which it acts, two parts are missing; of what takes long, half of the cases.
            assert len(missing) <= (len(kind) // 2 if name in (*plain.DEAR, "frozen") else 2), (
                missing
            )


ALWAYS_ACT = {
    "Float8Linear": "computes in float8 from the first step on, or refuses",
    "Bf16Precision": "has short weights from the start",
    "XlaPrecision": "is of another device",
    "RequestedCallbacks": "is added by Lightning itself, and only where a variable asks for it",
    "ConfiguredCallbacks": "is added by Lightning itself, and only where a configuration asks for it",
    "PostTrainingQuantization": "acts at the end of a fit: the fit is compared in test_quantization.py",
    "Deploy": "acts after the fit, which is compared in test_export.py",
    "Objective": "is compared with a plain fit in test_objective.py: here, nothing logs its metric",
}


def test_every_callback_and_precision_stands_under_the_law() -> None:
    for module in pkgutil.walk_packages(lightning_accel.__path__, "lightning_accel."):
        if {"attach", "callbacks", "plugins"} & set(module.name.split(".")):
            importlib.import_module(module.name)
    known = {
        type(part).__name__
        for technique in plain.TECHNIQUES.values()
        for parts in technique.make().values()
        for part in parts
    }
    bases = {"EvaluationBatches", "ModelEdit", "Paced", "Technique"}
    ours = {c.__name__ for c in _below(Callback, Precision) if c.__name__[0] != "_"} - bases
    assert ours - known == set(ALWAYS_ACT)


def _below(*kinds: type) -> Iterator[type]:
    for kind in kinds:
        for sub in kind.__subclasses__():
            if sub.__module__.startswith("lightning_accel."):
                yield sub
            yield from _below(sub)


@pytest.mark.slow
def test_the_search_that_takes_nothing_did_search(
    trainer_kwargs: dict[str, Any], nothing_wins: list[str]
) -> None:
    run = Run(Case("Plain", "shuffled", "fit"), Team(("tune, no gain",)), {}, trainer_kwargs)
    plain.SITUATIONS["fit"](run)
    (tune,) = run.given["callbacks"]
    assert nothing_wins and tune.report.trials and not [*tune.settings.chosen()]


REFUSED: dict[str, Callable[[], Callback]] = {
    "prune": lambda: StructuredPruning(ratio=0.5, when=plain.LATER, select="nowhere"),
    "masks": lambda: WeightMasks(amount=0.5, when=99),
    "distill": lambda: Distillation(plain.teacher(), student="nowhere"),
    "compile": lambda: BlockCompile(backend="eager", select="nowhere"),
    "checkpointing": lambda: ActivationCheckpointing(select="nowhere"),
    "optimizer": lambda: FusedOptimizer("fused"),
    "format": lambda: MemoryFormat(select="nowhere"),
    "frozen": FrozenPredict,
}


@pytest.mark.parametrize("module", ["EveryHook", "Closure"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_fit_that_was_refused_can_be_begun_without_the_technique(
    trainer_kwargs: dict[str, Any], tmp_path: Path, name: str, module: str
) -> None:
    case = Case(module, "shuffled", "fit")
    if (name, module) == ("optimizer", "EveryHook"):
        pytest.skip("AdamW can run in one kernel")
    records = []
    for refused in (False, True):
        folder = tmp_path / str(refused)
        run = Run(case, None, {}, {**trainer_kwargs, "default_root_dir": str(folder)})
        if refused:
            with pytest.raises((AccelError, ValueError)):
                Trainer(**trainer_kwargs, callbacks=[REFUSED[name]()]).fit(run.module, run.loader)
            run.module.calls.clear()
        run.seed()
        plain.SITUATIONS["fit"](run)
        records.append(run.record)
    assert_same(*reversed(records))


@pytest.mark.parametrize("loader", odd.LOADERS)
def test_a_prune_in_mid_training_takes_no_batch_away(
    trainer_kwargs: dict[str, Any], tmp_path: Path, loader: str
) -> None:
    def steps(*callbacks: Callback) -> list[Any]:
        run = Run(Case("Plain", loader, "fit"), None, {}, trainer_kwargs)
        run.fit(limit_val_batches=0, callbacks=callbacks)
        return [call[:4] for call in run.module.calls]  # all but the loss

    assert steps(StructuredPruning(ratio=0.5, when=1)) == steps()
