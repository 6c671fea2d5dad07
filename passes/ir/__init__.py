"""What a graph is made of: nodes and tensors, recorded values, symbolic sizes."""
