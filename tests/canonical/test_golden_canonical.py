"""What canonicalize, aliases and functionalize make of a graph, as text: the examples of their docstrings."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from golden_cases import before_after, difference, expression, graph, untrue
from torch import fx

from sqcompile.passes.canonical import aliases, canonicalize


def call(text: str, *inputs: str, **tensors: list[int]) -> fx.GraphModule:
    """A graph of one call, or of several, the last of which is returned."""
    calls = [f"%{'abcdefgh'[i]}{i} = {line}" for i, line in enumerate(text.split("; "))]
    result = calls[-1].partition(" ")[0]
    return graph("\n".join([*(f"{i} = input" for i in inputs), *calls, f"return {result}"]), tensors)


def table(*graphs: fx.GraphModule) -> str:
    """What each graph is before and after, a line each. They give the same."""
    rows = []
    for gm in graphs:
        _, after = before_after(canonicalize.canonicalize, gm)
        assert difference(gm, after) <= 1e-6
        rows.append((expression(gm), expression(after)))
    width = max(len(before) for before, _ in rows)
    return "\n".join(f"{before:{width}} -> {after}" for before, after in rows) + "\n"


def linears() -> str:
    x, rows = "%x: f32[2, 3, 4]", "%x: f32[3, 4]"
    return table(
        call("aten.addmm(%b, %x, %w)", rows, w=[4, 6], b=[6]),
        call("aten.mm(%x, %w)", rows, w=[4, 6]),
        call("aten.matmul(%x, %w)", x, w=[4, 6]),
        call("aten.linear(input=%x, weight=%w, bias=%b)", x, w=[6, 4], b=[6]),
        call("aten.linear(%x, %w, %one)", x, w=[6, 4], one=[1]),
        call("aten.einsum('bsd,dhe->bshe', [%x, %w])", x, w=[4, 2, 8]),
    )


def experts() -> str:
    return table(
        call("aten.bmm(%x, %w)", "%x: f32[2, 3, 4]", w=[2, 4, 6]),
        call("aten.einsum('etd,edf->etf', [%x, %w])", "%x: f32[2, 3, 4]", w=[2, 4, 6]),
    )


def routed() -> tuple[str, fx.GraphModule, fx.GraphModule]:
    gm = graph(
        "%x: bf16[16, 16] = input\n%offsets: i32[2] = input\n%y = aten._grouped_mm(%x, %w, %offsets)\nreturn %y",
        {"w": torch.randn(2, 16, 32, generator=torch.Generator().manual_seed(0)).bfloat16()},
    )
    _, after = before_after(canonicalize.canonicalize, gm)
    return f"{expression(gm)} -> {expression(after)}\n", gm, after


def products() -> str:
    x, y = "%x: f32[2, 3, 4]", "%y: f32[2, 4, 3]"
    heads = ("%x: f32[2, 3, 2, 4]", "%y: f32[2, 5, 2, 4]")
    return table(
        call("aten.bmm(%x, %y)", x, y),
        call("aten.einsum('bqhd,bkhd->bhqk', [%x, %y])", *heads),
        call("aten.baddbmm(%z, %x, %y, beta=2)", x, y, "%z: f32[2, 3, 3]"),
    )


def views() -> str:
    x = "%x: f32[2, 3, 4]"
    return table(
        call("aten.view(%x, [6, 4])", x),
        call("aten._unsafe_view(%x, [6, 4])", x),
        call("aten.clone(%x); aten._unsafe_view(%a0, [6, 4])", x),
        call("aten.dropout(%x, 0.5, False); aten.neg(%a0)", x),
        call("aten.detach(%x); aten.neg(%a0)", x),
        call("aten._to_copy(%x, dtype=float64)", x),
    )


def test_every_spelling_of_a_linear_is_linear():
    assert_expected_inline(
        linears(),
        """\
addmm(%b, %x, %w)                    -> linear(%x, t(%w), %b)
mm(%x, %w)                           -> linear(%x, t(%w))
matmul(%x, %w)                       -> linear(%x, t(%w))
linear(input=%x, weight=%w, bias=%b) -> linear(%x, %w, %b)
linear(%x, %w, %one)                 -> add(linear(%x, %w), %one)
einsum(bsd,dhe->bshe, [%x, %w])      -> unflatten(linear(%x, reshape(permute(%w, [1, 2, 0]), [16, 4])), -1, [2, 8])
""",
    )


def test_experts_with_as_many_rows_each_are_grouped():
    assert_expected_inline(
        experts(),
        """\
