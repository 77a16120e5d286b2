"""The pace of a training while it goes on."""
