"""Below the transports: groups of ranks, the key-value exchange, native libraries and custom-call targets."""
