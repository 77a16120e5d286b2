"""What a tuner says and remembers: numbers compared, settings read, reports written, read back and built."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import Tensor

from lightning_accel import AutoTune
from lightning_accel.loading import LoadingPlan
from lightning_accel.loading.choose import Candidate, LoadingChoice
from lightning_accel.measure.race import Ratio
from lightning_accel.precision import UsePrecision
from lightning_accel.recipe import build
from lightning_accel.tuning import Settings, TuneReport, data, store
from lightning_accel.tuning.numerics import (
    Difference,
    Gradients,
    check,
    curve_gap,
    curve_verdict,
    difference,
    verdict,
)
from lightning_accel.tuning.report import BatchRate, Trial, WaterfallStep
from lightning_accel.tuning.settings import _APPLIED
from lightning_accel.tuning.sizes import resize

EVERY = [
    Settings(**{name: value})
    for name, technique in _APPLIED.items()
    for value in (technique.tunable if technique is not None else ())
]
MANY = Settings(
    memory="0.5",
    precision="bf16-mixed",
    matmul_precision="medium",
    fused_optimizer="fused",
    loading=LoadingPlan(in_memory=True),
)
ENDINGS = (".yaml", ".yml", ".json", ".svg", ".md", ".txt")
STILL = Difference(0.0, 1.0, 1.0)


def full() -> TuneReport:
    return TuneReport(
        MANY,
        [WaterfallStep("plain", 8.0), WaterfallStep("+ bf16 & <more>", 4.0, 2.0, 1.9, 2.1, 2.0)],
        [
            Trial("precision", "bf16-mixed", "taken", "", 2.0, 1.9, 2.1),
            Trial("compilation", "whole", "not taken", "pays late", 1.1, 1.0, 1.2, 30.5, 9000),
            Trial("precision", "16-mixed", "skipped", "slow"),
        ],
        [BatchRate(8, 100.5), BatchRate(4096, None, "out of memory")],
        (1.01, 0.99, 1.02),
        steps=5000,
        numerics="low",
        seconds=31.25,
        about={"device": "a CPU", "torch": "2.13", "threads": 2},
        notes=["one", "two"],
    )


def gradients(loss: float = 2.0, **by_name: list[float]) -> Gradients:
    return Gradients(loss, {name: torch.tensor(value) for name, value in by_name.items()})


def test_the_cosine_is_that_of_all_gradients_in_one_vector() -> None:
    torch.manual_seed(0)
    one = {name: torch.randn(4, 3) for name in "abc"}
    two = {name: g + 0.3 * torch.randn(4, 3) for name, g in one.items()}
    flat = [torch.cat([g.flatten() for g in held.values()]) for held in (one, two)]
    found = difference(Gradients(2.0, one), Gradients(2.5, two))
    cosine = torch.nn.functional.cosine_similarity
    assert found.cosine == pytest.approx(float(cosine(*flat, dim=0)), abs=1e-6)
    each = {n: float(cosine(one[n].flatten(), two[n].flatten(), dim=0)) for n in one}
    assert found.where == min(each, key=each.__getitem__)
    assert found.worst == pytest.approx(min(each.values()), abs=1e-6)
    assert found.loss == pytest.approx(0.25)


@pytest.mark.parametrize(
    "other",
    [
        gradients(2.0, a=[-1.0, 0.0], b=[1.0]),
        gradients(2.0, a=[math.nan, 0.0], b=[1.0]),
        gradients(2.0, a=[math.inf, 0.0], b=[1.0]),
        gradients(2.0, a=[0.0, 0.0], b=[1.0]),
        gradients(2.0, b=[1.0]),
        gradients(2.0),
        gradients(math.nan, a=[1.0, 0.0], b=[1.0]),
        gradients(math.inf, a=[1.0, 0.0], b=[1.0]),
        gradients(4.0, a=[1.0, 0.0], b=[1.0]),
    ],
)
def test_what_computes_something_else_passes_no_tier(other: Gradients) -> None:
    plain = gradients(2.0, a=[1.0, 0.0], b=[1.0])
    found = difference(plain, other)
    for tier in ("exact", "amp", "low"):
        assert verdict(found, STILL, tier) is not None
        assert verdict(difference(plain, plain), STILL, tier) is None


def test_a_gradient_of_rounding_does_not_count() -> None:
    plain = gradients(2.0, weight=[1.0, 2.0], bias=[1e-9, -2e-9])
    other = gradients(2.0, weight=[1.0, 2.0], bias=[-3e-9, 1e-9])
    assert verdict(difference(plain, other), STILL, "exact") is None


def test_a_loss_that_is_not_finite_in_plain_either_is_no_difference() -> None:
    for loss in (math.nan, math.inf):
        same = difference(gradients(loss, a=[1.0]), gradients(loss, a=[1.0]))
        assert verdict(same, STILL, "exact") is None


def test_a_step_without_a_gradient_equals_itself() -> None:
    """A satisfied hinge loss has a gradient of zeros; frozen modules have none."""
    for one in (gradients(0.0, a=[0.0, 0.0]), gradients(0.0)):
        found = difference(one, one)
        assert found.cosine == 1.0 and verdict(found, STILL, "exact") is None
    none, some = gradients(0.0, a=[0.0, 0.0]), gradients(0.0, a=[1.0, 0.0])
    assert verdict(difference(none, some), STILL, "low") is not None


def test_tiers_are_nested_and_noise_widens_each() -> None:
    found = Difference(8e-3, 0.995, 0.95, "w")
    assert [verdict(found, STILL, t) is None for t in ("exact", "amp", "low")] == [
        False, True, True
    ]  # fmt: skip
    noise = Difference(0.1, 0.9, 0.9)
    assert verdict(found, noise, "exact") is None
    assert verdict(Difference(0.31, 1.0, 1.0), noise, "amp") is not None
    assert verdict(Difference(0.0, 0.6, 0.9), noise, "low") is not None


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=20), st.floats(0.5, 2))
@settings(max_examples=40, deadline=None)
def test_a_curve_is_as_far_from_another_as_its_moving_average(
    losses: list[float], factor: float
) -> None:
    plain = [torch.tensor(v) for v in losses]
    other = [torch.tensor(v * factor) for v in losses]
    average = losses[0]
    for loss in losses[1:]:
        average = 0.8 * average + 0.2 * loss
    gap = curve_gap(plain, other)
    assert gap == pytest.approx(abs(factor - 1) * average / losses[0], rel=1e-3, abs=1e-5)
    assert (curve_verdict(gap, 0.0) is None) == (gap <= 0.01)
    assert curve_verdict(gap, gap) is None


def test_a_curve_that_breaks_is_infinitely_far() -> None:
    fine: list[Tensor] = [torch.tensor(1.0)] * 3
    broken = [torch.tensor(1.0), torch.tensor(math.nan), torch.tensor(1.0)]
    assert curve_gap(fine, broken) == math.inf == curve_gap(broken, fine)
    assert curve_gap(broken, broken) == 0.0
    assert curve_gap([], fine) == 0.0 and curve_gap(fine, fine[:1]) == 0.0
    assert "inf" in str(curve_verdict(math.inf, 0.1))


@pytest.mark.parametrize("name", [None, "", "AMP", 3, ["amp"], float("nan")])
def test_an_unknown_tier_is_refused(name: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"Found: .*Do: .*'exact'"):
        check(name)


@pytest.mark.parametrize("chosen", [*EVERY, MANY, Settings()], ids=lambda s: s.label)
def test_settings_are_read_back_and_built(chosen: Settings) -> None:
    assert Settings.from_dict(json.loads(json.dumps(chosen.to_dict()))) == chosen
    report = TuneReport(chosen)
    made = report.trainer_arguments()
    assert all(isinstance(callback, Callback) for callback in made["callbacks"])
    assert len(made["callbacks"]) == len(chosen.to_dict())
    again = report.trainer_arguments()
    assert not {id(c) for c in made["callbacks"]} & {id(c) for c in again["callbacks"]}
    assert chosen.label and (chosen.label == "plain") == (chosen == Settings())


@pytest.mark.parametrize(
    "odd",
    [
        {"precision": None},
        {"precision": "bf17"},
        {"precision": ""},
        {"precision": ["bf16-mixed"]},
        {"fused_optimizer": True},
        {"matmul_precision": 3},
        {"loading": 3},
        {"loading": ""},
        {"loading": "3 bananas"},
        {"loading": {"bananas": 3}},
        {"loading": {"num_workers": -1}},
        {"loading": {"num_workers": "2"}},
        {"loading": {}},
        {"memory": 0.5},
        {"memory": "abc"},
        {"memory": "nan"},
        {"memory": "7"},
        {"memory": "-0.5"},
        {"memory": ""},
    ],
    ids=str,
)
def test_settings_that_cannot_be_meant_are_refused(odd: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError), match=r"Found: .*Do: "):
        Settings(**odd)
    with pytest.raises(ValueError, match="Do: "):
        TuneReport.from_dict({**full().to_dict(), "settings": odd})


def test_a_report_is_read_back_as_it_was() -> None:
    report = full()
    assert TuneReport.from_dict(json.loads(report.to_json())) == report
    assert TuneReport.from_dict(TuneReport().to_dict()).to_dict() == TuneReport().to_dict()
    assert report.ratio == 2.0 and report.step_ms == 8.0


@pytest.mark.parametrize("report", [full(), TuneReport(notes=["not tuned: why"])])
def test_every_form_is_written(tmp_path: Path, report: TuneReport) -> None:
    for ending in ENDINGS:
        path = report.save(tmp_path / "deep" / f"r{ending}")
        assert path.read_text().strip() and "None" not in path.read_text()
    if report.bars:
        text = (tmp_path / "deep" / "r.txt").read_text()
        for part in ("2.00x", "pays late", "out of memory", "1.01x", "two", "memory budget 0.5"):
            assert part in text
        svg = (tmp_path / "deep" / "r.svg").read_text()
        assert "&lt;more&gt;" in svg and "<more>" not in svg
    for name in ("r.docx", "r", ".yaml"):
        with pytest.raises(ValueError, match=r"Found: .*Do: "):
            report.save(tmp_path / name)


def test_every_gain_stands_beside_its_interval_and_the_race_it_is_from() -> None:
    table = full().table()
    column = {name: [row[i] for row in table.rows] for i, name in enumerate(table.columns)}
    assert column["gain"] == ["2.00x", "1.10x", None]
    assert column["95 % interval"] == ["1.90 to 2.10", "1.00 to 1.20", None]
    assert "race" in table.notes[0] and not TuneReport().table().notes


def test_ways_of_loading_are_told_with_their_gains_and_reasons(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ways = (
        Candidate("as is", (10.0,)),
        Candidate("resident", (5.6,), gain=Ratio(1.79, 1.7, 1.8)),
        Candidate(
            "workers=1", (7.8,), gain=Ratio(1.29, 1.2, 1.3), reason="another way is faster still"
        ),
        Candidate("workers=2", (140.0,), gain=Ratio(0.07, 0.06, 0.08), reason="slower: 0.07x"),
        Candidate("pinned", skipped="no CUDA"),
    )
    choice = LoadingChoice("resident", 1.79, "", ways, LoadingPlan(in_memory=True))
    monkeypatch.setattr(data, "choose", lambda *_, **__: choice)
    monkeypatch.setattr(data, "_only_loader", lambda trainer: object())
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")))
    value, gain, trials = data.choose_loading(trainer, 1.0, 1.0)  # type: ignore[arg-type]
    assert (value, gain) == (LoadingPlan(in_memory=True), 1.79)
    assert trials == [
        Trial("loading", "resident", "taken", "", 1.79, 1.7, 1.8),
        Trial("loading", "workers=1", "not taken", "another way is faster still", 1.29, 1.2, 1.3),
        Trial("loading", "workers=2", "not taken", "slower: 0.07x", 0.07, 0.06, 0.08),
        Trial("loading", "pinned", "skipped", "no CUDA"),
    ]


@pytest.mark.parametrize(
    "chosen", [Settings(precision="bf16-mixed", matmul_precision="medium", fused_optimizer="fused")]
)
def test_the_preset_builds_the_same_trainer(tmp_path: Path, chosen: Settings) -> None:
    import yaml

    text = TuneReport(chosen, about={"device": "line\nbreak: {x", "torch": "2.13"}).to_yaml()
    preset = yaml.safe_load(text)
    assert text.startswith("# @package _global_\n")
    trainer = {
        "_target_": "lightning.pytorch.Trainer", "accelerator": "cpu", "logger": False,
        "enable_checkpointing": False,
    }  # fmt: skip
    model = {"_target_": f"{BoringModel.__module__}.BoringModel"}
    run = build({**preset, "trainer": trainer, "model": model}, allow=("lightning.pytorch.demos.",))
    by_hand = TuneReport(chosen).trainer_arguments()
    names = {type(c).__name__ for c in run.trainer.callbacks}  # type: ignore[attr-defined]
    assert names >= {type(c).__name__ for c in by_hand["callbacks"]} and len(names) >= 2
    (use,) = [c for c in run.trainer.callbacks if isinstance(c, UsePrecision)]  # type: ignore[attr-defined]
    (mine,) = [c for c in by_hand["callbacks"] if isinstance(c, UsePrecision)]
    assert type(use.plugin) is type(mine.plugin) and use.plugin.requested == mine.plugin.requested
    assert yaml.safe_load(TuneReport().to_yaml()) == {}


@pytest.mark.parametrize(
    ("file", "technique", "value"),
    [
        ("precision/bf16", "precision", "bf16-mixed"),
        ("precision/fp16", "precision", "16-mixed"),
        ("precision/channels_last", "memory_format", "channels_last"),
        ("precision/float8", "float8", "tensorwise"),
        ("loop/fused", "fused_optimizer", "fused"),
        ("attention/flash", "attention", "flash"),
        ("attention/math", "attention", "math"),
        ("compilation/blocks", "compilation", "blocks"),
        ("compilation/whole", "compilation", "whole"),
        ("memory/budget", "memory", "0.5"),
    ],
)
def test_a_tuned_preset_has_the_nodes_of_our_presets_under_the_same_keys(
    root: Path, file: str, technique: str, value: str
) -> None:
    import yaml

    text = (root / "conf" / "accel" / f"{file}.yaml").read_text()
    assert f"@package callbacks.{technique}\n" in text
    ours, tuned = yaml.safe_load(text), Settings(**{technique: value}).nodes()[technique]
    assert (
        ours | {"implementation": value} == tuned
        if technique == "fused_optimizer"
        else ours == tuned
    )


DAMAGES: list[Any] = [
    None, [], 3, "text", {}, {"format": 0}, {"format": None},
    *({"settings": v} for v in (None, [], "x", {"precision": "x"}, {"odd": "x"}, {1: "x"})),
    *({"bars": v} for v in (None, 3, [None], ["ab"], [{"label": "x"}], [{"odd": 1}])),
    {"bars": [{"label": "x", "step_ms": None}]},
    {"bars": [{"label": "x", "step_ms": "1"}]},
    {"bars": [{"label": "x", "step_ms": 1.0, "ratio": None}]},
    *({"trials": v} for v in (None, [[1]], [{"technique": "x"}])),
    {"trials": [{"technique": "x", "value": "y", "verdict": "taken", "ratio": "fast"}]},
    *({"rates": v} for v in (None, [{"batch_size": "x", "samples_per_s": 1.0}])),
    *({"resolution": v} for v in (None, [], [1.0], ["a", "b", "c"])),
    {"steps": "x"}, {"steps": None}, {"seconds": "x"}, {"numerics": "odd"}, {"numerics": None},
    {"about": None}, {"about": 3}, {"notes": None}, {"notes": 3},
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=str)
def test_a_damaged_report_is_refused_and_as_an_answer_a_miss(tmp_path: Path, damage: Any) -> None:
    whole = full().to_dict()
    plain = {**whole, **damage} if isinstance(damage, dict) and damage else damage
    with pytest.raises(ValueError, match=r"no report of a tuner.*Found: .*Do: "):
        TuneReport.from_dict(plain)
    (tmp_path / "key.json").write_text(json.dumps(plain))
    assert store.load(tmp_path, "key") is None
    for key in whole:
        if key not in ("ratio",):
            with pytest.raises(ValueError, match="no report"):
                TuneReport.from_dict({k: v for k, v in whole.items() if k != key})


def test_an_answer_is_kept_and_found(tmp_path: Path) -> None:
    assert store.load(tmp_path / "none", "key") is None
    assert store.save(tmp_path / "deep" / "er", "key", full()) is None
    found = store.load(tmp_path / "deep" / "er", "key")
    assert found is not None and found.cached and found.settings == MANY
    (tmp_path / "file").write_text("")
    assert "could not be kept" in str(store.save(tmp_path / "file", "key", full()))
    (tmp_path / "taken" / "key.json").mkdir(parents=True)
    assert "could not be kept" in str(store.save(tmp_path / "taken", "key", full()))
    assert store.load(tmp_path / "taken", "key") is None
    assert [p.name for p in (tmp_path / "taken").iterdir()] == ["key.json"]  # and no remains


@pytest.mark.parametrize("size", [1, 3, 4, 9])
@pytest.mark.parametrize("net", [tiny.MLP, tiny.ConvNet])
def test_a_resized_batch_repeats_or_cuts_the_samples(net: Any, size: int) -> None:
    x, y = tiny.INPUTS[net](), torch.arange(4)
    found = resize({"x": x, "deep": [y, "name", torch.tensor(3.0), torch.ones(7, 2)]}, size)
    rows = torch.arange(size) % 4
    assert torch.equal(found["x"], x[rows]) and torch.equal(found["deep"][0], y[rows])
    assert found["deep"][1] == "name" and found["deep"][2].dim() == 0
    assert found["deep"][3].shape == (7, 2)


BAD: dict[str, list[Any]] = {
    "numerics": [None, "", 3, "AMP"],
    "budget_s": [0, -1, math.nan, None, "60", True, [60]],
    "budget_share": [0, -1, math.nan, None, "x"],
    "techniques": ["", [], (), ["x"], 3, [3], b"precision", ["precision", "x"]],
    "batch_sizes": [None, 0, [0], [-1], ["8"], [1.5], "8", [True], torch.tensor([8])],
    "report": [None, "", 3, ["x.docx"], [3], "x", b"x.yaml"],
    "cache": [None, "", 3, 0, 1.5],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, vs in BAD.items() for v in vs])
def test_every_argument_that_cannot_be_meant_is_refused(name: str, value: Any) -> None:
    with pytest.raises((ValueError, TypeError), match=r"Found: .*Do: "):
        AutoTune(**{name: value})


@pytest.mark.parametrize(
    "fine",
    [
        {"techniques": frozenset({"precision"})},
        {"techniques": {"precision": 1}.keys()},
        {"techniques": "precision"},
        {"budget_s": math.inf},
        {"budget_share": 1e-9},
        {"batch_sizes": (8, 16)},
        {"report": [Path("a.yaml"), "b.svg"]},
        {"cache": Path("answers")},
    ],
    ids=str,
)
def test_what_can_be_meant_is_taken(fine: dict[str, Any]) -> None:
    assert AutoTune(**fine).settings == Settings()
