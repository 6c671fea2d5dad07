"""lm_head: which linear is the projection back to the vocabulary, whatever its name. Analysis only."""

from __future__ import annotations

import torch
from torch import fx

from sqcompile.passes.ir.graph import Linear, aten, find_linears, nodes_by_name, value
from sqcompile.passes.ir.operators import LAYOUT, Fact, having

# Ids are still ids afterwards, in another dtype or some of them replaced.
_EDITS = having(Fact.COPY, Fact.CAST, Fact.MOVE, Fact.PATCH)


def is_lm_head(gm: fx.GraphModule, l: Linear) -> bool:
    """Whether a linear has the shape of a token embedding and no other linear reads what it makes."""
    embeddings = gm.graph.find_nodes(op="call_function", target=aten.embedding.default)
    if not any(_rows(n) == l.shape[0] and value(n).shape[-1] == l.shape[1] and _is_vocabulary(n) for n in embeddings):
        return False
    others = {k.node for k in find_linears(gm)} - {l.node}
    todo, seen = [nodes_by_name(gm)[l.node]], set()
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name in others:
            return False
        todo.extend(node.users)
    return True


def _is_vocabulary(embedding: fx.Node) -> bool:
    """Whether an embedding is that of the model's tokens: types of tokens are added to it, and have the smaller table."""
    if not _is_input(embedding.args[1]):  # type: ignore[arg-type]
        return False
    top = embedding
    while added := next((u for u in top.users if u.target == aten.add.Tensor), None):
        top = added
    todo, found = [top], []
    while todo:
        node = todo.pop()
        found += [node] if node.target == aten.embedding.default and _is_input(node.args[1]) else []  # type: ignore[arg-type]
        todo += node.all_input_nodes if node.target == aten.add.Tensor else []
    return all(_rows(n) <= _rows(embedding) for n in found)


def _rows(embedding: fx.Node) -> int:
    return int(value(embedding.args[0]).shape[0])  # type: ignore[arg-type]


def _is_input(node: fx.Node) -> bool:
    """Whether a node is an input of the model, edited or not: token ids, not positions, which a model counts itself."""
    todo = [node]
    while todo:
        node = todo.pop()
        if node.op == "placeholder":
            return True
        if node.target in LAYOUT:
            todo += node.args[:1]  # type: ignore[arg-type]
        elif node.target in _EDITS:
            todo += [a for a in node.all_input_nodes if getattr(value(a), "dtype", torch.bool) != torch.bool]
    return False
