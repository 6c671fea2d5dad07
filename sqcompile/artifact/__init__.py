"""artifact: a compiled model as a directory: safetensors and JSON, nothing that is executed."""
