"""Files of a model folder, read within bounds and within the folder."""
