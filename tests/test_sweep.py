"""A sweep over presets: one W&B run per job, in one group, with its configuration and report."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from wandb_server import wandb_server

ROOT = Path(__file__).resolve().parents[1]
FAST = ["trainer=fast", "accelerator=cpu", "model.widths=[8,16]", "model.depth=1"]
pytestmark = [pytest.mark.slow, pytest.mark.sweep]


def call(command: list[str], cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run without any W&B credentials but those given, and with a private home."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_") and k != "NETRC"}
    env |= {
        "PYTHONPATH": str(ROOT),
        "HOME": str(cwd),
        "OMP_NUM_THREADS": "1",
        "WANDB_SILENT": "true",
        **more,
    }
    with subprocess.Popen(
        command, stdout=-1, stderr=-1, text=True, cwd=cwd, env=env, start_new_session=True
    ) as process:
        try:
            printed, errors = process.communicate(timeout=900)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # ranks outlive the one that started them
            raise
    return subprocess.CompletedProcess(command, process.returncode, printed, errors)


def train(cwd: Path, *arguments: str) -> str:
    done = call([sys.executable, str(ROOT / "examples/train.py"), *arguments], cwd)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def inspect(run: Path, *options: str) -> list[dict[str, Any]]:
    """Read an offline run back with W&B's own reader."""
    wandb = Path(sys.executable).with_name("wandb")
    done = call([str(wandb), "leet", "inspect", *options, "--json", str(run)], run)
    assert done.returncode == 0, done.stderr
    if "--summary" in options:
        return [json.loads(done.stdout)]
    return [json.loads(line) for line in done.stdout.splitlines() if line]


def test_a_sweep_logs_one_run_per_job_grouped_with_config_and_report(tmp_path: Path) -> None:
    sweep_of = ["+accel=none,amp_prune", "seed=0,1", "logger=wandb"]
    train(tmp_path, "-m", *sweep_of, "+callbacks.report.budget_s=0.2", *FAST)
    (sweep,) = (tmp_path / "outputs").iterdir()
    runs = sorted(sweep.glob("*/wandb/offline-run-*"))
    assert len(runs) == 4
    seen = []
    for run in runs:
        (summary,) = inspect(run, "--summary")
        config = summary["config"]
        assert summary["exit_code"] == 0
        seen.append((tuple(sorted(config["accel"])), config["seed"]))
        assert config["trainer"]["max_epochs"] == 2
        ratios = {k: v for k, v in summary["summary"].items() if "ratio" in k}
        assert ratios, f"no report in {sorted(summary['summary'])}"
        records = inspect(run)
        groups = {r["run"]["run_group"] for r in records if "run_group" in r.get("run", {})}
        assert groups == {sweep.name}
        preset = "_".join(config["accel"])
        assert summary["name"] == f"accel={preset} seed={config['seed']}"
        techniques = {"amp": "precision", "prune": "pruning", "none": None}
        assert {*summary["tags"]} == {preset, *map(techniques.get, config["accel"])} - {None}
        assert summary["summary"]["report/gains_table"]["nrows"] >= 2
    presets = [("none",), ("amp", "prune")]
    assert sorted(seen) == sorted((preset, seed) for preset in presets for seed in (0, 1))
    reports = [json.loads(p.read_text()) for p in sorted(sweep.glob("*/**/report.json"))]
    assert len(reports) == 4


def test_a_run_belongs_to_no_group_and_keeps_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary = "c4n4ry-0123456789"
    monkeypatch.setenv("SERVICE_TOKEN", canary)
    (tmp_path / "more" / "db").mkdir(parents=True)
    (tmp_path / "more" / "db" / "mine.yaml").write_text(
        f"password: {canary}\nurl: 'db://me:{canary}@host/x'\n"
    )
    more = [
        f"hydra.searchpath=[file://{tmp_path}/more]",
        "+db=mine",
        "+note=${oc.env:SERVICE_TOKEN}",
    ]
    train(tmp_path, "logger=wandb", *more, *FAST)
    (out,) = (tmp_path / "outputs").iterdir()
    (run,) = out.glob("wandb/offline-run-*")
    (summary,) = inspect(run, "--summary")
    assert "note=" in summary["name"] and summary["tags"] == ["none"]
    assert summary["config"]["note"] == summary["config"]["db"]["password"] == "***"
    assert not any("run_group" in record.get("run", {}) for record in inspect(run))
    assert not [p for p in out.rglob("*") if p.is_file() and canary.encode() in p.read_bytes()]


