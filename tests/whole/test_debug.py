"""bisect names the wrong fold, and nothing else; what it takes, and what it says."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import warnings

import pytest
import torch
from conftest import ALL_INT8, tiny_lm, token_batches
from debug_cases import TOKENS, Attending, Net, X, bisect, passes, wrong
from hand_written import Pairs, Spelled
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import sqcompile
from sqcompile import CalibrationError, CaptureError, PlanError, Recipe, RecipeError
from sqcompile.debug import Bisection, NodeError, SiteError, folds
from sqcompile.passes.attention.head_sites import _HeadLabels
from sqcompile.passes.ir.graph import aten
from sqcompile.passes.labels import rules
from sqcompile.passes.rewrite.fold import _Folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_right_model_is_right(dtype):
    found = bisect(tiny_lm("llama", dtype), token_batches(1)[0], recipe="O1")
    assert found.right and found.first_wrong_fold is None and found.first_wrong_node is None and not wrong(found)
    assert found.dtype == torch.float64  # so that half precision hides nothing
    assert 0 < found.together.error < 1e-13 and all(0 < s.error < 1e-13 for s in found.folds)
    layer = [
        "input_layernorm -> q_proj, k_proj, v_proj", "q_proj × s, k_proj × 1/s", "v_proj -> o_proj",
        "post_attention_layernorm -> gate_proj, up_proj", "up_proj -> down_proj",
    ]  # fmt: skip
    assert [s.label.rpartition(": ")[2] for s in found.folds] == [*layer, *layer, "norm -> lm_head"]
    assert found.folds[1].label.startswith("model.layers.0.self_attn: ")
    assert [s.drawn for s in found.folds if "lm_head" in s.label] == [True]  # in float by the plan, and may be folded
    linears = ["q_proj", "k_proj", "v_proj", "self_attn", "o_proj", "gate_proj", "up_proj", "down_proj"]
    assert [n.label.split()[-1].split(".")[-1] for n in found.lowering] == 2 * linears
    # rows of C++ keep in float32 what the quantized stage rounds to bfloat16: some of their integers are the next ones
    most = dict.fromkeys(("linear_norm_quantize", "linear_act_quantize"), 1e-2) if dtype == torch.bfloat16 else {}
    assert all(n.error <= most.get(n.operator, 1e-6 if dtype == torch.float32 else 4e-3) for n in found.lowering)


@pytest.mark.slow
def test_the_shipped_lm_is_right(lm, lm_windows):
    found = bisect(lm[0], {"input_ids": lm_windows[0][:1, :64]}, recipe=ALL_INT8)
    assert found.right and len(found.folds) == 6 * 4 + 1 and len(found.lowering) == 6 * 7


@pytest.mark.parametrize(
    ("target", "act"),
    [
        (aten.gelu.default, F.gelu),
        (aten.silu.default, F.silu),
        (aten.add.Tensor, lambda x: x + 0.3),
        (aten.softmax.int, lambda x: x.softmax(-1)),
    ],
    ids=["gelu", "silu", "shift", "softmax"],
)
def test_a_wrong_rule_is_named_by_its_site(monkeypatch, target, act):
    rule = rules.RULES.get(target)
    model = Net(F.relu, act, F.relu)
    assert bisect(model).right
    shifts = target == aten.add.Tensor  # residual connections keep their own rule
    monkeypatch.setitem(
        rules.RULES,
        target,
        lambda ctx, n, *rest: (rule if shifts and isinstance(n.args[1], torch.fx.Node) else passes)(ctx, n, *rest),
    )
    found = bisect(model)
    assert wrong(found) == ["layers.1: a -> b"] and not found.right
    first = found.first_wrong_fold
    assert first.name == "layers.1.a.weight -> layers.1.b.weight" and first.error > 1e-3
    assert f"first wrong fold: {first.label}" in str(found) and "<- wrong, worst" in str(found)
    assert found.first_wrong_node is None and not found.wrong_together and found.together.wrong


def test_of_two_wrong_sites_the_first_in_graph_order_is_named(monkeypatch):
    monkeypatch.setitem(rules.RULES, aten.gelu.default, passes)
    monkeypatch.setitem(rules.RULES, aten.silu.default, passes)
    found = bisect(Net(F.relu, F.silu, F.relu, F.gelu))
    assert wrong(found) == ["layers.1: a -> b", "layers.3: a -> b"]
    assert found.first_wrong_fold.label == "layers.1: a -> b"


def test_a_wrong_rule_of_attentions_is_named_by_the_attention(monkeypatch):
    """A rotary embedding mixes two channels of a head, which must share a scale."""
    monkeypatch.setattr(_HeadLabels, "_unite", lambda self, flow, a, b: a)
    found = bisect(Attending(Spelled("whole"), Pairs(False), Pairs(False)), TOKENS, recipe="O1")
    assert wrong(found) == [f"layers.{i}: q × s, k × 1/s" for i in (1, 2)]
    assert found.first_wrong_fold.name == "layers.1"


@pytest.mark.parametrize("plan_smooths", [True, False])
def test_an_attention_is_folded_whether_or_not_the_plan_smooths_it(monkeypatch, plan_smooths):
    model = Attending(Spelled("whole"), Spelled("matmul"))
    plan = sqcompile.calibrate(model, [TOKENS], recipe=Recipe(attention="qk"), progress=False)
    if not plan_smooths:
        attention = tuple(dataclasses.replace(a, smoothing="none") for a in plan.attention)
        plan = dataclasses.replace(plan, attention=attention, heads={})
    found = bisect(model, TOKENS, plan=plan)
    drawn = [s.drawn for s in found.folds if "q × s, k × 1/s" in s.label]
    assert drawn == [not plan_smooths] * 2 and found.right


def test_scales_that_the_plan_multiplies_are_folded_too():
    torch.manual_seed(0)
    model = Net(F.gelu)
    with torch.no_grad():
        model.layers[0].a.weight[3] *= 40
        model.layers[0].b.weight[:, 3] /= 40
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "static scales from")
        found = bisect(model, recipe="O3")
    assert [s.label for s in found.folds] == ["layers.0: norm -> a", "layers.0: b input × 1/s"]
    assert found.right and not found.folds[1].drawn


def test_sites_that_are_wrong_together_alone(monkeypatch):
    right = folds.fold

    def fold(gm, sites, plan, heads):
        """Two sites that do not know of each other: with both, the second is folded by other scales."""
        names = [s.name for s in sites]
        first, second = (f"layers.{i}.a.weight -> layers.{i}.b.weight" for i in (1, 3))
        folded = right(gm, sites, plan, heads)
        if first in names and second in names:
            folded.graph.find_nodes(op="call_function", target=aten.relu.default)[3].target = aten.silu.default
            folded.recompile()
        return folded

    monkeypatch.setattr(folds, "fold", fold)
    found = bisect(Net(*[F.relu] * 5))
    assert not wrong(found) and found.first_wrong_fold is None and found.together.wrong and not found.right
    assert [s.label for s in found.wrong_together] == ["layers.1: a -> b", "layers.3: a -> b"]
    assert "right alone, wrong together: layers.1: a -> b; layers.3: a -> b" in str(found)


@given(st.integers(1, 40).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1), min_size=1))))
def test_the_smallest_wrong_set_is_found(case):
    count, guilty = case
    asked = []

    def all_there(which):
        assert which == sorted(set(which))
        asked.append(which)
        return guilty <= set(which)

    assert folds.smallest_wrong(count, all_there) == sorted(guilty)
    assert len(asked) <= len(guilty) * (count.bit_length() + 1)


def test_a_fold_that_fails_is_a_wrong_one(monkeypatch):
    norm = _Folder._norm

    def fails(self, node, s, name):
        if node.name == "layer_norm_1":
            raise IndexError("no such channel")
        norm(self, node, s, name)

    monkeypatch.setattr(_Folder, "_norm", fails)
    plan = sqcompile.calibrate(Net(F.relu, F.relu), [X], recipe=Recipe(smooth=False), progress=False)
    found = bisect(Net(F.relu, F.relu), plan=plan)
    assert wrong(found) == ["layers.1: norm -> a"] and found.first_wrong_fold.failure == "IndexError: no such channel"
    assert found.lowering == () and "not compared" in str(found) and "no such channel" in str(found)


@torch.library.custom_op("sqcompile_test_debug::at_most", mutates_args=())
def at_most(x: torch.Tensor, size: int) -> torch.Tensor:
    if x.element_size() > size:
        raise TypeError(f"no {x.dtype} here")
    return x.clone()


at_most.register_fake(lambda x, size: torch.empty_like(x))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "size", "used"),
    [
        (torch.float32, 4, torch.float32),
        (torch.bfloat16, 4, torch.float32),
        (torch.bfloat16, 2, torch.bfloat16),
        (torch.float16, 2, torch.float16),
    ],
)
def test_without_float64_graphs_are_compared_in_the_widest_dtype_there_is(monkeypatch, own, size, used):
    model, x = Net(F.relu, F.gelu, lambda x: at_most(x, size)).to(own), X.to(own)
    with torch.no_grad():
        model.layers[1].b.weight *= 8  # a wrong layer of little weight is hidden by bfloat16's rounding
    found = bisect(model, x, recipe=Recipe(smooth=False))
    assert found.right and found.dtype == used and found.together.error > 1e-9
    monkeypatch.setitem(rules.RULES, aten.gelu.default, passes)
    assert wrong(bisect(model, x, recipe=Recipe(smooth=False))) == ["layers.1: a -> b"]


def test_inputs_that_the_model_refuses_are_told():
    class Table(Net):
        def __init__(self):
            super().__init__(F.relu)
            self.table = nn.Embedding(5, 16)

        def forward(self, ids):
            return super().forward(self.table(ids))

    plan = sqcompile.calibrate(Table(), [torch.tensor([[0, 4, 2]])], progress=False)
    with pytest.raises(CaptureError, match="does not run on these inputs: IndexError"):
        bisect(Table(), torch.tensor([[0, 5, 2]]), plan=plan)


def test_a_model_that_draws_random_numbers():
    found = bisect(Net(F.relu, lambda x: x * torch.rand_like(x)))
    assert found.right and len(found.folds) >= 3


def test_a_plan_is_examined_as_it_is(tmp_path):
    model = Net(F.relu)
    plan = sqcompile.calibrate(model, [X], recipe=Recipe(alpha=0.7), progress=False)
    plan.save(tmp_path / "plan")
    found = bisect(model, (X,), plan=tmp_path / "plan")
    assert found.right and found == bisect(model, {"x": X}, plan=plan)
    scales = {name: torch.full_like(s, 1e-30) for name, s in plan.scales.items()}
    assert bisect(model, plan=dataclasses.replace(plan, scales=scales)).right  # exact, for numbers of any size


@pytest.mark.parametrize(
    ("error", "match", "change"),
    [
        (CaptureError, "the class Net", {"model": Net}),
        (CalibrationError, "a list of batches", {"inputs": [{"x": X}, {"x": X}]}),
        (CalibrationError, "inputs is a generator: pass one batch", {"inputs": (x for x in [X])}),
        (CalibrationError, "inputs is a NoneType", {"inputs": None}),
        (CalibrationError, "does not fit Net.forward", {"inputs": {"y": X}}),
        (CalibrationError, "holds no tensor", {"inputs": (1.0,)}),
        (RecipeError, "unknown recipe 'O7'", {"recipe": "O7"}),
        (PlanError, "pass what sqcompile.calibrate gives", {"plan": 3}),
    ],
)
def test_bad_arguments_are_one_clear_error(error, match, change):
    given = {"model": Net(F.relu), "inputs": X, **change}
    with pytest.raises(error, match=match):
        sqcompile.debug.bisect(given.pop("model"), given.pop("inputs"), progress=False, **given)


def test_a_plan_of_another_model_or_recipe_is_refused():
    plan = sqcompile.calibrate(Net(F.relu, F.relu), [X], progress=False)
    with pytest.raises(PlanError, match=r"the plan smooths 'layers\.1"):
        bisect(Net(F.relu), plan=plan)
    with pytest.raises(PlanError, match=r"no linear 'layers\.2\.a\.weight'"):
        bisect(Net(F.relu, F.relu, F.relu), plan=plan)
    with pytest.raises(PlanError, match="disagree"):
        bisect(Net(F.relu, F.relu), plan=plan, recipe="O3")


def test_a_model_that_returns_no_number_cannot_be_compared():
    class Ids(Net):
        def forward(self, x):
            return super().forward(x) * torch.nan

    plan = sqcompile.calibrate(Net(F.relu), [X], progress=False)
    with pytest.raises(CaptureError, match="no finite number"):
        bisect(Ids(F.relu), plan=plan)


def test_the_text_marks_what_is_wrong_and_what_is_worst(capsys):
    sites = (
        SiteError("n -> a", "layers.0: n -> a", 2e-16, 1e-9),
        SiteError("a -> b", "layers.0: a -> b", 0.25, 1e-9, drawn=True),
        SiteError("att", "layers.0.attn: q × s, k × 1/s", 0.5, 1e-9),
    )
    nodes = (
        NodeError("a.weight", "layers.0: a", "int8_gemm", 1e-7, 1e-5),
        NodeError("b.weight", "layers.0: b", "int8_gemm", 2e-4, 1e-5),
    )
    found = Bisection(sites, SiteError("all", "all 3 sites", 0.6, 1e-9), (), nodes, torch.float64)
    assert str(found).splitlines() == [
        "folds: relative error of the outputs with one site folded, in float64",
        "  layers.0: n -> a               2.0e-16",
        "  layers.0: a -> b               2.5e-01  drawn scales  <- wrong",
        "  layers.0.attn: q × s, k × 1/s  5.0e-01  <- wrong, worst",
        "  all 3 sites                    6.0e-01  <- wrong",
        "first wrong fold: layers.0: a -> b (rounding may cost 1.0e-09)",
        "",
        "lowering: relative error of each INT8 result, computed from the quantized stage's values",
        "  layers.0: a  1.0e-07  int8_gemm",
        "  layers.0: b  2.0e-04  int8_gemm  <- wrong, worst",
        "first wrong node: layers.0: b (rounding may cost 1.0e-05)",
    ]
    assert repr(found) == "Bisection(first_wrong_fold='a -> b', first_wrong_node='b.weight')"
    printed = sqcompile.debug.bisect(Net(F.relu), X)
    assert str(printed) in capsys.readouterr().out


def test_importing_sqcompile_does_not_import_debug():
    code = "import sqcompile, sys; assert 'sqcompile.debug' not in sys.modules; sqcompile.debug.bisect"
    subprocess.run([sys.executable, "-c", code], check=True)
