"""The parts of convert.py: the one pass, one layer's conversion, what is kept of it, and budgets."""
