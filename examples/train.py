"""Train, test and report from a configuration: `python examples/train.py +accel=amp_prune`."""

from __future__ import annotations

import contextlib

import hydra
from omegaconf import DictConfig

from lightning_accel.job import job
from lightning_accel.recipe import build, prepare_teacher

with contextlib.suppress(ImportError):  # an installed package has the plugin where Hydra finds it
    from lightning_accel._hydra_plugins import register

    register()

OURS = ("models.", "data.")


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> float | list[float] | None:
    """Fit and test; return the objective of a sweep, measured on the validation data."""
    with job(cfg):
        prepare_teacher(cfg, allow=OURS)
        run = build(cfg, allow=OURS)
        run.trainer.fit(run.model, run.data, ckpt_path=run.ckpt_path, weights_only=True)
        objective = run.objective()
        run.trainer.test(run.model, run.data)
    return objective


if __name__ == "__main__":
    main()
