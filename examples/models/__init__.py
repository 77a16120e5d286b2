"""Plain LightningModules that know nothing of lightning_accel."""
