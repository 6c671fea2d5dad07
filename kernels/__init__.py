"""INT8 operators: schemas in `ops`, a plain-PyTorch integer reference in `reference`, oneDNN on CPUs in `onednn`."""
