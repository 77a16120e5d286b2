"""What a Trainer takes of this technique."""
