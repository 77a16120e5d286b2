"""Configuration to Trainer: what is refused, in what order things come, and what leaks nowhere."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any, ClassVar

import hydra
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_object
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, ListConfig, OmegaConf

from lightning_accel.bridge.technique import Technique
from lightning_accel.errors import AccelError, Unsupported
from lightning_accel.job import _tags as tags_of
from lightning_accel.job import job
from lightning_accel.recipe import ALLOWED, Run, build, prepare_teacher
from lightning_accel.redact import HIDDEN, redacted
from lightning_accel.surgery import Stage

ROOT = Path(__file__).resolve().parents[1]


class Toy(LightningModule):
    """Keeps what it was given."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.given = given
        self.net = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return self.net(batch).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Ones(LightningDataModule):
    """Eight rows of one."""

    def __init__(self, width: int = 2) -> None:
        super().__init__()
        self.width = width

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.ones(8, self.width), 4)


class Plain(Callback):
    def __init__(self, name: str = "plain", options: Any = None) -> None:
        self.word, self.options = name, options


class Shaping(Plain, Technique):
    stage: ClassVar[Stage] = Stage.SHAPE


class Compiling(Plain, Technique):
    stage: ClassVar[Stage] = Stage.COMPILE


class Staged(Plain):
    stage = "pretraining"  # a word of the user's own


def make_toy(**given: Any) -> Toy:
    return Toy(**given)


@pytest.fixture
def house(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A package of the user's own, `house.parts`, with our toys and some imports in it."""
    package, parts = types.ModuleType("house"), types.ModuleType("house.parts")
    package.__path__ = []  # type: ignore[attr-defined]
    package.parts = parts  # type: ignore[attr-defined]
    for thing in (Toy, Ones, Plain, Shaping, Compiling, Staged, make_toy):
        monkeypatch.setattr(thing, "__module__", "house.parts")
        setattr(parts, thing.__name__, thing)
    parts.os, parts.torch, parts.load = os, torch, torch.load  # type: ignore[attr-defined]
    parts.Path = Path  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "house", package)
    monkeypatch.setitem(sys.modules, "house.parts", parts)
    return parts


def config(**changes: Any) -> dict[str, Any]:
    trainer = {
        "_target_": "lightning.pytorch.Trainer",
        "accelerator": "cpu",
        "enable_checkpointing": False,
        "enable_progress_bar": False,
    }
    tree: dict[str, Any] = {"trainer": trainer, "model": {"_target_": "house.parts.Toy"}}
    tree["trainer"] |= changes.pop("trainer", {})
    return tree | changes


def built(tree: Any, *more: str) -> Run:
    return build(tree, allow=("house.", *more))


def ours(trainer: Trainer) -> list[str]:
    return [c.word for c in trainer.callbacks if isinstance(c, Plain)]  # type: ignore[attr-defined]


# --- order and containers ---------------------------------------------------------------------------


def test_callbacks_come_in_the_order_of_their_stages(house: types.ModuleType) -> None:
    nodes = {
        name: {"_target_": f"house.parts.{kind}", "name": name}
        for name, kind in [("c", "Compiling"), ("x", "Plain"), ("s", "Shaping"), ("y", "Staged")]
    }
    assert ours(built(config(callbacks=nodes)).trainer) == ["x", "y", "s", "c"]


def test_no_omegaconf_object_reaches_what_is_built(house: types.ModuleType) -> None:
    tree = OmegaConf.create(
        config(
            seed=3,
            model={
                "_target_": "house.parts.Toy",
                "sizes": [1, "${seed}"],
                "deep": {"a": {"b": [1]}},
            },
            callbacks={
                "p": {
                    "_target_": "house.parts.Plain",
                    "_convert_": "none",
                    "options": {
                        "x": {"_target_": "house.parts.Plain", "_convert_": "none", "options": [1]}
                    },
                }
            },
        )
    )
    run = built(tree)
    assert run.model.given == {"sizes": [1, 3], "deep": {"a": {"b": [1]}}}
    inner = next(c for c in run.trainer.callbacks if isinstance(c, Plain)).options["x"]

    def walk(thing: Any) -> None:
        assert not isinstance(thing, (DictConfig, ListConfig))
        for item in (
            thing.values() if isinstance(thing, dict) else thing if isinstance(thing, list) else ()
        ):
            walk(item)

    for thing in (run.model.given, dict(run.model.hparams), inner.options, run.config):
        walk(thing)
    assert type(inner.options) is list


def test_a_checkpoint_of_a_built_model_loads_safely(
    house: types.ModuleType, tmp_path: Path
) -> None:
    run = built(
        OmegaConf.create(config(model={"_target_": "house.parts.Toy", "sizes": [1, {"a": 2}]}))
    )
    run.trainer.strategy.connect(run.model)
    run.trainer.save_checkpoint(tmp_path / "toy.ckpt")
    held = torch.load(tmp_path / "toy.ckpt", weights_only=True)
    assert held["hyper_parameters"] == {"sizes": [1, {"a": 2}]}


