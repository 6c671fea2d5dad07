"""Analyses and rewrites of captured graphs.

Analyses (`labels`, `match`) return data and never touch the graph. Rewrites (`fold`, `insert_qdq`, `lower`) take a
GraphModule, leave it as it was, and return a new one. Their order is the source order of `sqcompile/pipeline.py`.
"""
