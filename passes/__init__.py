"""Analyses and rewrites of captured graphs, in rooms that follow the pipeline (`sqcompile/pipeline.py`).

    ir -> canonical -> labels -> attention -> planning -> rewrite -> lowering

Analyses (`match`, `find_attentions`, `choose`) return data and never touch the graph. `fold`, `insert_qdq` and `lower` take
a GraphModule, leave it as it was, and return a new one; the steps that they are made of (`quantize_attention`, `fuse`,
`lower_all_reduces`, `lower_attention`, `lower_int8_attention`, `check_ids`) and `canonicalize` work in place, on a graph that is theirs.

Every pass reads recorded values (``meta["val"]``) and the record's ``fake_mode`` (`ir.about`), and records what it adds. Of the
rest of the record, captures give ``captured``, ``out_spec`` and ``aliases``, of Dynamo's graphs ``arguments``, ``updates``,
``names``, ``sizes`` and ``conditions``; `insert_qdq` gives ``lazy`` where weights are shared, and `lower`, which uses that up
or gives its own, gives ``target`` and ``merged``.
"""
