"""A plain Hydra app: one yaml, and a Trainer that is built from it."""

import hydra
import torch
from hydra.utils import instantiate
from lightning.pytorch import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self, width):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(cfg):
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    net = Net(cfg.width)
    trainer = instantiate(cfg.trainer)
    trainer.fit(net, DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8))
    print("widths", [layer.out_features for layer in net.net if hasattr(layer, "out_features")])
    print("epochs", trainer.current_epoch)


if __name__ == "__main__":
    main()
