"""The table of operators: each fact holds for real tensors. An operator that is added needs one call here."""

import operator

import pytest
import torch
from torch import distributed

from sqcompile.passes.canonical import functionalize
from sqcompile.passes.ir.operators import COLLECTIVES, LIKE_SECOND, OPERATORS, WHOLE, Fact, aten, having, named
from sqcompile.passes.labels import rules

LIKE = torch.zeros(4, 6, dtype=torch.float64)  # gives a shape or a dtype
I = torch.tensor([2, 0])

# The arguments after x, float64 of 24 values, of one call of each operator of which a fact below is told.
CALLS = {
    aten.reshape.default: ([6, 4],), aten.flatten.using_ints: (), aten.unflatten.int: (1, [2, 3]),
    aten.view_as.default: (LIKE.view(6, 4),), aten.reshape_as.default: (LIKE.view(6, 4),),
    aten.expand_as.default: (LIKE.expand(2, 4, 6),), aten.expand.default: ([2, 4, 6],), aten.repeat.default: ([2, 1],),
    aten.repeat_interleave.self_int: (2, 1), aten.transpose.int: (0, 1), aten.t.default: (), aten.permute.default: ([1, 0],),
    aten.movedim.int: (0, 1), aten.movedim.intlist: ([0], [1]), aten.flip.default: ([1],), aten.roll.default: ([1], [1]),
    aten.unsqueeze.default: (1,), aten.squeeze.dim: (1,), aten.squeeze.dims: ([1],), aten.squeeze.default: (),
    aten.slice.Tensor: (1, 1, 5), aten.select.int: (1, 2), aten.narrow.default: (1, 1, 3), aten.split.Tensor: (2, 1),
    aten.split_with_sizes.default: ([2, 4], 1), aten.tensor_split.sections: (3, 1), aten.tensor_split.indices: ([2], 1),
    aten.chunk.default: (2, 1), aten.unbind.int: (0,), operator.getitem: (1,), aten.index.Tensor: ([None, I],),
    aten.index_select.default: (1, I),
    aten.alias.default: (), aten.detach.default: (), aten.contiguous.default: (), aten.clone.default: (),
    aten.to.dtype: (torch.float32,), aten.to.device: ("cpu", torch.float32), aten.to.dtype_layout: (),
    aten._to_copy.default: (), aten.type_as.default: (LIKE.float(),),
    aten.mul.Scalar: (-3.0,), aten.div.Scalar: (3.0,), aten.neg.default: (), aten.abs.default: (), aten.relu.default: (),
    aten.leaky_relu.default: (0.2,),
    aten.sym_size.int: (1,), aten.zeros_like.default: (), aten.ones_like.default: (), aten.full_like.default: (2.0,),
    aten.new_zeros.default: ([3],), aten.new_ones.default: ([3],), aten.new_full.default: ([3], 2.0),
    aten.dropout.default: (0.5, False), aten.feature_dropout.default: (0.5, False), aten.alpha_dropout.default: (0.5, False),
    aten.feature_alpha_dropout.default: (0.5, False),
    aten.cumsum.default: (1,), aten.cumprod.default: (1,), aten.tril.default: (), aten.triu.default: (),
    aten.softmax.int: (1,), aten._softmax.default: (1, False), aten.log_softmax.int: (1,), aten._safe_softmax.default: (1,),
    aten.layer_norm.default: ([6],), aten.rms_norm.default: ([6],), aten.group_norm.default: (2,),
    aten.instance_norm.default: (None, None, None, None, True, 0.1, 1e-5, False),
    aten.batch_norm.default: (None, None, None, None, True, 0.1, 1e-5, False),
    aten.masked_fill.Scalar: (LIKE > 0, 2.0), aten.masked_fill.Tensor: (LIKE > 0, torch.tensor(2.0, dtype=torch.float64)),
    aten.masked_scatter.default: (LIKE > 0, LIKE), aten.scatter.src: (0, LIKE.long(), LIKE),
    aten.scatter.value: (0, LIKE.long(), 2.0), aten.scatter_add.default: (0, LIKE.long(), LIKE),
    aten.index_add.default: (1, I, LIKE[:, :2]), aten.index_copy.default: (1, I, LIKE[:, :2]),
    COLLECTIVES[0]: ("sum",), COLLECTIVES[1]: (),
    aten.index_put.default: ([None, I], LIKE[:, :2]), aten.slice_scatter.default: (LIKE[:, :2], 1, 0, 2),
}  # fmt: skip
WITHOUT_VALUES = {aten.empty_like.default, aten.new_empty.default}  # whatever was in memory
SHAPES = {aten.instance_norm.default: (1, 4, 6)}  # of x, where it is not [4, 6]
KINDS = {
    "layout": having(Fact.LAYOUT),
    "copy": having(Fact.COPY, Fact.CAST, Fact.MOVE, Fact.DROPOUT),
    "homogeneous": having(Fact.HOMOGENEOUS),
    "shape only": having(Fact.SHAPE_ONLY) - WITHOUT_VALUES,
    "in place": having(Fact.IN_PLACE),
}


