"""How a kind is run: its processes, their devices, and the join of what they saw."""
