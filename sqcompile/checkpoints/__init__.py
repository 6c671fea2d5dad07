"""checkpoints: directories of weights that other tools read and write."""
