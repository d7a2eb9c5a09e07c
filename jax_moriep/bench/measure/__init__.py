"""How a number is taken: programs compiled and repeated, calls by turns, memory, and what it ran on."""
