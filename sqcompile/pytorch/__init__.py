"""All that sqcompile takes from PyTorch beyond its public API, with what each name is for and where it was tried.

A module for each cost of importing: `core` has what torch itself has imported already, `symbolic` imports sympy, `dynamo`
Dynamo (with sympy and Triton), `inductor` Inductor. Functions import the last three where they need them.

For a new version of PyTorch: run tests/pytorch/test_pytorch_names.py, which looks for each name and for what we rely on of
it, then read these four files. Ruff refuses private modules of torch, and private attributes, in all other files.

Operators (``aten._to_copy``, ``mkldnn._nbytes``) are not listed: PyTorch keeps them for graphs that were saved. Nor is what
objects of PyTorch have under names without an underscore: ``SymInt.node.expr``, a ShapeEnv's guards, replacements and
ranges, ``meta["val"]`` and ``meta["example_value"]`` of nodes.
"""
