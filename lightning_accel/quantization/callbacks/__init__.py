"""What a Trainer takes: one class per file."""
