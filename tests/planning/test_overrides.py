"""Overrides: fields of a recipe for some linears, by patterns of names, whole from the recipe to the INT8 graph."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from backend_cases import compiled, session
from conftest import relative_error, tiny_lm, token_batches
from torch import nn

import sqcompile
from sqcompile import Plan, PlanError, Recipe, RecipeError


def plan_of(model: nn.Module, batches: list, **recipe) -> Plan:
    return sqcompile.calibrate(model, batches, recipe=Recipe(**recipe), progress=False)


def by_name(plan: Plan) -> dict:
    return {l.name.removesuffix(".weight"): l for l in plan.layers}


@pytest.fixture(scope="module")
def llama():
    return tiny_lm("llama"), token_batches()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"*.up": {"alhpa": 0.5}},
            r"overrides\['\*.up'\] has 'alhpa', which is no field of a recipe: activation, alpha",
        ),
        ({"*.up": {"dtype": "fp8"}}, r"\['\*.up'\] has 'dtype', which is the whole model's: pass Recipe\(dtype="),
        ({"*.up": {"attention": "qk"}}, r"\['\*.up'\] has 'attention', which is the whole model's"),
        ({"*.up": {"overrides": {}}}, r"\['\*.up'\] has 'overrides', which is the whole model's"),
        ({"*.up": {"alpha": 2}}, r"overrides\['\*.up'\]: alpha=2: a migration strength"),
        ({"*.up": {"alpha": {0.5: 1}}}, r"overrides\['\*.up'\]: alpha="),
        ({"*.up": {"rotate": 33}}, r"overrides\['\*.up'\]: rotate=33: 'auto', 'none', or the size"),
        ({"*.up": {"rotate": [32]}}, r"overrides\['\*.up'\]: rotate="),
        ({"*.up": {"weight": "per_tnsr"}}, r"overrides\['\*.up'\]: weight='per_tnsr': choose one of"),
        ({"*.up": {"activation": None}}, r"overrides\['\*.up'\]: activation=None"),
        ({"*.up": {"smooth": "no"}}, r"overrides\['\*.up'\]: smooth='no'"),
        ({"*.up": {"min_speedup": -1}}, r"overrides\['\*.up'\]: min_speedup=-1"),
        ({"*.up": {"skip": ("x",)}}, r"overrides\['\*.up'\]: skip=\('x',\): True leaves"),
        ({"*.up": {"lm_head": 1}}, r"overrides\['\*.up'\]: lm_head=1"),
        ({"lm_head": {"lm_head": True, "skip": True}}, r"overrides\['lm_head'\]: lm_head=True quantizes"),
        ({"*.up": {}}, r"overrides\['\*.up'\] overrides nothing"),
        ({"": {"alpha": 0.5}}, r"overrides\[''\]: a pattern is a name"),
        ({3: {"alpha": 0.5}}, r"overrides=.*: its keys are strings"),
        ({"*.up": 0.5}, r"overrides\['\*.up'\]=0.5: pass a dict of dicts"),
        ({"*.up": {3: 0.5}}, r"overrides\['\*.up'\]=.*: its keys are strings"),
        ("*.up", r"overrides='\*.up': pass a dict of dicts"),
        (None, r"overrides=None: pass a dict of dicts"),
        ([["*.up", [["alpha"]]]], r"overrides\['\*.up'\]=.*: pass a dict of dicts"),
        ({"*.up": {"min_speedup": 1.0}}, r"overrides\['\*.up'\]: min_speedup=1.0 with dtype='fp8'"),
    ],
    ids=repr,
)
def test_what_is_wrong_is_said_with_its_pattern_and_field(overrides, message):
    with pytest.raises(RecipeError, match=message):
        Recipe(dtype="fp8" if "fp8" in message.partition("with")[2] else "int8", overrides=overrides)


def test_one_form_of_equal_overrides():
    spelled = Recipe(overrides={"*.up": {"rotate": 32, "alpha": [0, 1]}, "b": {"skip": True}})
    pairs = Recipe(overrides=[["*.up", [["alpha", (0.0, 1.0)], ["rotate", 32]]], ["b", [("skip", True)]]])
    assert spelled == pairs and hash(spelled) == hash(pairs)
    assert spelled.by_pattern == (("*.up", (("alpha", (0.0, 1.0)), ("rotate", 32))), ("b", (("skip", True),)))
    assert dataclasses.replace(spelled, alpha=0.3).by_pattern == spelled.by_pattern
    assert Recipe(overrides={}) == Recipe()
    assert Recipe(overrides={"a": {"alpha": 0.1}, "b": {"alpha": 0.2}}) != Recipe(
        overrides={"b": {"alpha": 0.2}, "a": {"alpha": 0.1}}
    )


def test_every_field_reaches_the_linears_that_a_pattern_names_and_no_others(llama):
    model, batches = llama
    overrides = {
        "*.mlp.*": {"skip": True},
        "*.mlp.down_proj": {"skip": False, "alpha": 0.8, "rotate": 16, "weight": "per_tensor"},
        "model.layers.0.mlp.down_proj": {"activation": "per_tensor_static"},
        "o_proj": {"smooth": False, "activation": "per_tensor"},
        "lm_head": {"lm_head": True},
    }
    plan = plan_of(model, batches, overrides=overrides)
    layers = by_name(plan)
    for n in (0, 1):
        for name in ("gate_proj", "up_proj"):
            assert layers[f"model.layers.{n}.mlp.{name}"].reason == "skipped by the recipe ('*.mlp.*')"
        down = layers[f"model.layers.{n}.mlp.down_proj"]
        assert (down.quantized, down.rotation, down.weight) == (True, 16, "per_tensor")
        assert down.alpha in (0.8, None)
        static = "per_tensor_static" if n == 0 else None
        assert down.activation == static and (down.input_scale is not None) == (n == 0)
        said = "; overridden: " + ("activation='per_tensor_static', " if n == 0 else "")
        assert down.reason.endswith(f"{said}alpha=0.8, rotate=16, skip=False, weight='per_tensor'")
        o = layers[f"model.layers.{n}.self_attn.o_proj"]
        assert (o.quantized, o.smoothing, o.activation, o.rotation) == (True, "none", "per_tensor", None)
        assert "the recipe does not smooth" in o.reason
        q = layers[f"model.layers.{n}.self_attn.q_proj"]
        assert (q.alpha, q.rotation, q.activation, q.weight) == (0.5, None, None, None)
        assert "overridden" not in q.reason
    assert layers["lm_head"].quantized
    plain = by_name(plan_of(model, batches, smooth=True))
    assert layers["model.layers.0.self_attn.q_proj"] == plain["model.layers.0.self_attn.q_proj"]


def test_a_site_s_alpha_is_the_overridden_one(llama):
    pattern = "model.layers.1.self_attn.[qkv]_proj"
    layers = by_name(plan_of(*llama, overrides={pattern: {"alpha": 0.25}}))
    assert {layers[f"model.layers.1.self_attn.{x}_proj"].alpha for x in "qkv"} == {0.25}
    assert layers["model.layers.0.self_attn.q_proj"].alpha == 0.5


def test_graphs_are_right_and_a_saved_plan_gives_the_same(llama, tmp_path):
    model, batches = llama
    overrides = {
        "*.down_proj": {"rotate": 16, "weight": "per_tensor"},
        "model.layers.0.mlp.up_proj": {
            "weight": "per_tensor"
        },  # merged with gate_proj, whose rows have scales of their own
        "*.o_proj": {"activation": "per_tensor"},
        "model.layers.1.*": {"activation": "per_tensor_static"},
    }
    net = sqcompile.compile(model, batches, recipe=Recipe(overrides=overrides), backend="eager", progress=False)
    want, got = (net.stages[s](**batches[0]).logits for s in ("traced", "folded"))
    assert relative_error(got, want) < 1e-5
    quantized = net.stages["quantized"](**batches[0]).logits
    assert relative_error(net(**batches[0]).logits, quantized) < 1e-5
    assert 1e-4 < relative_error(quantized, want) < 0.2
    state = net.stages["quantized"].state_dict()
    assert state["model.layers.0.mlp.up_proj.weight_scale"].shape == (1,)
    assert state["model.layers.0.mlp.gate_proj.weight_scale"].shape[0] > 1
    targets = [str(n.target) for n in net.stages["quantized"].graph.nodes]
    assert targets.count("sqcompile.tensor_scale.default") == 1  # o_proj of layer 0; the later pattern wins in layer 1
    net.plan.save(tmp_path / "p")
    loaded = Plan.load(tmp_path / "p")
    assert loaded == net.plan and loaded.recipe == Recipe(overrides=overrides)
    again = sqcompile.compile(model, plan=loaded, backend="eager", progress=False)
    assert torch.equal(again(**batches[0]).logits, net(**batches[0]).logits)
    assert "weight='per_tensor'" in str(net.report)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"*.q_proj": {"alpha": 0.8}}, r"q_proj.weight and .*k_proj.weight are smoothed,.* first alpha=0.8, the second alpha=0.5"),
        ({"*.up_proj": {"rotate": 16}}, r"gate_proj.weight and .*up_proj.weight are .* first rotate='none', the second rotate=16"),
        ({"*.k_proj": {"smooth": False}}, r"q_proj.weight and .*k_proj.weight are smoothed,.* first smooth=True"),
        ({"*.v_proj": {"activation": "per_tensor"}}, r"q_proj.weight and .*v_proj.weight read one input, .*'per_token'.*'per_tensor'"),
        ({"*.dwon_proj": {"alpha": 0.8}}, r"overrides\['\*.dwon_proj'\] names no linear of this model; its linears are"),
    ],
    ids=["alpha", "rotate", "smooth", "activation", "no linear"],
)  # fmt: skip
def test_linears_that_share_an_input_must_agree_and_patterns_must_name_one(llama, overrides, message):
    with pytest.raises(RecipeError, match=message):
        plan_of(*llama, overrides=overrides)


def test_linears_that_stay_in_float_need_not_agree(llama):
    layers = by_name(plan_of(*llama, overrides={"*.q_proj": {"alpha": 0.8, "skip": True}}))
    assert not layers["model.layers.0.self_attn.q_proj"].quantized
    assert layers["model.layers.0.self_attn.k_proj"].alpha == 0.5


def test_tied_weights_are_named_by_each_of_their_names():
    torch.manual_seed(0)
    a, b = nn.Linear(16, 16), nn.Linear(16, 16)
    b.weight = a.weight
    model = nn.Sequential(a, nn.Tanh(), b).eval()
    layers = plan_of(model, [torch.randn(8, 16)], overrides={"2": {"weight": "per_tensor"}}).layers
    assert [l.weight for l in layers] == ["per_tensor", "per_tensor"]


def test_attentions_are_left_in_float_by_name():
    overrides = {"model.layers.0.self_attn": {"skip": True}}
    plan = plan_of(tiny_lm("llama"), token_batches(), attention="qk", overrides=overrides)
    assert [a.quantized for a in plan.attention] == ["none", "qk"]
    assert "skipped by the recipe ('model.layers.0.self_attn')" in plan.attention[0].reason


def test_a_plan_that_contradicts_its_recipe_is_refused(llama):
    plan = plan_of(*llama)
    for change in ({"weight": "per_tensor"}, {"activation": "per_block"}, {"weight": 3}):
        layers = tuple(dataclasses.replace(l, **change) if l.quantized else l for l in plan.layers)
        with pytest.raises(PlanError, match=next(iter(change))):
            sqcompile.compile(llama[0], plan=dataclasses.replace(plan, layers=layers), backend="eager", progress=False)


@pytest.mark.parametrize("broken", [False, True])
def test_the_backend_overrides_alike(broken):
    """A pattern may name a linear of another graph than the first."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

        def forward(self, x):
            h = torch.tanh(self.up(x))
            if broken:
                torch._dynamo.graph_break()
            return self.down(h)

    torch.manual_seed(0)
    model, batches = Two().eval(), [torch.randn(4, 6, 32) for _ in range(3)]
    recipe = Recipe(overrides={"up": {"weight": "per_tensor"}, "down": {"rotate": 16, "activation": "per_tensor"}})
    torch._dynamo.reset()
    net = compiled(model, recipe=recipe, calibration_steps=2)
    with torch.no_grad():
        got = [net(x) for x in batches][-1]
        net(batches[0])
        assert 1e-4 < relative_error(net(batches[-1]), model(batches[-1])) < 0.05
    assert got.shape == (4, 6, 32)
    plan = session(model).plan
    assert plan.recipe == recipe
    layers = {l.name: (l.weight, l.activation, l.rotation) for l in plan.layers}
    assert layers == {"up.weight": ("per_tensor", None, None), "down.weight": (None, "per_tensor", 16)}
    torch._dynamo.reset()
    with pytest.raises(RecipeError, match=r"overrides\['dwon'\] names no linear"), torch.no_grad():
        wrong = compiled(model, recipe=Recipe(overrides={"dwon": {"rotate": 16}}), calibration_steps=1)
        wrong(batches[0]), wrong(batches[1])
