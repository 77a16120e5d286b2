"""What the template's `train` does."""

from __future__ import annotations

import hydra
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from project.net import Net, rows


def instantiate_callbacks(cfg: DictConfig | None) -> list[Callback]:
    """As the template has it."""
    if not cfg:
        return []
    nodes = [node for node in cfg.values() if isinstance(node, DictConfig) and "_target_" in node]
    return [hydra.utils.instantiate(node) for node in nodes]


def instantiate_loggers(cfg: DictConfig | None) -> list[Logger]:
    return [hydra.utils.instantiate(node) for node in (cfg or {}).values()]


def train(cfg: DictConfig) -> tuple[Net, Trainer]:
    """What the template's `train` does."""
    torch.manual_seed(0)
    model: Net = hydra.utils.instantiate(cfg.model)
    callbacks = instantiate_callbacks(cfg.get("callbacks"))
    logger = instantiate_loggers(cfg.get("logger"))
    trainer: Trainer = hydra.utils.instantiate(cfg.trainer, callbacks=callbacks, logger=logger)
    trainer.fit(model, rows(), rows(), ckpt_path=cfg.get("ckpt_path"))
    return model, trainer


@hydra.main(version_base="1.3", config_path="../configs", config_name="train.yaml")
def main(cfg: DictConfig) -> None:
    """Train, and print what came out."""
    model, trainer = train(cfg)
    print("widths", [layer.out_features for layer in model.net if hasattr(layer, "out_features")])
    print("epochs", trainer.current_epoch)


if __name__ == "__main__":
    main()
