"""Strategies for the Trainer."""
