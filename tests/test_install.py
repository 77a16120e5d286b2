"""What a user gets from `pip install`: the package, its presets on every app's search path, no more."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl

from lightning_accel._hydra_plugins import LightningAccelSearchPath, Travelling

ROOT = Path(__file__).resolve().parents[1]

APP = """
import hydra
import lightning_accel
from lightning_accel.job import job
from lightning_accel.recipe import build

@hydra.main(version_base="1.3", config_path="conf", config_name="mine")
def main(cfg):
    with job(cfg):
        run = build(cfg, allow=("parts.",))
        run.trainer.fit(run.model, run.data, weights_only=True)
        print("WIDTHS", [m.out_features for m in run.model.net if hasattr(m, "out_features")])
        print("HOME", lightning_accel.__file__)

main()
"""

PARTS = """
import torch
from lightning.pytorch import LightningModule

class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))

    def training_step(self, batch, batch_idx):
        return self.net(batch).square().mean()

    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.randn(16, 4), 4)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
"""

CONFIG = """
model: {_target_: parts.Tiny}
trainer:
  _target_: lightning.pytorch.Trainer
  accelerator: cpu
  max_epochs: 2
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
"""


def call(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, timeout=900)


def checked(command: list[str], cwd: Path) -> str:
    done = call(command, cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = ["-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    checked([sys.executable, *build], out)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, which sees the dependencies of this one and nothing else.

    A path in a `.pth` file shows the packages beside it, but not those of an editable install.
    """
    home = tmp_path_factory.mktemp("environment")
    checked([sys.executable, "-m", "venv", str(home)], home)
    python = home / "bin" / "python"
    site = checked(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], home
    )
    (Path(site.strip()) / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    checked(
        [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        home,
    )
    return python


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """A Hydra app of a user's own, outside of the checkout."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text(CONFIG)
    (tmp_path / "parts.py").write_text(PARTS)
    (tmp_path / "app.py").write_text(APP)
    return tmp_path


@pytest.mark.slow
def test_the_wheel_holds_the_presets_and_no_generic_group(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    groups = {n.split("/")[2] for n in names if n.startswith("lightning_accel/conf/")}
    assert groups == {"__init__.py", "accel"}
    techniques = {n.split("/")[3] for n in names if n.startswith("lightning_accel/conf/accel/")}
    assert techniques >= {"amp_prune.yaml", "pruning", "precision", "compilation", "memory"}
    assert "lightning_accel/py.typed" in names
    templates = {
        p.name for p in (ROOT / "lightning_accel/pages/templates").iterdir() if p.is_file()
    }
    assert {"page.html.j2", "page.js", "chart.css.j2"} <= templates
    assert {f"lightning_accel/pages/templates/{name}" for name in templates} <= set(names)
    assert "hydra_plugins/lightning_accel/__init__.py" in names
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"lightning_accel", "hydra_plugins"}


@pytest.mark.slow
def test_a_users_app_finds_the_presets_of_the_wheel(installed: Path, app: Path) -> None:
    printed = checked(
        [
            str(installed),
            "app.py",
            "+accel=amp_prune",
            "+callbacks.report.budget_s=0.2",
            "hydra.run.dir=out",
        ],
        app,
    )
    assert "WIDTHS [4, 2]" in printed, "half of the hidden units went, the outputs stayed"
    assert str(ROOT) not in printed.split("HOME")[1]


BARE = """
import hydra

@hydra.main(version_base="1.3", config_path="conf", config_name="mine")
def main(cfg):
    trainer, model = (hydra.utils.instantiate(cfg[key]) for key in ("trainer", "model"))
    trainer.fit(model)
    print("WIDTHS", [m.out_features for m in model.net if hasattr(m, "out_features")])

main()
"""


@pytest.mark.slow
def test_an_app_that_never_passes_callbacks_on_is_told_so(installed: Path, app: Path) -> None:
    (app / "bare.py").write_text(BARE)
    words = [str(installed), "bare.py", "+accel=prune", "~callbacks.report", "hydra.run.dir=out"]
    done = call(words, app)
    assert done.returncode != 0 and "`callbacks.pruning` (StructuredPruning) in no" in done.stderr
    assert "WIDTHS [4, 2]" in checked([*words, "+accel.attach=true"], app)


COMPOSES = """
import sys
import hydra

for words in sys.argv[1:]:
    with hydra.initialize(version_base="1.3", config_path="conf"):
        try:
            hydra.compose("mine", words.split(), return_hydra_config=True)
        except hydra.errors.HydraException as error:
            print(words, "->", str(error).replace("\\n", " "))
        else:
            print(words, "-> composed")
"""


@pytest.mark.slow
@pytest.mark.slow
def test_a_missing_group_of_a_users_app_stays_missing(installed: Path, app: Path) -> None:
    """What we have such a group for: in the package, and in our examples."""
    (app / "composes.py").write_text(COMPOSES)
    groups = [
        "memory=none",
        "precision=none",
        "accelerator=none",
        "+model@more=resnet",
        "+data@more=digits",
    ]
    printed = checked([str(installed), "composes.py", *groups, "+accel=amp"], app).splitlines()
    for words, line in zip(groups[:3], printed, strict=False):
        assert f"{words} -> Could not override '{words.split('=')[0]}'" in line
    assert "config group 'model' does not exist" in printed[3]
    assert "config group 'data' does not exist" in printed[4]
    assert printed[5] == "+accel=amp -> composed"


def test_an_editable_install_finds_the_presets_of_the_checkout() -> None:
    path = ConfigSearchPathImpl()
    LightningAccelSearchPath().manipulate_search_path(path)
    (entry,) = path.get_path()
    assert Path(entry.path.removeprefix("travelling://")).resolve() == ROOT / "conf"
    source = Travelling(provider="lightning_accel", path=entry.path)
    assert source.list("", None) == ["accel"]
    assert {"amp", "prune", "precision", "pruning"} <= set(source.list("accel", None))
    assert source.is_group("accel") and source.is_group("accel/memory")
    assert source.is_config("accel/amp") and source.is_config("accel/memory/budget")
    for group in ("data", "model", "trainer", "accelerator", "memory", "precision", "pruning"):
        assert not source.is_group(group)
    for name in ("config", "trainer/ddp", "accel/../trainer/ddp", "memory/budget", "accelerate/x"):
        assert not source.is_config(name)