def test_trainer_plugins_and_loggers_come_from_dicts_by_name(
    house: types.ModuleType, tmp_path: Path
) -> None:
    plugin = {"_target_": "lightning.pytorch.plugins.precision.DoublePrecision"}
    logger = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path)}
    run = built(
        config(trainer={"plugins": {"precision": plugin, "gone": None}}, logger={"csv": logger})
    )
    assert run.trainer.precision == "64-true"
    assert isinstance(run.trainer.logger, CSVLogger)
    assert built(config()).trainer.logger is None
    as_list = built(config(trainer={"plugins": [plugin]}))
    assert as_list.trainer.precision == "64-true"


def test_a_users_function_and_exact_name_can_be_allowed(house: types.ModuleType) -> None:
    run = built(config(model={"_target_": "house.parts.make_toy", "width": 4}))
    assert run.model.given == {"width": 4}
    tree = config(model={"_target_": "lightning.pytorch.demos.boring_classes.BoringModel"})
    with pytest.raises(ValueError, match="not allowed"):
        built(tree)
    assert built(tree, "lightning.pytorch.demos.boring_classes.BoringModel").model is not None


# --- what must not do nothing ------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["amp_prune", ["amp", "prune"], []])
def test_a_preset_that_was_not_found_is_an_error(house: types.ModuleType, value: Any) -> None:
    with pytest.raises(ValueError, match="config group `accel` was not found"):
        built(config(accel=value))


@pytest.mark.parametrize("key", ["acel", "prunning", "callback", "loger", "precison"])
def test_a_misspelt_group_is_an_error_that_names_the_right_one(
    house: types.ModuleType, key: str
) -> None:
    with pytest.raises(ValueError, match="Do: say `"):
        built(config(**{key: "amp_prune"}))


CSV = {"csv": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "."}}
METER = {"meter": {"_target_": "lightning_accel.StepMeter"}}
MISREAD = {
    "`callback`": ({"callback": METER}, "say `callbacks`"),
    "`Callbacks`": ({"Callbacks": METER}, "say `callbacks`"),
    "`loggers`": ({"loggers": CSV}, "say `logger`"),
    "`trainr`": ({"trainr": {"max_epochs": 3}}, "say `trainer`"),
    "`datas`": ({"datas": {"_target_": "house.parts.Ones"}}, "say `data`"),
    "`modle`": ({"modle": {"_target_": "house.parts.Toy"}}, "say `model`"),
    "`ckpt_pth`": ({"ckpt_pth": "last.ckpt"}, "say `ckpt_path`"),
    "`teachr`": ({"teachr": {"ckpt_path": "t.ckpt"}}, "say `teacher`"),
    "`accel.atach`": ({"accel": {"atach": True}, "callbacks": METER}, r"say `\+accel.attach=true`"),
    "`accel.attach`": ({"accel": {"attach": "yes"}}, "pass a bool"),
    "`accel.prune`": ({"accel": {"prune": True}}, r"say `\+accel=prune`"),
    "`accel.amp`": ({"accel": {"amp": False}, "callbacks": METER}, "leave it out"),
    "`accel.pruning`": ({"accel": {"pruning": {"ratio": 0.3}}}, "`callbacks.NAME.ratio=`"),
    "`accel.ratio`": ({"accel": {"ratio": 0.3}}, "leave it out"),
    "`trainer.max_epoch`": ({"trainer": {"max_epoch": 3}}, "say `trainer.max_epochs`"),
    "`callbacks.m.evry_n_steps`": (
        {"callbacks": {"m": {"_target_": "lightning_accel.StepMeter", "evry_n_steps": 3}}},
        "say `callbacks.m.every_n_steps`",
    ),
    "`callbacks.p.target.shar`": (
        {
            "callbacks": {
                "p": {
                    "_target_": "lightning_accel.StructuredPruning",
                    "target": {"_target_": "lightning_accel.Macs", "shar": 0.5},
                }
            }
        },
        "say `callbacks.p.target.share`",
    ),
    "`logger`": ({"logger": CSV["csv"]}, "one level deeper"),
    "`data`": ({"data": {"width": 3}}, "choose a group"),
}


@pytest.mark.parametrize("key", MISREAD)
def test_a_key_that_nothing_reads_is_an_error(house: types.ModuleType, key: str) -> None:
    changes, do = MISREAD[key]
    with pytest.raises((ValueError, TypeError), match=rf"{key}.*Do: .*{do}"):
        built(config(**changes))


