"""Mixtures of experts: where they are, what each expert is given, and how their chains are fitted."""
