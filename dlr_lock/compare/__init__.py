"""A locked model beside its original: what both score on benchmark tasks, and how fast both run."""