def test_a_key_that_an_interpolation_reads_is_not_misspelt(house: types.ModuleType) -> None:
    models = {"small": {"_target_": "house.parts.Toy", "width": 4}}
    tree = config(models=models) | {"model": "${models.small}"}
    assert built(OmegaConf.create(tree)).model.given == {"width": 4}
    with pytest.raises(ValueError, match="nothing reads `models`"):
        built(config(models=models["small"]))


@pytest.mark.parametrize("place", ["trainer", "model", "data", "callbacks.x", "logger.csv"])
def test_a_partial_where_an_object_is_needed_is_refused(
    house: types.ModuleType, place: str
) -> None:
    nodes: dict[str, Any] = {
        "trainer": {},
        "data": {"_target_": "house.parts.Ones"},
        "callbacks": {"x": {"_target_": "house.parts.Plain"}},
        "logger": CSV,
    }
    tree = OmegaConf.create(config(**nodes))
    OmegaConf.update(tree, f"{place}._partial_", True, force_add=True)
    with pytest.raises(
        ValueError, match=f"`{place}` would not be built.*Do: leave `_partial_` out"
    ):
        built(tree)


def test_what_is_no_callback_is_refused(house: types.ModuleType) -> None:
    with pytest.raises(ValueError, match=r"`callbacks\.x` gave no Callback.*a Toy"):
        built(config(callbacks={"x": {"_target_": "house.parts.make_toy"}}))
    with pytest.raises(ValueError, match=r"`model` gave no LightningModule.*a Plain"):
        built(config(model={"_target_": "house.parts.Plain"}))


