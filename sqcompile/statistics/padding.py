"""padding: which rows of a graph's tensors are real tokens, by the attention masks among its inputs.

A mask is a tensor [batch, tokens] that its argument's name says to be one: ``attention_mask``, of a decoder's own tokens
``decoder_attention_mask``. Which inputs hold the tokens that it is for, the capture's sizes say: those that the model takes to
be equal are one symbol. From there `token_rows` follows them through the graph.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from sqcompile.errors import CalibrationError
from sqcompile.passes.ir.about import about
from sqcompile.passes.ir.graph import value
from sqcompile.passes.labels.token_rows import Rows, token_rows
from sqcompile.process.lock import compiling

_MASK = re.compile(r"(?<!global_)(?<!cross_)attention_mask_?$")  # names of Dynamo end in "_"
_SIDES = ("decoder_", "encoder_")  # of an encoder-decoder, whose masks and tokens are named alike

_Tokens = dict[str, tuple[str, int, int]]


class Padding:
    """Tells real tokens from padding in one batch after another."""

    def __init__(self, gm: fx.GraphModule, nodes: Mapping[str, int]) -> None:
        """For a traced graph, and the nodes to be asked for with the dim of their channels.

        Where ``About.names`` has the arguments' own names, the graph is Dynamo's, and its calls are a user's: they are
        not refused for their padding.
        """
        self.gm, self.nodes, self.strict = gm, nodes, about(gm).names is None
        placeholders = gm.graph.find_nodes(op="placeholder")
        names = about(gm).names or {}
        self.names = {names.get(n.name, n.name): n.name for n in placeholders}
        self.inputs = {name: value(n) for name, n in zip(self.names, placeholders, strict=True)}
        self._rows: dict[frozenset[Any], dict[str, Rows]] = {}
        self._now: dict[str, Rows] = {}
        self._masks: dict[str, Tensor] = {}

    def start(self, leaves: Sequence[Any]) -> None:
        """Looks at the masks of a batch.

        Raises:
            CalibrationError: if it cannot be told which dims of an input are batch and tokens.
        """
        given = {name: x for name, x in zip(self.inputs, leaves, strict=True) if isinstance(x, Tensor)}
        masks = {name: token_mask(x) for name, x in given.items() if _MASK.search(name)}
        self._masks = {name: m for name, m in masks.items() if m is not None and not bool(m.all())}
        tokens: _Tokens = {}
        for name in self._masks:
            found, unsure = token_inputs(self.inputs, {n: tuple(x.shape) for n, x in given.items()}, name)
            if unsure and self.strict:
                size = list(given[name].shape)
                raise CalibrationError(
                    f"{name} {size} has padding, and which dims of {unsure} {list(given[unsure].shape)} are batch and tokens "
                    "does not show: calibrate with batches of two different sizes, or without padding"
                )
            tokens |= {self.names[n]: where for n, where in found.items()}
        key = frozenset(tokens.items())
        if tokens and key not in self._rows:
            with compiling():
                self._rows[key] = token_rows(self.gm, tokens, self.nodes)
        self._now = self._rows.get(key, {})

    def real(self, node: str, x: Tensor) -> Tensor | None:
        """Which rows of a node's tensor x [..., K] are real: bool of its other dims, flattened; None for all."""
        rows = self._now.get(node)
        if rows is None:
            return None
        return rows.real(self._masks[rows.mask].to(x.device), x[..., 0].numel())


def token_mask(x: Tensor) -> Tensor | None:
    """A mask of tokens as bool [batch, tokens], True where a token is real; None for a mask of another kind."""
    if x.dim() != 2 or (x.dtype.is_floating_point and not bool(((x == 0) | (x == 1)).all())):
        return None  # of scores, or added to them
    return x.bool()


def token_inputs(
    inputs: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], mask: str
) -> tuple[_Tokens, str | None]:
    """The inputs that hold a mask's tokens.

    Args:
        inputs: the values of a graph's placeholders, as recorded.
        shapes: of the batch at hand.
        mask: name of the mask, [B, T].

    Returns:
        By name: the mask, and which dims are batch and tokens; and the name of an input with which it cannot be told.
    """
    side = next((s for s in _SIDES if s + "attention_mask" in mask), "")
    mine = {
        n: inputs[n] for n in shapes if not _MASK.search(n) and (side in n if side else not any(s in n for s in _SIDES))
    }
    of_mask = _sizes(inputs[mask].shape)
    found = {n: pairs for n, x in mine.items() if (pairs := _pairs(_sizes(x.shape), of_mask))}
    tied = bool(found) and not isinstance(of_mask[1], int)
    if not tied:  # the capture does not say which sizes are equal for a reason: the batch's own
        found = {n: pairs for n in mine if (pairs := _pairs(shapes[n], shapes[mask]))}
    whole = [n for n in found if not mine[n].dtype.is_floating_point]
    tokens: _Tokens = {}
    for n in whole or found:
        fits = [p for p in found[n] if tuple(shapes[n][d] for d in p) == shapes[mask]]
        plain = n in whole or "inputs_embeds" in n  # tokens and their embeddings have the mask's own layout
        if (len(fits) > 1 and not plain) or (tokens and not whole and not tied):
            return {}, n
        if fits:
            tokens[n] = (mask, *fits[0])
    return tokens, None


def _sizes(shape: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(s.node.expr if isinstance(s, torch.SymInt) else s for s in shape)


def _pairs(sizes: Sequence[Any], of_mask: Sequence[Any]) -> list[tuple[int, int]]:
    """Dims that may be batch and tokens: of the first two if there are any, else of all."""
    fits = [
        p
        for p in itertools.permutations(range(len(sizes)), 2)
        if (sizes[p[0]], sizes[p[1]]) == (of_mask[0], of_mask[1])
    ]
    return [p for p in fits if max(p) < 2] or fits
