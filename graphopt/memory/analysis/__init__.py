"""What a trace of memory says: periods, intervals, categories, and what could be freed."""