def test_marks_of_presets_of_the_users_own_are_left_alone(
    house: types.ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked = config(accel={"compiled": True})
    assert built(marked).config["accel"] == {"compiled": True}
    monkeypatch.setattr("lightning_accel.unread.typed_keys", lambda: ("accel.compiled",))
    with pytest.raises(ValueError, match=r"say `\+accel=compile`"):
        built(marked)


@pytest.mark.parametrize("key", ["pruning", "accel.pruning"])
def test_a_technique_that_was_not_found_is_an_error(house: types.ModuleType, key: str) -> None:
    tree = {"accel": {"pruning": "taylor"}} if "." in key else {"pruning": "taylor"}
    with pytest.raises(ValueError, match="pruning` was not found") as caught:
        built(config(**tree))
    assert "Do: say `accel/pruning`" in str(caught.value) or key == "accel.pruning"


def test_a_users_own_keys_are_left_alone(house: types.ModuleType) -> None:
    mine = {"train": True, "tags": ["dev"], "task_name": "train", "paths": {"root": "."}, "lr": 0.1}
    mine |= {"precision": "16-mixed", "memory": "8GB", "accel": {"mine": True}}
    found = built(config(**mine)).config
    assert {key: found[key] for key in mine} == mine


@pytest.mark.parametrize("key", ["callbacks", "logger"])
def test_a_node_without_a_target_is_refused_by_name(house: types.ModuleType, key: str) -> None:
    with pytest.raises(ValueError, match=rf"`{key}\.prune` does not say what to build"):
        built(config(**{key: {"prune": {"ratio": 0.25}}}))


@pytest.mark.parametrize("key", ["trainer", "model"])
def test_trainer_and_model_are_required(house: types.ModuleType, key: str) -> None:
    tree = config()
    del tree[key]
    with pytest.raises(ValueError, match=f"`{key}` does not say what to build"):
        built(tree)


def test_callbacks_as_a_list_are_refused(house: types.ModuleType) -> None:
    with pytest.raises(TypeError, match="dict of nodes"):
        built(
            config(callbacks={"a": None}, logger=None)
            | {"callbacks": ({"_target_": "house.parts.Plain"},)}
        )
    with pytest.raises(ValueError, match=r"`trainer\.callbacks` is a list"):
        built(config(trainer={"callbacks": [{"_target_": "house.parts.Plain"}]}))


def test_a_device_that_is_not_there_is_refused_with_the_reason(house: types.ModuleType) -> None:
    """With words that can be followed: `torch_xla` ended with a torch that this package refuses."""
    for name, do in (
        ("tpu", "pip install torch_tpu"),
        ("gpu", "accelerator=auto"),
        ("accel", "torch-npu"),
    ):
        with pytest.raises(Unsupported, match="Found: torch .* Do: ") as refused:
            built(config(trainer={"accelerator": name}))
        assert do in str(refused.value) and "2.9" not in str(refused.value)


def test_a_checkpoint_from_a_url_is_refused(house: types.ModuleType) -> None:
    with pytest.raises(ValueError, match="URL"):
        built(config(ckpt_path="http://127.0.0.1/evil.ckpt"))


def test_a_missing_value_is_an_error_before_anything_is_built(house: types.ModuleType) -> None:
    with pytest.raises(Exception, match="Missing mandatory value"):
        built(OmegaConf.create(config(model={"_target_": "house.parts.Toy", "width": "???"})))


# --- targets -----------------------------------------------------------------------------------------

HOSTILE = {
    "a shell": {"_target_": "os.system", "_args_": ["touch MARK"]},
    "a shell through a module": {"_target_": "logging.os.system", "_args_": ["touch MARK"]},
    "a process": {"_target_": "subprocess.Popen", "args": ["touch", "MARK"]},
    "a process run": {"_target_": "subprocess.run", "args": ["touch", "MARK"]},
    "eval": {"_target_": "builtins.eval", "_args_": ["open('MARK', 'w')"]},
    "torch.load": {"_target_": "torch.load", "f": "evil.pt", "weights_only": False},
    "torch.hub": {
        "_target_": "torch.hub.load",
        "repo_or_dir": "evilhub",
        "model": "go",
        "source": "local",
    },
    "a library": {"_target_": "torch.ops.load_library", "path": "nolib.so"},
    "a compiler": {
        "_target_": "torch.utils.cpp_extension.load_inline",
        "name": "x",
        "cpp_sources": "int f(){return 0;}",
    },
    "pickle": {"_target_": "pickle.load"},
    "runpy": {"_target_": "runpy.run_path", "path_name": "evil.py"},
    "numpy.load": {"_target_": "numpy.load", "file": "evil.npy", "allow_pickle": True},
    "load_from_checkpoint": {
        "_target_": "lightning.pytorch.LightningModule.load_from_checkpoint",
        "checkpoint_path": "evil.pt",
    },
    "timeit": {"_target_": "timeit.timeit", "stmt": "open('MARK', 'w')", "number": 1},
    "torchrun": {"_target_": "torch.distributed.run.main", "args": ["--standalone", "evil.py"]},
    "fx source": {
        "_target_": "torch.fx.graph_module._forward_from_src",
        "src": "open('MARK', 'w')\ndef forward(s): pass",
        "globals": {},
    },
    "torch.package": {"_target_": "torch.package.PackageImporter", "file_or_buffer": "evil.pkg"},
    "a file": {
        "_target_": "pathlib.Path.write_text",
        "_args_": [{"_target_": "pathlib.Path", "_args_": ["MARK"]}, "x"],
    },
    # the same through doors that are open
    "an alias of torch.load": {
        "_target_": "lightning.pytorch.core.saving.torch.load",
        "f": "evil.pt",
    },
    "os through a callback file": {
        "_target_": "lightning.pytorch.callbacks.model_checkpoint.os.system",
        "_args_": ["touch MARK"],
    },
    "torch through a callback file": {
        "_target_": "lightning.pytorch.callbacks.model_checkpoint.torch.load",
        "f": "evil.pt",
    },
    "a class that only passes by": {
        "_target_": "lightning.pytorch.callbacks.model_checkpoint.Path",
        "_args_": ["MARK"],
    },
    "our own loader": {"_target_": "lightning_accel.load_from_checkpoint", "path": "evil.pt"},
    "a method of an allowed class": {
        "_target_": "lightning.pytorch.callbacks.ModelCheckpoint.to_yaml",
        "filepath": "MARK",
    },
    "a metaclass": {"_target_": "lightning.pytorch.callbacks.Callback.__class__", "_args_": ["x"]},
    "a loader of the user's model": {
        "_target_": "house.parts.Toy.load_from_checkpoint",
        "checkpoint_path": "evil.pt",
    },
    "an import of the user's file": {"_target_": "house.parts.load", "f": "evil.pt"},
    "a module of the user's file": {"_target_": "house.parts.os.system", "_args_": ["touch MARK"]},
    "a class in the user's file": {"_target_": "house.parts.Path", "_args_": ["MARK"]},
    "no name at all": {"_target_": ""},
    "a node as a name": {"_target_": {"_target_": "os.system"}},
    "a name with a hole": {"_target_": "lightning_accel..errors"},
    "get_object": {"_target_": "hydra.utils.get_object", "path": "os.system"},
    "a partial": {"_target_": "functools.partial", "_args_": ["x"]},
}


def _hide(node: Any, how: str) -> dict[str, Any]:
    """Put a hostile node somewhere in a configuration."""
    places: dict[str, dict[str, Any]] = {
        "as the model": {"model": node},
        "as a callback": {"callbacks": {"x": node}},
        "in the arguments of one": {
            "callbacks": {"x": {"_target_": "house.parts.Plain", "_args_": [node]}}
        },
        "deep in a list": {"model": {"_target_": "house.parts.Toy", "a": [{"b": [[node]]}]}},
        "as a partial": {"callbacks": {"x": {**node, "_partial_": True}}},
        "behind an interpolation": {"hidden": node, "model": "${hidden}"},
        "where nobody builds it": {"nobody": {"cares": node}},
        "as a plugin": {"trainer": {"plugins": {"x": node}}},
    }
    return config(**places[how])


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_target_is_refused_and_runs_nothing(
    house: types.ModuleType, name: str, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    _traps(tmp_path, mark)
    node = _filled(HOSTILE[name], str(mark))
    with pytest.raises(ValueError, match="not allowed to run|cannot be imported"):
        built(_hide(node, "as the model"))
    assert not mark.exists()


@pytest.mark.parametrize(
    "how",
    [
        "as a callback",
        "in the arguments of one",
        "deep in a list",
        "as a partial",
        "behind an interpolation",
        "where nobody builds it",
        "as a plugin",
    ],
)
@pytest.mark.parametrize("name", ["a shell", "torch.load", "an alias of torch.load", "a file"])
def test_a_hostile_target_is_found_wherever_it_hides(
    house: types.ModuleType, name: str, how: str, tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    node = _filled(HOSTILE[name], str(mark))
    with pytest.raises(ValueError, match="not allowed to run"):
        built(OmegaConf.create(_hide(node, how)))
    assert not mark.exists()


@pytest.mark.skipif(
    hasattr(hydra.utils, "execution_whitelist"), reason="hydra 1.4 refuses them too"
)
def test_the_traps_of_these_tests_would_spring_without_the_check(tmp_path: Path) -> None:
    from hydra.utils import instantiate

    mark = tmp_path / "mark"
    _traps(tmp_path, mark)
    for name in ("torch.load", "a file"):  # what Hydra's own list lets through
        with contextlib.suppress(Exception):
            instantiate(_filled(HOSTILE[name], str(mark)))
        assert mark.exists(), f"{name} is no real trap"
        mark.unlink()


def test_nothing_is_built_when_one_target_is_refused(
    house: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(house.Plain, "__init__", lambda self, **_: seen.append("built"))
    bad = {"_target_": "os.system", "_args_": ["true"]}
    with pytest.raises(ValueError, match="not allowed"):
        built(config(callbacks={"a": {"_target_": "house.parts.Plain"}, "z": bad}))
    assert seen == []


@pytest.mark.slow
def test_a_target_outside_the_list_is_not_even_imported(tmp_path: Path) -> None:
    (tmp_path / "evil_module.py").write_text("open('imported', 'w')\nclass Model: pass\n")
    script = (
        "from lightning_accel.recipe import build\n"
        "t = {'_target_': 'lightning.pytorch.Trainer'}\n"
        "try: build({'trainer': t, 'model': {'_target_': 'evil_module.Model'}})\n"
        "except ValueError as error: print('REFUSED', error)\n"
    )
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
        timeout=900,
    )
    assert "REFUSED" in done.stdout, done.stderr
    assert not (tmp_path / "imported").exists()


def test_the_allowlist_holds_no_prefix_wider_than_a_package() -> None:
    assert not {"lightning.", "lightning.pytorch.", "torch.", "hydra."} & set(ALLOWED)
    assert all(get_object(name) for name in ALLOWED if not name.endswith("."))


def _traps(folder: Path, mark: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {mark}",)

    torch.save(Evil(), folder / "evil.pt")
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (folder / "evilhub").mkdir(exist_ok=True)
    (folder / "evilhub" / "hubconf.py").write_text(
        f"open({str(mark)!r}, 'w')\ndef go(): return 1\n"
    )


def _filled(node: Any, mark: str) -> Any:
    if isinstance(node, dict):
        return {k: _filled(v, mark) for k, v in node.items()}
    if isinstance(node, list):
        return [_filled(v, mark) for v in node]
    return node.replace("MARK", mark) if isinstance(node, str) else node


# --- a teacher ----------------------------------------------------------------------------------------


def with_teacher(folder: Path, **changes: Any) -> DictConfig:
    teacher = {
        "model": {"_target_": "house.parts.Toy"},
        "trainer": {"max_epochs": 2, "enable_progress_bar": False},
        "data": {"width": 2},
        "folder": str(folder),
        "ckpt_path": None,
    }
    asks = {"_target_": "house.parts.Plain", "name": "${teacher.ckpt_path}"}
    tree = config(data={"_target_": "house.parts.Ones"}, callbacks={"asks": asks})
    return OmegaConf.create(tree | {"teacher": teacher | changes})


def prepared(cfg: Any) -> Path | None:
    return prepare_teacher(cfg, allow=("house.",))


def test_a_teacher_is_trained_once_and_callbacks_are_told_where_it_is(
    house: types.ModuleType, tmp_path: Path
) -> None:
    cfg = with_teacher(tmp_path / "kept")
    path = prepared(cfg)
    assert path is not None and list((tmp_path / "kept").iterdir()) == [path]
    assert ours(built(cfg).trainer) == [str(path)]
    held, made = torch.load(path, weights_only=True), path.stat().st_mtime_ns
    assert held["global_step"] == 4 and "optimizer_states" not in held
    assert prepared(with_teacher(tmp_path / "kept")) == path == prepared(cfg)
    assert path.stat().st_mtime_ns == made, "the second run has found it"


def test_another_way_to_train_a_teacher_is_another_file(
    house: types.ModuleType, tmp_path: Path
) -> None:
    same = with_teacher(tmp_path)
    same.trainer.max_epochs, same.seed = 9, 5
    same.data.width = 3  # the teacher's own data say 2
    wider = {"_target_": "house.parts.Toy", "width": 4}
    longer = {"max_epochs": 1, "enable_progress_bar": False}
    others = [{"model": wider}, {"trainer": longer}, {"seed": 1}, {"data": {}}]
    paths = [prepared(with_teacher(tmp_path)), prepared(same)]
    paths += [prepared(with_teacher(tmp_path, **other)) for other in others[:3]]
    assert paths[0] == paths[1] and len(set(paths)) == 4
    assert prepared(with_teacher(tmp_path, **others[3])) not in paths


def test_no_teacher_is_trained_that_no_callback_asks_for(
    house: types.ModuleType, tmp_path: Path
) -> None:
    cfg = with_teacher(tmp_path / "kept")
    cfg.callbacks.asks.name = "plain"
    assert prepared(cfg) is None and cfg.teacher.ckpt_path is None
    assert prepared(config()) is None
    assert not (tmp_path / "kept").exists()


def test_a_key_of_the_teacher_that_nothing_reads_is_an_error(house: types.ModuleType) -> None:
    tree = config(teacher={"model": {"_target_": "house.parts.Toy"}, "ckptpath": "t.ckpt"})
    with pytest.raises(ValueError, match=r"`teacher\.ckptpath`.*say `teacher\.ckpt_path`"):
        prepare_teacher(tree, allow=("house.",))
    tree = config(note="${teacher.warmth}", teacher={"ckpt_path": "t.ckpt", "warmth": 4.0})
    assert prepare_teacher(OmegaConf.create(tree), allow=("house.",)) == Path("t.ckpt")


def test_a_checkpoint_that_is_given_is_the_teacher(house: types.ModuleType, tmp_path: Path) -> None:
    cfg = with_teacher(tmp_path / "kept", ckpt_path="mine.ckpt")
    assert prepared(cfg) == Path("mine.ckpt") and cfg.teacher.ckpt_path == "mine.ckpt"
    assert not (tmp_path / "kept").exists()


def test_training_a_teacher_moves_no_random_state_and_has_its_own_seed(
    house: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    weights = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
        path = prepared(with_teacher(tmp_path / str(seed)))
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())
        assert path is not None and "PL_GLOBAL_SEED" not in os.environ
        weights.append(torch.load(path, weights_only=True)["state_dict"]["net.weight"])
    assert torch.equal(*weights)


def test_ranks_that_start_together_do_not_each_train_a_teacher(
    house: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(AccelError, match="run the same command on one device first"):
        prepared(with_teacher(tmp_path / "kept"))
    monkeypatch.delenv("WORLD_SIZE")
    path = prepared(with_teacher(tmp_path / "kept"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert prepared(with_teacher(tmp_path / "kept")) == path


def test_a_training_that_fails_leaves_no_teacher(
    house: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(self: Trainer, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save_checkpoint", half)
        with pytest.raises(OSError, match="disk full"):
            prepared(with_teacher(tmp_path / "kept"))
    assert list((tmp_path / "kept").iterdir()) == []


KILLED = """
import os, signal, sys, types
from pathlib import Path
from lightning.pytorch import Trainer
from lightning_accel.recipe import prepare_teacher

save = Trainer.save_checkpoint
def half(self, path, **kwargs):
    save(self, path, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)
    if sys.argv[2] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
Trainer.save_checkpoint = half if sys.argv[2] == "killed" else save
boring = "lightning.pytorch.demos.boring_classes."
cfg = {
    "trainer": {"_target_": "lightning.pytorch.Trainer", "accelerator": "cpu"},
    "model": {"_target_": boring + "BoringModel"},
    "callbacks": {"asks": {"teacher": "${teacher.ckpt_path}"}},
    "teacher": {
        "model": {"_target_": boring + "BoringModel"},
        "trainer": {"max_steps": 1, "enable_progress_bar": False},
        "folder": sys.argv[1],
        "ckpt_path": None,
    },
}
print("PATH", prepare_teacher(cfg, allow=(boring,)))
"""


@pytest.mark.slow
def test_a_killed_training_leaves_nothing_that_is_taken_for_a_teacher(tmp_path: Path) -> None:
    (tmp_path / "prepare.py").write_text(KILLED)

    def start(how: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "prepare.py", str(tmp_path / "kept"), how],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            timeout=900,
        )

    assert start("killed").returncode == -signal.SIGKILL
    assert [p for p in (tmp_path / "kept").iterdir() if p.suffix == ".ckpt"] == []
    done = start("in peace")
    assert done.returncode == 0, done.stderr
    (path,) = (p for p in (tmp_path / "kept").iterdir() if p.suffix == ".ckpt")
    assert f"PATH {path}" in done.stdout
    assert torch.load(path, weights_only=True)["global_step"] == 1


def test_distillation_without_a_teacher_is_an_error_that_says_how_to_get_one(
    house: types.ModuleType,
) -> None:
    node = OmegaConf.load(ROOT / "conf" / "accel" / "distillation" / "logits.yaml")
    with pytest.raises(ValueError, match=r"`callbacks\.distillation` has no teacher") as caught:
        built(OmegaConf.create(config(callbacks={"distillation": node})))
    assert "callbacks.distillation.teacher=path.ckpt" in str(caught.value)
    assert "prepare_teacher" in str(caught.value)


# --- secrets ------------------------------------------------------------------------------------------

CANARY = "c4n4ry-0123456789"


def test_secrets_are_withheld_by_key_url_and_environment() -> None:
    tree = {
        "logger": {"w": {"api_key": CANARY, "entity": "me"}},
        "items": [{"dbPassword": CANARY}, f"postgres://joe:{CANARY}@host/db"],
        "innocent": CANARY,
        "num_tokens": 5,
        "key": None,
        "pad": "token",
    }
    clean = redacted(tree, {"SERVICE_TOKEN": CANARY, "SHORT_KEY": "token"})
    assert CANARY not in str(clean)
    assert clean["logger"]["w"] == {"api_key": HIDDEN, "entity": "me"}
    assert clean["num_tokens"] == 5 and clean["key"] is None and clean["pad"] == "token"
    assert tree["innocent"] == CANARY, "the configuration itself stays as it was"


def test_a_logger_gets_the_configuration_without_its_secrets(
    house: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SERVICE_TOKEN", CANARY)
    logger = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path)}
    tree = config(logger={"csv": logger}, note="${oc.env:SERVICE_TOKEN}", accel={"none": True})
    run = built(OmegaConf.create(tree))
    run.trainer.logger.save()
    saved = (Path(run.trainer.logger.log_dir) / "hparams.yaml").read_text()
    assert CANARY not in saved and "none: true" in saved
    assert run.config["note"] == HIDDEN


# --- one job ------------------------------------------------------------------------------------------


@pytest.fixture
def no_wandb_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "NETRC",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_BASE_URL",
    ):
        monkeypatch.delenv(name, raising=False)


def test_wandb_is_offline_inside_a_job_without_a_key(no_wandb_key: None) -> None:
    with job({}):
        assert os.environ["WANDB_MODE"] == "offline"
    assert "WANDB_MODE" not in os.environ


@pytest.mark.parametrize("place", ["environment", "netrc", "mode"])
def test_wandb_stays_as_the_user_set_it_up(
    no_wandb_key: None, place: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if place == "environment":
        monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    elif place == "mode":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    else:
        (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password abc\n")
        (tmp_path / ".netrc").chmod(0o600)
    with job({}):
        assert os.environ.get("WANDB_MODE") == ("disabled" if place == "mode" else None)


def test_a_key_for_another_host_is_not_a_key(no_wandb_key: None, tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine example.org login user password abc\n")
    (tmp_path / ".netrc").chmod(0o600)
    with job({}):
        assert os.environ["WANDB_MODE"] == "offline"


def test_each_job_closes_its_wandb_run_and_says_whether_it_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    codes: list[int] = []
    fake = types.ModuleType("wandb")
    fake.finish = lambda exit_code: codes.append(exit_code)  # type: ignore[attr-defined]
    fake.teardown = lambda: None  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    with job({}):
        pass
    with pytest.raises(RuntimeError), job({}):
        raise RuntimeError("training failed")
    assert codes == [0, 1]


@pytest.mark.parametrize(
    ("overrides", "tags"),
    [
        ([], ["none"]),
        (["+accel=none"], ["none"]),
        (["+accel=amp_prune"], ["amp_prune", "precision", "pruning"]),
        (["+accel=[amp,prune]"], ["amp", "prune", "precision", "pruning"]),
        (["+accel/pruning=taylor", "+accel/loop=fused"], ["loop", "pruning"]),
        (["+accel=amp_prune", "accel/pruning=none"], ["amp_prune", "precision"]),
    ],
    ids=str,
)
def test_the_tags_of_a_run_are_its_preset_and_its_techniques(
    overrides: list[str], tags: list[str]
) -> None:
    cfg = composed(*overrides)
    assert tags_of(cfg.hydra.runtime.choices, cfg) == tags


def test_tags_are_such_as_wandb_takes() -> None:
    nodes = {"x": None, "y": {"_target_": "lightning_accel.AccelReport"}, "z": {"ratio": 0.5}}
    assert tags_of({"accel": "./far/away/my, tuned.yaml"}, {"callbacks": nodes}) == ["my  tuned"]
    (long,) = tags_of({"accel": "x" * 99}, {})
    assert len(long) == 64
    assert tags_of({}, {"accel": "not found"}) == ["none"]  # a plain string: `build` refuses it


def test_a_job_leaves_no_rank_behind() -> None:
    with job({"seed": 5}):
        os.environ.update(LOCAL_RANK="0", MASTER_PORT="1")
        assert os.environ["PL_GLOBAL_SEED"] == "5"
    assert not {"LOCAL_RANK", "MASTER_PORT", "PL_GLOBAL_SEED"} & set(os.environ)


@pytest.mark.parametrize("seed", ["x", 1.5, -1, 2**32, True, [1], float("nan"), "1.5", ""])
def test_what_is_no_seed_is_refused_in_three_parts(seed: Any) -> None:
    with (
        pytest.raises(ValueError, match=r"`seed` is a whole number .*Found: .*Do: "),
        job({"seed": seed}),
    ):
        pass
    described = {"model": {"_target_": "torch.nn.Identity"}, "seed": seed}
    with pytest.raises(ValueError, match=r"`teacher\.seed` is a whole number"):
        prepare_teacher({"teacher": described})


# --- the configuration of the examples ------------------------------------------------------------------


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(
            "config", overrides=[*overrides, "hydra.run.dir=."], return_hydra_config=True
        )


ACCEL = sorted(p.stem for p in (ROOT / "conf" / "accel").glob("*.yaml"))


@pytest.mark.parametrize("preset", ACCEL)
def test_a_preset_leaves_the_mark_of_each_of_its_parts(preset: str) -> None:
    assert composed(f"+accel={preset}").accel == dict.fromkeys(preset.split("_"), True)


def test_presets_compose_freely_and_equal_the_named_ones() -> None:
    listed, named = composed("+accel=[amp,prune]"), composed("+accel=amp_prune")
    for key in ("accel", "callbacks", "trainer", "model"):
        assert OmegaConf.to_container(listed[key], resolve=False) == OmegaConf.to_container(
            named[key], resolve=False
        )


def test_a_preset_that_does_not_exist_is_an_error_of_hydra() -> None:
    with pytest.raises(Exception, match="typo"):
        composed("+accel=typo")


@pytest.mark.slow
def test_a_part_of_a_preset_can_be_changed_and_taken_out() -> None:
    assert composed("+accel=prune", "accel/pruning=taylor").callbacks.pruning.importance == "taylor"
    assert composed("+accel=prune", "callbacks.pruning.ratio=0.3").callbacks.pruning.ratio == 0.3
    assert "pruning" not in composed("+accel=amp_prune", "accel/pruning=none").callbacks
    assert composed("+accel/pruning=random").callbacks.pruning.importance == "random"


@pytest.mark.parametrize("chosen", [[], ["model=vit"], ["experiment=pydoc_gpt"]], ids=str)
def test_a_teacher_is_of_the_students_class_and_larger(chosen: list[str]) -> None:
    cfg = composed(*chosen)
    assert cfg.teacher.model._target_ == cfg.model._target_
    assert cfg.teacher.ckpt_path is None
    if "experiment=pydoc_gpt" in chosen:
        assert cfg.teacher.model.depth == 2 * cfg.model.depth
    assert composed(*chosen, "teacher=resnet").teacher.model._target_ == "models.resnet.ResNet"


@pytest.mark.slow
def test_what_a_student_learns_from_can_be_changed() -> None:
    logits = composed("+accel=distill").callbacks.distillation
    language = composed("+accel=distill", "experiment=pydoc_gpt").callbacks.distillation
    assert (logits.losses.kd.temperature, language.losses.kd.temperature) == (4.0, 1.0)
    features = composed("+accel=distill", "accel/distillation=features").callbacks.distillation
    assert list(features.losses) == ["kd", "fitnet"]
    assert (
        composed("+accel=amp_prune", "+accel/distillation=self").callbacks.distillation.teacher
        == "self"
    )
    assert "distillation" not in composed("+accel=distill", "accel/distillation=none").callbacks
    both = composed("+accel=[amp_prune,distill]").callbacks
    assert "pruning" in both and both.distillation.teacher is None
