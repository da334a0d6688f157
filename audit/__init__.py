"""What a lock costs whoever trains the locked model."""
