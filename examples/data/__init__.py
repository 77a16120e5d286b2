"""Plain LightningDataModules over data that every machine has."""
