"""A script that trains, and knows nothing of any other package than Lightning."""

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


if __name__ == "__main__":
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
    net = Net()
    trainer = Trainer(
        max_epochs=3, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False
    )
    trainer.fit(net, DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 8))
    print("widths", [layer.out_features for layer in net.net if hasattr(layer, "out_features")])
    print("epochs", trainer.current_epoch)