bmm(%x, %w)                    -> reshape(sqcompile.grouped_linear(reshape(%x, [-1, 4]), transpose(%w, -2, -1), mul(%experts, 3)), [2, 3, 6])
einsum(etd,edf->etf, [%x, %w]) -> reshape(reshape(sqcompile.grouped_linear(reshape(reshape(%x, [2, -1, 4]), [-1, 4]), reshape(permute(%w, [0, 2, 1]), [2, 6, 4]), mul(%experts, 3)), [2, 3, 6]), [2, 3, 6])
""",
    )


def test_routed_experts_have_their_weights_transposed():
    text, gm, after = routed()
    assert_expected_inline(
        text,
        """\
_grouped_mm(%x, %w, %offsets) -> sqcompile.grouped_linear(%x, transpose(%w, -2, -1), %offsets)
""",
    )
    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert difference(gm, after, [x, torch.tensor([5, 16], dtype=torch.int32)]) <= 1e-2


def test_products_of_data_are_matmul():
    assert_expected_inline(
        products(),
        """\
bmm(%x, %y)                       -> matmul(%x, %y)
einsum(bqhd,bkhd->bhqk, [%x, %y]) -> matmul(permute(%x, [0, 2, 1, 3]), transpose(permute(%y, [0, 2, 1, 3]), -1, -2))
baddbmm(%z, %x, %y, beta=2)       -> add(matmul(%x, %y), mul(%z, 2))
""",
    )


def test_views_and_what_computes_nothing():
    assert_expected_inline(
        views(),
        """\
view(%x, [6, 4])                -> reshape(%x, [6, 4])
_unsafe_view(%x, [6, 4])        -> reshape(%x, [6, 4])
_unsafe_view(clone(%x), [6, 4]) -> reshape(%x, [6, 4])
neg(dropout(%x, 0.5, False))    -> neg(%x)
neg(detach(%x))                 -> neg(%x)
_to_copy(%x, dtype=float64)     -> to(%x, float64)
""",
    )


def test_what_only_looks_like_a_linear_is_left_as_it_is():
    text = table(
        call("aten.addmm(%b, %x, %w, beta=2)", "%x: f32[3, 4]", w=[4, 6], b=[6]),
        call("aten.einsum('bsd,bsd->bs', [%x, %y])", "%x: f32[2, 3, 4]", "%y: f32[2, 3, 4]"),
        call("aten.matmul(%x, %w)", "%x: f32[1, 3, 4]", w=[2, 4, 6]),
    )
    assert_expected_inline(
        text,
        """\
addmm(%b, %x, %w, beta=2)     -> addmm(%b, %x, %w, beta=2)
einsum(bsd,bsd->bs, [%x, %y]) -> einsum(bsd,bsd->bs, [%x, %y])
matmul(%x, %w)                -> matmul(%x, %w)
""",
    )


def test_the_table_in_the_docstring_of_canonicalize():
    assert untrue(canonicalize, linears() + experts() + routed()[0] + products() + views() + names()) == []


def names() -> str:
    x = "%x: f32[2, 3, 4]"
    return table(
        call("aten.concat([%x, %x], 1)", x),
        call("aten.hstack([%x, %x])", x),
        call("aten.mT(%x)", x),
        call("aten.swapdims(%x, 0, 2)", x),
        call("aten.numpy_T(%x)", "%x: f32[3, 4]"),
        call("aten.moveaxis(%x, 0, 2)", x),
        call("aten.tile(%x, [2])", x),
        call("aten.broadcast_to(%x, [5, 2, 3, 4])", x),
        call("aten.ravel(%x)", x),
        call("aten.multiply(%x, %y)", x, "%y: f32[2, 3, 4]"),
        call("aten.true_divide(%x, %y)", x, "%y: f32[2, 3, 4]"),
        call("aten.clip(%x, 0)", x),
    )


def test_operations_of_several_names_have_one():
    assert_expected_inline(
        names(),
        """\
concat([%x, %x], 1)            -> cat([%x, %x], 1)
hstack([%x, %x])               -> cat([%x, %x], 1)
mT(%x)                         -> transpose(%x, -2, -1)
swapdims(%x, 0, 2)             -> transpose(%x, 0, 2)
numpy_T(%x)                    -> transpose(%x, -2, -1)
moveaxis(%x, 0, 2)             -> movedim(%x, 0, 2)
tile(%x, [2])                  -> repeat(%x, [1, 1, 2])
broadcast_to(%x, [5, 2, 3, 4]) -> expand(%x, [5, 2, 3, 4])
ravel(%x)                      -> flatten(%x)
multiply(%x, %y)               -> mul(%x, %y)
true_divide(%x, %y)            -> div(%x, %y)
clip(%x, 0)                    -> clamp(%x, 0)
""",
    )
    assert untrue(aliases, names()) == []
