"""Attacks on the cost of one training step, each a correct implementation: what an informed engineer would use."""
