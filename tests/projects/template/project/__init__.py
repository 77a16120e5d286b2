"""A project in the manner of lightning-hydra-template."""
