"""`memory.html`: what a trace says, as one page without any outside reference."""
