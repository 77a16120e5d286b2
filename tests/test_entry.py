"""`LIGHTNING_ACCEL=amp,prune python their_train.py`: presets for scripts that know nothing of us."""

from __future__ import annotations

import copy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.connectors import callback_connector
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_accel import AccelReport, StructuredPruning, entry
from lightning_accel.attach import RequestedCallbacks
from lightning_accel.errors import Unsupported
from lightning_accel.precision import AutocastPrecision, UsePrecision
from lightning_accel.recipe import build

QUIET = "amp, prune callbacks.pruning.when=1 callbacks.pruning.ratio=0.5 ~callbacks.report"


class Theirs(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))

    def forward(self, batch: Tensor) -> Tensor:
        return self.net(batch)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self(batch).square().mean() + torch.rand(())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("size", float(self.net[0].out_features))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 0.1)


def data() -> DataLoader[Any]:
    return DataLoader(torch.randn(16, 4, generator=torch.Generator().manual_seed(1)), 4)


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if installed: Lightning finds the entry point."""
    monkeypatch.setattr(callback_connector, "_load_external_callbacks", lambda _: entry.factory())


def trainer(folder: Path, *callbacks: Callback, **given: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    given = {"max_epochs": 2, "enable_checkpointing": False, **given}
    return Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=[*callbacks], **quiet, **given
    )


pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def test_without_the_variable_nothing_is_imported() -> None:
    script = (
        "import sys; import lightning.pytorch; from lightning_accel.entry import factory; assert factory() == [];"
        "import omegaconf; assert factory() == [];"
        "print({m.split('.')[1] for m in sys.modules if m.startswith('lightning_accel.')})"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300
    )
    for heavy in ("attach", "bridge", "hardware", "pruning", "recipe", "surgery"):
        assert f"'{heavy}'" not in found.stdout
    assert "'entry'" in found.stdout


def test_the_variable_gives_what_callbacks_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(entry.VARIABLE, raising=False)
    by_hand, theirs = Theirs(), Theirs()
    own = UsePrecision(AutocastPrecision("bf16-mixed")), StructuredPruning(ratio=0.5, when=1)
    torch.manual_seed(2)
    trainer(tmp_path, *own).fit(by_hand, data())
    monkeypatch.setenv(entry.VARIABLE, QUIET + " callbacks.precision.plugin.precision=bf16-mixed")
    torch.manual_seed(2)
    run = trainer(tmp_path)
    run.fit(theirs, data())
    assert theirs.net[0].out_features == 4
    for name, value in by_hand.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[name]), name
    assert isinstance(run.precision_plugin, AutocastPrecision)
    count = len(run.callbacks)  # type: ignore[attr-defined]
    run.test(theirs, data(), verbose=False)
    assert run.callback_metrics["size"] == 4 and len(run.callbacks) == count  # type: ignore[attr-defined]


@pytest.mark.parametrize("word", ["0", "false", "OFF", " "])
def test_a_variable_that_says_no_is_as_if_it_were_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setenv(entry.VARIABLE, word)
    made: Any = trainer(tmp_path).callbacks
    assert not [c for c in made if type(c).__module__.startswith("lightning_accel.")]


def test_trainers_of_several_threads_are_built_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(entry.VARIABLE, QUIET)
    with ThreadPoolExecutor(4) as pool:
        made: Any = [*pool.map(lambda _: trainer(tmp_path).callbacks, range(8))]
    assert all(any(isinstance(c, RequestedCallbacks) for c in callbacks) for callbacks in made)
    assert not GlobalHydra.instance().is_initialized()


def test_a_fit_goes_on_from_its_checkpoint_under_the_variable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(entry.VARIABLE, QUIET)
    whole, part, again = Theirs(), Theirs(), Theirs()
    trainer(tmp_path, max_epochs=4).fit(whole, data())
    first = trainer(tmp_path, max_epochs=3)
    first.fit(part, data())
    first.save_checkpoint(tmp_path / "part.ckpt")
    trainer(tmp_path, max_epochs=4).fit(again, data(), ckpt_path=tmp_path / "part.ckpt")
    assert again.net[0].out_features == 4
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_what_a_script_has_itself_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(entry.VARIABLE, "prune ~callbacks.report")
    own, model = StructuredPruning(ratio=0.25, when=1), Theirs()
    run = trainer(tmp_path, own)
    run.fit(model, data())
    assert model.net[0].out_features == 6
    assert [c for c in run.callbacks if isinstance(c, StructuredPruning)] == [own]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("words", "kind", "said"),
    [
        (" , ", ValueError, "names no presets.*','"),
        ("1", ValueError, "names no presets.*Found: '1'"),
        ("nonsense", ValueError, "names no presets.*accel/nonsense"),
        ("prune callbacks.pruning.ratoi=1", ValueError, "names no presets.*ratoi"),
        ("+accel/parallel=fsdp", Unsupported, r"trainer\.strategy='accel_fsdp'"),
        ("distill", ValueError, "has no teacher"),
        ("prune callbacks.pruning.ratio=2", Exception, "ratio"),
    ],
)
def test_what_cannot_be_had_is_said_when_the_trainer_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, kind: type[Exception], said: str
) -> None:
    monkeypatch.setenv(entry.VARIABLE, words)
    with pytest.raises(kind, match=said):
        trainer(tmp_path)
    assert not GlobalHydra.instance().is_initialized()


def test_neither_random_states_nor_a_running_app_of_hydra_notice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hydra import compose, initialize_config_dir

    monkeypatch.setenv(entry.VARIABLE, "none ~callbacks.report +accel/loop=lean")
    (tmp_path / "app.yaml").write_text("mine: 3\n")
    with initialize_config_dir(version_base="1.3", config_dir=str(tmp_path)):
        torch.manual_seed(4)
        before = torch.get_rng_state()
        made = copy.copy(trainer(tmp_path))
        assert torch.equal(torch.get_rng_state(), before)
        assert compose("app").mine == 3
    names = [n for c in made.callbacks for n in getattr(c, "callbacks", {})]  # type: ignore[attr-defined]
    assert names == ["loop"]


def test_a_configuration_says_for_itself_what_it_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(entry.VARIABLE, "amp")
    quiet = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    nodes = {
        "trainer": {"_target_": "lightning.pytorch.Trainer", **quiet},
        "model": {"_target_": "lightning.pytorch.demos.boring_classes.BoringModel"},
    }
    with pytest.warns(UserWarning, match="for scripts without a configuration"):
        run = build(nodes, allow=("lightning.pytorch.demos.",))
    assert not any(isinstance(c, AccelReport) for c in run.trainer.callbacks)  # type: ignore[attr-defined]


def test_a_class_among_the_callbacks_is_told_when_the_trainer_is_built(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"no classes and.* Found: StructuredPruning. Do: write Struct"
    ):
        trainer(tmp_path, StructuredPruning)  # type: ignore[arg-type]
