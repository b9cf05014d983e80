"""`prune-blocks`: the pass, how it chooses, and what it tells."""
