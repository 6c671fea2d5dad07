"""What the analyses of attention find, as text: attentions, their scores, and where their scales can go."""

from __future__ import annotations

from expecttest import assert_expected_inline
from golden_cases import graph, said, untrue
from torch import fx

from sqcompile.passes.attention import chains, head_sites, heads, scores, value_sites
from sqcompile.passes.ir.graph import nodes_by_name
from sqcompile.passes.ir.text import show

OPERANDS = """
    %q: f32[s0, 4, s1, 8] = input
    %k: f32[s0, 4, s1, 8] = input
    %v: f32[s0, 4, s1, 8] = input
    %mask: f32[s0, 1, s1, s1] = input
"""

WHOLE = f"""
    {OPERANDS}
    %y = aten.scaled_dot_product_attention(%q, %k, %v, %mask)
    return %y
"""

SPELLED = f"""
    {OPERANDS}
    %kt = aten.transpose(%k, -2, -1)
    %s = aten.matmul(%q, %kt)
    %a = aten.mul(%s, 0.125)
    %b = aten.div(%a, 50.0)
    %c = aten.tanh(%b)
    %d = aten.mul(%c, 50.0)
    %e = aten.add(%d, %mask)
    %p = aten.softmax(%e, -1)
    %y = aten.matmul(%p, %v)
    return %y
"""


def attentions(gm: fx.GraphModule) -> str:
    return "".join(f"{said(a)}\n" for a in chains.find_attentions(gm))


def test_an_attention_in_one_operator():
    gm = graph(WHOLE)
    assert_expected_inline(
        attentions(gm),
        """\
Attention(name=y, product=y, softmax=y, output=y, q=q, k=k, v=v, heads=4, groups=4, width=8, scores=Scores(scale=0.353553, masks=[Mask(node=%mask)]))
""",
    )


def test_an_attention_that_is_spelled_out():
    gm = graph(SPELLED)
    assert_expected_inline(
        attentions(gm),
        """\
Attention(name=p, product=s, softmax=p, output=y, q=q, k=k, v=v, heads=4, groups=4, width=8, scores=Scores(scale=0.125, softcap=50, masks=[Mask(node=%mask)]))
""",
    )
    both = [f"{show(g)}\n{attentions(g)}" for g in (graph(WHOLE), gm)]
    assert untrue(chains, "\n".join(both)) == []
    assert untrue(scores, f"{show(gm)}\n{said(chains.find_attentions(gm)[0].scores)}") == []


def test_repeated_heads_are_found_behind_their_repetition():
    gm = graph("""
        %q: f32[2, 4, 3, 8] = input
        %past: f32[2, 2, 5, 8] = input
        %x: f32[2, 2, 3, 8] = input
        %k = aten.neg(%x)
        %ks = aten.cat([%past, %k], -2)
        %seen = aten.slice(%ks, 2, 1, 8)
        %k5 = aten.unsqueeze(%ks, 2)
        %kw = aten.expand(%k5, [2, 2, 2, 8, 8])
        %k4 = aten.reshape(%kw, [2, 4, 8, 8])
        %k3 = aten.reshape(%k4, [8, 8, 8])
        %y = aten.scaled_dot_product_attention(%q, %k4, %k4)
        return [%y, %k3]
    """)
    nodes = nodes_by_name(gm)
    found = {
        "%k4 repeats": heads.unrepeated(nodes["k4"]),
        "%k3 merges batch and heads of": heads.unmerged(nodes["k3"]),
        "%ks has from this call": heads.brought(nodes["ks"]),
        "%seen has from this call": heads.brought(nodes["seen"]),
    }
    text = "".join(f"{what} {said(node)}\n" for what, node in found.items())
    assert_expected_inline(
        text + attentions(gm),
        """\
%k4 repeats %ks
%k3 merges batch and heads of %k4
%ks has from this call %k
%seen has from this call %k
Attention(name=y, product=y, softmax=y, output=y, q=q, k=ks, v=ks, heads=4, groups=2, width=8, scores=Scores(scale=0.353553))
""",
    )
    assert untrue(heads, f"{show(gm)}\n{text}") == []


def test_attentions_that_stay_in_float_say_why():
    reasons = []
    for old, new in {
        "aten.softmax(%e, -1)": "aten.softmax(%e, 1)",
        "return %y": "return [%y, %p]",
        "aten.add(%d, %mask)": "aten.add(%d, %s)",
        "aten.matmul(%p, %v)": "aten.matmul(%v, %p)",
    }.items():
        text = SPELLED.replace(old, new).replace("%v: f32[s0, 4, s1, 8]", "%v: f32[s0, 4, s1, s1]")
        reasons += [f"{new}: {a.refused}\n" for a in chains.find_attentions(graph(text))]
    assert_expected_inline(
        "".join(reasons),
        """\
aten.softmax(%e, 1): its softmax does not run over the last dim
return [%y, %p]: its weights are read elsewhere, too: is an output of the model
aten.add(%d, %s): its scores are read elsewhere, too: reaches mul, which scales cannot pass
aten.matmul(%v, %p): its weights are not multiplied with values
""",
    )


