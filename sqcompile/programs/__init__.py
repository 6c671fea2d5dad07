"""Programs in standard operators, which other runtimes run: torch.export and ONNX."""