@pytest.fixture(autouse=True, scope="module")
def group():
    """Of this process, with which all_reduce is called."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    CALLS[COLLECTIVES[0]] = ("sum", distributed.group.WORLD.group_name)
    yield
    distributed.destroy_process_group()


def x_of(seed=0):
    return torch.randn(4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def call(target, x):
    y = target(x.reshape(SHAPES.get(target, (4, 6))), *CALLS[target])
    return y if isinstance(y, (list, tuple)) else [y]


def operators(kind):
    return pytest.mark.parametrize("target", sorted(KINDS[kind], key=str), ids=str)


@operators("layout")
def test_a_layout_moves_values_and_computes_none(target):
    """Each value of y is the value of x at a place that depends on shapes alone, so labels may be moved for values."""
    x, places = x_of(), torch.arange(24)
    for y, at in zip(call(target, x), call(target, places), strict=True):
        assert torch.equal(y, x.flatten()[at])


@operators("copy")
def test_a_copy_keeps_values(target):
    x = x_of().float().double()  # so that a cast to float32 rounds nothing
    (y,) = call(target, x)
    assert torch.equal(y.double(), x)


@operators("homogeneous")
def test_a_homogeneous_operator_commutes_with_a_scale(target):
    x, s = x_of(), torch.rand(6, dtype=torch.float64) + 0.5
    assert torch.allclose(call(target, x / s)[0], call(target, x)[0] / s, rtol=1e-12)


@operators("shape only")
def test_what_reads_only_shapes_gives_the_same_for_all_values(target):
    (a,), (b,) = call(target, x_of(0)), call(target, x_of(1))
    assert a == b if isinstance(a, int) else torch.equal(a, b)


@operators("in place")
def test_an_operator_in_place_gives_the_shape_of_its_operand(target):
    assert call(target, x_of())[0].shape == SHAPES.get(target, (4, 6))


@pytest.mark.parametrize("target", sorted(LIKE_SECOND, key=str), ids=str)
def test_of_a_second_operand_no_values_are_read(target):
    (like,) = CALLS[target]
    assert torch.equal(target(x_of(), like), target(x_of(), torch.ones_like(like)))


def test_entries_are_complete_and_known():
    """One entry an operator; what its fields name exists."""
    assert set(named("rule").values()) == set(rules._NAMED) and rules.RULES.keys() == named("rule").keys()
    assert set(named("put").values()) == set(functionalize._NAMED)
    for target, other in named("alias_of").items():
        assert other in OPERATORS and not OPERATORS[target].facts and OPERATORS[target].rule is None
        mine, its = ([str(a.type) for a in t._schema.arguments] for t in (target, other))
        assert mine == its[: len(mine)] and all(a.has_default_value() for a in other._schema.arguments[len(mine) :])
    assert {v for v in named("picks").values()} == {1, WHOLE}
    # a rule says what happens to labels where no fact does
    assert not named("rule").keys() & having(
        Fact.LAYOUT, Fact.HOMOGENEOUS, Fact.COPY, Fact.CAST, Fact.MOVE, Fact.SHAPE_ONLY
    )


@pytest.mark.parametrize("target", sorted(named("picks"), key=str), ids=str)
def test_the_output_that_says_what_was_picked_is_integer(target):
    x, edges = x_of(), torch.arange(-3.0, 3.0, dtype=torch.float64)
    more = {
        aten.topk.default: (2,), aten.kthvalue.default: (2,), aten.max.dim: (1,), aten.min.dim: (1,), aten.median.dim: (1,),
        aten.sort.stable: (None,), aten.argsort.stable: (True,), aten.multinomial.default: (2,), aten.bucketize.Tensor: (edges,),
    }  # fmt: skip
    x = x.abs() if target == aten.multinomial.default else x
    if target == aten.searchsorted.Tensor:
        y = target(edges, x)
    else:
        y = (
            target(x, **{"stable": True})
            if target in (aten.sort.stable, aten.argsort.stable)
            else target(x, *more.get(target, ()))
        )
    which = named("picks")[target]
    picked = y if which == WHOLE else y[which]
    assert picked.dtype == torch.int64
