"""INT8 GEMMs in Triton: dense and grouped, which tile serves which shape, and how tables of tiles are measured."""
