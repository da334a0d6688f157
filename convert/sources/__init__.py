"""Sources that are made into a plain directory first."""
