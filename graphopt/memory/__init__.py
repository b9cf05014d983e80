"""What a run does with memory: every block's life, seen, predicted and planned."""
