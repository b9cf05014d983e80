"""`prune-experts`: the pass, how it chooses, how experts are merged, and what it tells."""
