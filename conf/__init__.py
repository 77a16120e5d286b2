"""Configuration as data. Hydra 1.4 finds `pkg://lightning_accel.conf` only when this file exists."""
