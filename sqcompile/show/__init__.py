"""``python -m sqcompile.show MODEL``: where smoothing can go in a model, as text and as a drawing."""
