"""What knows nothing of models: bounded reading, progress, memory, devices, text for terminals."""
