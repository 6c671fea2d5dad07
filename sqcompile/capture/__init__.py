"""trace: a model and a call become an FX graph of ATen operators; what a call is, and what a capture serves."""