def test_a_router_is_no_attention():
    gm = graph("%x: f32[s0, 4] = input\n%l = aten.linear(%x, %w)\n%p = aten.softmax(%l, -1)\nreturn %p", {"w": [8, 4]})
    assert chains.find_attentions(gm) == []


def test_scores_that_one_operator_cannot_do_say_why():
    reasons = []
    for step in (
        "%d = aten.add(%c, 1.0)",
        "%d = aten.mul(%c, -50.0)",
        "%d = aten.sigmoid(%c)",
        "%x = aten.mul(%c, 50.0)\n%d = aten.mul(%x, 2.0)",
    ):
        gm = graph(SPELLED.replace("%d = aten.mul(%c, 50.0)", step).replace("    ", ""))
        reasons += [f"{step.splitlines()[-1]}: {a.refused or said(a.scores)}\n" for a in chains.find_attentions(gm)]
    assert_expected_inline(
        "".join(reasons),
        """\
%d = aten.add(%c, 1.0): one of its scores reaches add, which scales cannot pass
%d = aten.mul(%c, -50.0): its scores are capped by a negative number
%d = aten.sigmoid(%c): one of its scores passes sigmoid, which does not commute with a scale
%d = aten.mul(%x, 2.0): its scores are scaled after a soft-cap
""",
    )


def test_masks_that_block_keys():
    gm = graph(
        SPELLED.replace("%mask: f32", "%mask: b1").replace(
            "aten.add(%d, %mask)", "aten.masked_fill(%d, %mask, -65504.0)"
        )
    )
    assert_expected_inline(
        said(chains.find_attentions(gm)[0].scores),
        """Scores(scale=0.125, softcap=50, masks=[Mask(node=%mask, fill=-65504, blocked=True)])""",
    )


ROTATED = """
    %x: f32[s0, s1, 8] = input
    %cos: f32[s1, 4] = input
    %sin: f32[s1, 4] = input
    %lq = aten.linear(%x, %wq)
    %uq = aten.unflatten(%lq, -1, [2, 4])
    %q = aten.transpose(%uq, 1, 2)
    %q1 = aten.slice(%q, -1, 0, 2)
    %q2 = aten.slice(%q, -1, 2, 4)
    %q3 = aten.neg(%q2)
    %half = aten.cat([%q3, %q1], -1)
    %qc = aten.mul(%q, %cos)
    %qs = aten.mul(%half, %sin)
    %qr = aten.add(%qc, %qs)
    %lk = aten.linear(%x, %wk)
    %uk = aten.unflatten(%lk, -1, [1, 4])
    %k = aten.transpose(%uk, 1, 2)
    %lv = aten.linear(%x, %wv)
    %uv = aten.unflatten(%lv, -1, [1, 4])
    %v = aten.transpose(%uv, 1, 2)
    %y = aten.scaled_dot_product_attention(%qr, %k, %v, enable_gqa=True)
    %t = aten.transpose(%y, 1, 2)
    %f = aten.flatten(%t, 2)
    %o = aten.linear(%f, %wo)
    return %o
"""
ROTATED_TENSORS = {"wq": [8, 8], "wk": [4, 8], "wv": [4, 8], "wo": [8, 8]}


def test_channels_that_a_rotation_mixes_share_a_scale():
    gm = graph(ROTATED, ROTATED_TENSORS)
    [site], why = head_sites.match_heads(gm, chains.find_attentions(gm))
    assert why == {}
    lines = [f"{site.classes} classes"]
    lines += [f"{s.name}[c] * s[class of c]: {said(classes)}" for s, classes in site.queries]
    lines += [f"{s.name}[c] / s[class of c]: {said(classes)}" for s, classes in site.keys]
    text = "\n".join(lines) + "\n"
    assert_expected_inline(
        text,
        """\
2 classes
wq[c] * s[class of c]: [0, 1, 0, 1, 0, 1, 0, 1]
wk[c] / s[class of c]: [0, 1, 0, 1]
""",
    )
    assert untrue(head_sites, f"{show(gm)}\n{text}") == []


def test_keys_that_are_values_as_well_are_not_smoothed():
    gm = graph(ROTATED.replace("%k, %v, enable", "%v, %v, enable"), ROTATED_TENSORS)
    found, why = head_sites.match_heads(gm, chains.find_attentions(gm))
    assert found == []
    assert_expected_inline(said(why), """{y: its keys: is a value as well as a query or a key}""")


def test_the_producer_of_each_value_channel():
    gm = graph(ROTATED, ROTATED_TENSORS)
    text = said(value_sites.value_labels(gm, chains.find_attentions(gm)))
    assert_expected_inline(text, """{y: {lv: [[0, 1, 2, 3]]}}""")
    assert untrue(value_sites, f"{show(gm)}\n{text}") == []