def grid(parameters: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every point of a grid of W&B, by hand."""
    choices = [
        spec["values"] if "values" in spec else [spec["value"]] for spec in parameters.values()
    ]
    return [dict(zip(parameters, point, strict=True)) for point in itertools.product(*choices)]


SWEEP = yaml.safe_load((ROOT / "conf/sweep/amp_prune.yaml").read_text())


def test_every_point_of_the_sweep_for_wandb_is_a_configuration() -> None:
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    assert SWEEP["command"][-1] == "${args_no_hyphens}"
    points = grid(SWEEP["parameters"])
    assert len(points) == 6
    for point in points:
        command = {"args": {name: {"value": value} for name, value in point.items()}}
        words = create_sweep_command_args(command)["args_no_hyphens"]
        with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
            config = compose("config", words)
        assert config.seed == point["seed"] and config.accel.amp and config.accel.prune
        assert config.callbacks.pruning.ratio == point["callbacks.pruning.ratio"]
        assert config.logger.wandb.project == "lightning_accel"


def test_an_agent_trains_the_points_of_a_sweep_wandb_1427_1856(tmp_path: Path) -> None:
    """`wandb sweep` and `wandb agent`, against a server on loopback; that it refuses the second run ends no training."""
    points = [{"+accel": "amp_prune", "callbacks.pruning.ratio": ratio} for ratio in (0.25, 0.5)]
    words = dict(word.split("=", 1) for word in (*FAST, "+callbacks.report.budget_s=0.2"))
    runs = [{**p, **words, "logger": "wandb", "callbacks.pruning.when": 1} for p in points]
    with wandb_server(runs) as server:
        env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "local-" + "a" * 40}
        env["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of `${interpreter}`
        wandb = str(Path(sys.executable).with_name("wandb"))
        sweep = call([wandb, "sweep", str(ROOT / "conf/sweep/amp_prune.yaml")], tmp_path, **env)
        assert sweep.returncode == 0, sweep.stderr[-2000:]
        assert yaml.safe_load(server.config)["parameters"] == SWEEP["parameters"]
        (tmp_path / "examples").symlink_to(ROOT / "examples")
        (tmp_path / "conf").symlink_to(ROOT / "conf")
        server.refuses = {"run2"}
        agent = call([wandb, "agent", "me/ours/sweep1"], tmp_path, **env)
        assert agent.returncode == 0, agent.stdout[-3000:] + agent.stderr[-3000:]
        reports = [json.loads(p.read_text()) for p in tmp_path.rglob("report.json")]
        assert len(reports) == 2, agent.stdout[-3000:] + agent.stderr[-3000:]
        streamed = {run: json.dumps(sent) for run, sent in server.sent.items()}
    assert "report/ratio_params" in streamed["run1"] and "report/gains_table" in streamed["run1"]
    assert agent.stderr.count("which is kept offline") == 1 and "run2" not in streamed
    (offline,) = tmp_path.rglob("offline-run-*/*.wandb")
    assert offline.stem == "run-run2"


APP = """
import json, os, sys
sys.path.insert(0, {tests!r})
import hydra, torch
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch import LightningModule, Trainer
from lightning_accel.job import job

class Tiny(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(2, 1)
    def training_step(self, batch, batch_idx):
        return self.net(batch).sum()
    def train_dataloader(self):
        return torch.utils.data.DataLoader(torch.ones(8, 2), 2)
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    with job(cfg):
        trainer = Trainer(accelerator="cpu", devices=2, strategy="ddp", max_steps=2, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        trainer.fit(Tiny())
        hydra_ = HydraConfig.get()
        seen = dict(lr=cfg.lr, seed=torch.initial_seed(), mode=hydra_.mode.name)
        name = f"rank{{trainer.global_rank}}-{{os.getpid()}}.json"
        open(os.path.join(hydra_.runtime.output_dir, name), "w").write(json.dumps(seen))

main()
"""


@pytest.mark.ddp
def test_the_ranks_of_a_sweep_train_with_the_same_values(tmp_path: Path) -> None:
    """Under Hydra, and as an agent starts them: wandb#3883, wandb#5695, lightning-kitti#3 had the values on rank 0 alone."""
    (tmp_path / "app.py").write_text(APP.format(tests=str(ROOT / "tests")))
    sweep = ["-m", "+lr=0.1,0.2", "+seed=7", "hydra.sweep.dir=sweep"]
    done = call([sys.executable, "app.py", *sweep], tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    for job, lr in enumerate([0.1, 0.2]):
        ranks = sorted((tmp_path / "sweep" / str(job)).glob("rank*.json"))
        assert [path.name[:5] for path in ranks] == ["rank0", "rank1"], "each rank ran once"
        seen = [json.loads(path.read_text()) for path in ranks]
        assert [(rank["lr"], rank["seed"]) for rank in seen] == [(lr, 7)] * 2
        assert [rank["mode"] for rank in seen] == ["MULTIRUN", "RUN"]
    assert not (tmp_path / "outputs").exists() and not (tmp_path / "multirun").exists()
    words = ["+lr=0.3", "+seed=8", "hydra.run.dir=agent"]
    agent = {"WANDB_SWEEP_ID": "sweep1", "WANDB_RUN_ID": "run1", "WANDB_MODE": "offline"}
    done = call([sys.executable, "app.py", *words], tmp_path, **agent)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = [json.loads(path.read_text()) for path in (tmp_path / "agent").glob("rank*.json")]
    assert [(rank["lr"], rank["seed"]) for rank in seen] == [(0.3, 8)] * 2


@pytest.mark.ddp
def test_a_sweep_on_two_processes_trains_its_teacher_once(tmp_path: Path) -> None:
    teacher = [
        "teacher.model.widths=[8,16]",
        "teacher.model.depth=1",
        "teacher.trainer.max_epochs=1",
    ]
    two = ["trainer.strategy=ddp", "trainer.devices=2", "+callbacks.report.budget_s=0.2"]
    printed = train(tmp_path, "-m", "+accel=distill", "seed=0,1", *FAST, *two, *teacher)
    assert printed.count("Training the teacher first") == 1
    assert len(list((tmp_path / "outputs" / "teachers").iterdir())) == 1
    assert len(list(tmp_path.glob("outputs/sweep_*/*/**/report.json"))) == 2
