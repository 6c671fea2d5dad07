"""operators: what the passes know of each operator. One table, one entry an operator.

An entry states facts about an operator, whatever pass asks for them; a pass takes its view with `having`, such as
``LAYOUT = having(Fact.LAYOUT)``. Of an operator without an entry nothing is known: labels that reach it are refused.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

import torch
from torch import distributed as dist

from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.pytorch.core import collectives

aten = torch.ops.aten
# what DTensors of a mesh ask of each other: all_reduce, wait_tensor, all_gather, reduce_scatter
COLLECTIVES: tuple[Any, ...] = (
    (
        collectives.all_reduce.default,
        collectives.wait_tensor.default,
        collectives.all_gather_into_tensor.default,
        collectives.reduce_scatter_tensor.default,
    )
    if dist.is_available()
    else ()
)
MEETINGS = frozenset(COLLECTIVES[:1] + COLLECTIVES[2:])  # those that begin with a wait for the other processes


class Fact(Flag):
    """What holds for an operator y = f(x, ...), for every x."""

    NONE = 0
    LAYOUT = auto()  # moves values and computes none, so that it can be executed on a tensor of labels
    RESHAPE = auto()  # LAYOUT that keeps the order of values
    COPY = auto()  # x itself, or its values in other memory
    CAST = auto()  # the values of x in another dtype
    MOVE = auto()  # the values of x on another device
    HOMOGENEOUS = auto()  # f(x / s) = f(x) / s for every s > 0, element by element, whatever the other arguments are
    LIKE_SECOND = auto()  # the second operand gives a shape or a dtype, no values
    SHAPE_ONLY = auto()  # y depends on the operands' shapes alone
    ROOM = auto()  # SHAPE_ONLY with the shape of x: room for what is added to each of its values
    SCORES = auto()  # arithmetic of attention scores, element by element
    SOFTMAX = auto()
    DROPOUT = auto()  # x itself in eval mode
    PRODUCT = auto()  # a product of matrices
    JOIN = auto()  # several tensors one beside the other
    SUM = auto()
    MULTIPLE = auto()  # of one operand, where the others are numbers or constants
    IN_PLACE = auto()  # y has the shape of x, and each value stands where it stood
    PATCH = auto()  # the values of x, some of them replaced
    IDS = auto()  # integers from integers: what token ids and positions are computed with
    POSITIONS = auto()  # counts, of no operand
    EMBEDDING = auto()  # rows of a table, by index
    COMPARES = auto()  # bool, or a sign, from values
    SELECTS = auto()  # one operand may say which values of another are used
    INDEXED = auto()  # SELECTS by index


_F = Fact
WHOLE = -1  # `Operator.picks` of an operator whose only output says what was picked


@dataclass(frozen=True)
class Operator:
    """One operator.

    Attributes:
        target: as in ``node.target``.
        facts: what holds for it.
        rule: what it does to labels where no fact says it, by its name in `labels.rules`.
        alias_of: the operator that it is another name of, with the same arguments.
        put: how a view of it is written to, by its name in `functionalize`.
        writes: of an operator that gives x with something written to it, the argument that is written.
        picks: of an operator that chooses by values, the output that says what was chosen, or WHOLE.
    """

    target: Any
    facts: Fact = Fact.NONE
    rule: str | None = None
    alias_of: Any = None
    put: str | None = None
    writes: int | None = None
    picks: int | None = None


_TABLE = (
    # layout
    Operator(aten.reshape.default, _F.LAYOUT | _F.RESHAPE, put="shaped"),
    Operator(aten.flatten.using_ints, _F.LAYOUT | _F.RESHAPE, put="shaped"),
    Operator(aten.unflatten.int, _F.LAYOUT | _F.RESHAPE, put="shaped"),
    Operator(aten.view.default, put="shaped"),
    Operator(aten.view_as.default, _F.LAYOUT | _F.LIKE_SECOND),
    Operator(aten.reshape_as.default, _F.LAYOUT | _F.LIKE_SECOND),
    Operator(aten.expand_as.default, _F.LAYOUT | _F.LIKE_SECOND),
    Operator(aten.expand.default, _F.LAYOUT),
    Operator(aten.repeat.default, _F.LAYOUT),
    Operator(aten.repeat_interleave.self_int, _F.LAYOUT),
    Operator(aten.transpose.int, _F.LAYOUT, put="transposed"),
    Operator(aten.t.default, _F.LAYOUT, put="turned"),
    Operator(aten.permute.default, _F.LAYOUT, put="permuted"),
    Operator(aten.movedim.int, _F.LAYOUT),
    Operator(aten.movedim.intlist, _F.LAYOUT),
    Operator(aten.flip.default, _F.LAYOUT),
    Operator(aten.roll.default, _F.LAYOUT),
    Operator(aten.unsqueeze.default, _F.LAYOUT, put="squeezed"),
    Operator(aten.squeeze.dim, _F.LAYOUT, put="shaped"),
    Operator(aten.squeeze.dims, _F.LAYOUT),
    Operator(aten.squeeze.default, _F.LAYOUT),
    Operator(aten.slice.Tensor, _F.LAYOUT, put="slice"),
    Operator(aten.select.int, _F.LAYOUT, put="select"),
    Operator(aten.narrow.default, _F.LAYOUT),
    Operator(aten.split.Tensor, _F.LAYOUT),
    Operator(aten.split_with_sizes.default, _F.LAYOUT),
    Operator(aten.tensor_split.sections, _F.LAYOUT),
    Operator(aten.tensor_split.indices, _F.LAYOUT),
    Operator(aten.chunk.default, _F.LAYOUT),
    Operator(aten.unbind.int, _F.LAYOUT),
    Operator(operator.getitem, _F.LAYOUT),
    Operator(aten.index.Tensor, _F.LAYOUT | _F.SELECTS | _F.INDEXED),
    Operator(aten.index_select.default, _F.LAYOUT | _F.SELECTS | _F.INDEXED),
    Operator(aten.cat.default, _F.JOIN | _F.PATCH | _F.IDS, rule="join"),
    Operator(aten.stack.default, _F.JOIN | _F.IDS, rule="join"),
    Operator(aten.pad.default, rule="pad"),
    Operator(aten.constant_pad_nd.default, rule="pad"),
    # copies and casts
    Operator(aten.alias.default, _F.COPY, put="itself"),
    Operator(aten.detach.default, _F.COPY, put="itself"),
    Operator(aten.detach_.default, put="itself"),
    Operator(aten.contiguous.default, _F.COPY, put="itself"),
    Operator(aten.clone.default, _F.COPY),
    Operator(aten.to.dtype, _F.CAST),
    Operator(aten.to.device, _F.MOVE),
    Operator(aten.to.dtype_layout, _F.CAST),
    Operator(aten._to_copy.default, _F.CAST),
    Operator(aten.type_as.default, _F.CAST | _F.LIKE_SECOND),
    Operator(aten.dropout.default, _F.DROPOUT | _F.IN_PLACE),
    Operator(aten.feature_dropout.default, _F.DROPOUT),
    Operator(aten.alpha_dropout.default, _F.DROPOUT),
    Operator(aten.feature_alpha_dropout.default, _F.DROPOUT),
    # shapes alone
    Operator(aten.sym_size.int, _F.SHAPE_ONLY),
    Operator(aten.zeros_like.default, _F.SHAPE_ONLY | _F.ROOM),
    Operator(aten.empty_like.default, _F.SHAPE_ONLY | _F.ROOM),
    Operator(aten.full_like.default, _F.SHAPE_ONLY | _F.ROOM),
    Operator(aten.ones_like.default, _F.SHAPE_ONLY),
    Operator(aten.new_zeros.default, _F.SHAPE_ONLY),
    Operator(aten.new_ones.default, _F.SHAPE_ONLY),
    Operator(aten.new_full.default, _F.SHAPE_ONLY),
    Operator(aten.new_empty.default, _F.SHAPE_ONLY),
    # arithmetic
    Operator(aten.add.Tensor, _F.SUM | _F.SCORES | _F.IDS, rule="add"),
    Operator(aten.sub.Tensor, _F.SUM | _F.SCORES | _F.IDS, rule="add"),
    Operator(aten.add.Scalar, _F.SCORES | _F.IDS),
    Operator(aten.sub.Scalar, _F.IDS),
    Operator(aten.rsub.Scalar, _F.IDS),
    Operator(aten.mul.Tensor, _F.MULTIPLE | _F.SCORES | _F.IDS | _F.SELECTS, rule="mul"),
    Operator(aten.div.Tensor, _F.MULTIPLE | _F.SCORES | _F.SELECTS, rule="div"),
    Operator(aten.mul.Scalar, _F.MULTIPLE | _F.SCORES | _F.HOMOGENEOUS),
    Operator(aten.div.Scalar, _F.MULTIPLE | _F.SCORES | _F.HOMOGENEOUS),
    Operator(aten.neg.default, _F.MULTIPLE | _F.HOMOGENEOUS),
    Operator(aten.abs.default, _F.HOMOGENEOUS),
    Operator(aten.relu.default, _F.HOMOGENEOUS),
    Operator(aten.leaky_relu.default, _F.HOMOGENEOUS),
    Operator(aten.tanh.default, _F.SCORES),
    Operator(aten.maximum.default, _F.SCORES),
    Operator(aten.clamp.default, _F.SCORES | _F.PATCH | _F.IDS, rule="clamp"),
    Operator(aten.clamp_min.default, _F.SCORES | _F.PATCH | _F.IDS, rule="clamp"),
    Operator(aten.clamp_max.default, _F.PATCH),
    Operator(aten.mean.dim, rule="reduce"),
    Operator(aten.sum.dim_IntList, rule="reduce"),
    Operator(aten.cumsum.default, _F.IN_PLACE | _F.IDS),
    Operator(aten.cumprod.default, _F.IN_PLACE),
    Operator(aten.tril.default, _F.IN_PLACE),
    Operator(aten.triu.default, _F.IN_PLACE),
    Operator(aten.softmax.int, _F.SOFTMAX | _F.IN_PLACE | _F.SELECTS),
    Operator(aten._softmax.default, _F.SOFTMAX | _F.IN_PLACE),
    Operator(aten._safe_softmax.default, _F.SOFTMAX),
    Operator(aten.log_softmax.int, _F.IN_PLACE),
    Operator(aten.layer_norm.default, _F.IN_PLACE),
    Operator(aten.rms_norm.default, _F.IN_PLACE),
    Operator(aten.group_norm.default, _F.IN_PLACE),
    Operator(aten.batch_norm.default, _F.IN_PLACE),
    Operator(aten.instance_norm.default, _F.IN_PLACE),
    # products
    Operator(aten.matmul.default, _F.PRODUCT | _F.SELECTS, rule="matmul"),
    Operator(aten.bmm.default, _F.PRODUCT | _F.SELECTS, rule="matmul"),
    Operator(aten.mm.default, _F.PRODUCT | _F.SELECTS, rule="matmul"),
    Operator(aten.baddbmm.default, _F.SELECTS),
    Operator(aten.addmm.default, _F.SELECTS),
    Operator(aten.einsum.default, _F.SELECTS),
    Operator(aten.scaled_dot_product_attention.default, _F.SELECTS, rule="attention"),
    Operator(sqcompile_ops.grouped_linear.default, _F.SELECTS),
    Operator(sqcompile_ops.mask_scores.default, _F.SCORES),
    # choices by values, and by masks and indices
    *(
        Operator(t, picks=1)
        for t in (aten.topk.default, aten.sort.default, aten.sort.stable, aten.max.dim, aten.min.dim)
    ),
    *(Operator(t, picks=1) for t in (aten.kthvalue.default, aten.median.dim, aten.mode.default)),
    *(Operator(t, picks=WHOLE) for t in (aten.argmax.default, aten.argmin.default, aten.argsort.default)),
    *(Operator(t, picks=WHOLE) for t in (aten.argsort.stable, aten.multinomial.default, aten.nonzero.default)),
    *(Operator(t, picks=WHOLE) for t in (aten.bucketize.Tensor, aten.searchsorted.Tensor)),
    *(Operator(t, _F.COMPARES) for t in (aten.gt.Tensor, aten.ge.Tensor, aten.lt.Tensor, aten.le.Tensor)),
    *(Operator(t, _F.COMPARES) for t in (aten.gt.Scalar, aten.ge.Scalar, aten.lt.Scalar, aten.le.Scalar)),
    *(Operator(t, _F.COMPARES) for t in (aten.eq.Tensor, aten.ne.Tensor, aten.sign.default)),
    *(Operator(t, _F.COMPARES | _F.IDS) for t in (aten.eq.Scalar, aten.ne.Scalar)),
    Operator(aten.where.self, _F.SCORES | _F.PATCH | _F.IDS | _F.SELECTS),
    Operator(aten.where.ScalarOther, _F.SCORES | _F.PATCH | _F.IDS | _F.SELECTS),
    Operator(aten.where.ScalarSelf, _F.SCORES | _F.PATCH | _F.IDS | _F.SELECTS),
    Operator(aten.masked_fill.Scalar, _F.SCORES | _F.PATCH | _F.IDS | _F.SELECTS | _F.IN_PLACE, rule="masked_fill"),
    Operator(aten.masked_fill.Tensor, _F.SCORES | _F.PATCH | _F.SELECTS | _F.IN_PLACE),
    Operator(aten.masked_select.default, _F.SELECTS),
    Operator(aten.masked_scatter.default, _F.SELECTS | _F.IN_PLACE),
    Operator(aten.gather.default, _F.SELECTS | _F.INDEXED),
    Operator(aten.take.default, _F.SELECTS | _F.INDEXED),
    Operator(aten.take_along_dim.default, _F.SELECTS | _F.INDEXED),
    Operator(aten.embedding.default, _F.SELECTS | _F.INDEXED | _F.EMBEDDING),
    Operator(aten.embedding_bag.default, _F.EMBEDDING),
    Operator(aten.embedding_bag.padding_idx, _F.EMBEDDING),
    Operator(aten.scatter.src, _F.SELECTS | _F.IN_PLACE),
    Operator(aten.scatter.value, _F.SELECTS | _F.IN_PLACE),
    Operator(aten.scatter_add.default, _F.SELECTS | _F.IN_PLACE),
    Operator(aten.scatter_reduce.two, _F.SELECTS),
    Operator(aten.index_add.default, _F.SELECTS | _F.IN_PLACE),
    Operator(aten.index_copy.default, _F.SELECTS | _F.IN_PLACE, writes=3),
    Operator(aten.index_put.default, _F.SELECTS | _F.IN_PLACE | _F.PATCH, writes=2),
    Operator(aten.index_fill.int_Scalar, _F.SELECTS),
    Operator(aten.slice_scatter.default, _F.SELECTS | _F.PATCH, writes=1),
    Operator(aten.select_scatter.default, _F.SELECTS | _F.PATCH),
    Operator(aten.repeat_interleave.Tensor, _F.SELECTS),
    Operator(aten.repeat_interleave.self_Tensor, _F.SELECTS),
    Operator(aten.arange.default, _F.POSITIONS),
    Operator(aten.arange.start, _F.POSITIONS),
    Operator(aten.arange.start_step, _F.POSITIONS),
    # between processes: sums of what each has, and waiting for them
    *(Operator(t, _F.IN_PLACE, rule="all_reduce") for t in COLLECTIVES[:1]),
    *(Operator(t, _F.IN_PLACE | _F.HOMOGENEOUS) for t in COLLECTIVES[1:2]),
    # other names
    Operator(aten.concat.default, alias_of=aten.cat.default),
    Operator(aten.concatenate.default, alias_of=aten.cat.default),
    Operator(aten.swapdims.default, alias_of=aten.transpose.int),
    Operator(aten.swapaxes.default, alias_of=aten.transpose.int),
    Operator(aten.moveaxis.int, alias_of=aten.movedim.int),
    Operator(aten.moveaxis.intlist, alias_of=aten.movedim.intlist),
    Operator(aten.broadcast_to.default, alias_of=aten.expand.default),
    Operator(aten.ravel.default, alias_of=aten.flatten.using_ints),
    Operator(aten.multiply.Tensor, alias_of=aten.mul.Tensor),
    Operator(aten.multiply.Scalar, alias_of=aten.mul.Scalar),
    Operator(aten.subtract.Tensor, alias_of=aten.sub.Tensor),
    Operator(aten.divide.Tensor, alias_of=aten.div.Tensor),
    Operator(aten.true_divide.Tensor, alias_of=aten.div.Tensor),
    Operator(aten.negative.default, alias_of=aten.neg.default),
    Operator(aten.absolute.default, alias_of=aten.abs.default),
    Operator(aten.clip.default, alias_of=aten.clamp.default),
)

OPERATORS: dict[Any, Operator] = {o.target: o for o in _TABLE}


def having(*facts: Fact) -> frozenset[Any]:
    """The operators of which one of the facts holds."""
    return frozenset(o.target for o in _TABLE if any(o.facts & f for f in facts))


def named(field: str) -> dict[Any, Any]:
    """What a field of the entries says, by operator, where it says something."""
    return {o.target: getattr(o, field) for o in _TABLE if getattr(o, field) is not None}


LAYOUT = having(Fact.LAYOUT)
HOMOGENEOUS = having(Fact.HOMOGENEOUS, Fact.COPY, Fact.CAST, Fact.MOVE)
LIKE_SECOND = having(Fact.LIKE_SECOND)
SHAPE_ONLY = having(Fact.SHAPE_ONLY)
DROPOUTS = having(Fact.DROPOUT)
