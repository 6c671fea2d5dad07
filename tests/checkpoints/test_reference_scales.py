"""The largest inputs and outputs of linears, and an OPT's layer scales: what hooks on the (smoothed) model see."""

from __future__ import annotations

import pytest
import torch
from checkpoint_cases import STATIC, planned
from families import build
from torch import nn

import sqcompile
from sqcompile import (
    ArtifactError,
    CalibrationError,
    PlanError,
    get_linear_absmax,
    get_static_decoder_layer_scales,
)


def hooked(model, calls):
    """What hooks see of a model's nn.Linear, padding left out: {name: {"input": ..., "output": ...}}."""
    seen, real = {}, []

    def hook(module, args, y, name):
        old = seen.get(name, {"input": 0.0, "output": 0.0})
        sides = {"input": args[0], "output": y}
        seen[name] = {k: max(old[k], float(t.flatten(0, -2)[real[-1]].abs().max())) for k, t in sides.items()}

    handles = [
        m.register_forward_hook(lambda m, args, y, n=n: hook(m, args, y, n))
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear)
    ]
    for call in calls:
        real.append(call.get("attention_mask", torch.ones_like(call["input_ids"])).flatten().bool())
        with torch.no_grad():
            model(**call, use_cache=False)
    for h in handles:
        h.remove()
    return seen


def assert_same(found, want, rel=1e-4):
    assert found.keys() == want.keys()
    for name, sides in want.items():
        assert found[name].keys() == {"input", "output"}
        assert found[name] == pytest.approx(sides, rel=rel), name


def padded(call):
    """The call with garbage behind its last tokens, which its mask leaves out, and a second one."""
    ids, mask = call["input_ids"].clone(), torch.ones_like(call["input_ids"])
    mask[0, 7:], mask[1, 9:] = 0, 0
    return [{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids.flip(0, 1), "attention_mask": mask.flip(0)}]


def test_layer_scales_are_those_of_the_smoothed_model(tmp_path):
    from transformers import AutoModelForCausalLM

    model, call, plan = planned("opt")
    calls = padded(call)
    layers, raw = get_static_decoder_layer_scales(model, calls, plan, progress=False)
    sqcompile.export(model, plan, "smoothed", tmp_path / "folded")
    smoothed = AutoModelForCausalLM.from_pretrained(tmp_path / "folded").eval()
    want = hooked(smoothed, calls)
    assert_same(raw, want)
    names = {
        "attn_input_scale": ("self_attn.q_proj", "input"), "q_output_scale": ("self_attn.q_proj", "output"),
        "k_output_scale": ("self_attn.k_proj", "output"), "v_output_scale": ("self_attn.v_proj", "output"),
        "out_input_scale": ("self_attn.out_proj", "input"), "fc1_input_scale": ("fc1", "input"),
        "fc2_input_scale": ("fc2", "input"),
    }  # fmt: skip
    assert len(layers) == 2
    for i, scales in enumerate(layers):
        assert list(scales) == list(names) and all(type(s) is float for s in scales.values())
        for name, (linear, side) in names.items():
            assert scales[name] == pytest.approx(want[f"model.decoder.layers.{i}.{linear}"][side] / 127, rel=1e-4)
    plain = get_linear_absmax(model, calls, progress=False)  # without a plan: another model
    assert_same(plain, hooked(model, calls))
    fc2 = "model.decoder.layers.0.fc2"
    assert plain[fc2]["input"] > 1.2 * raw[fc2]["input"]
    assert plain[fc2]["output"] == pytest.approx(raw[fc2]["output"], rel=1e-4)  # smoothing keeps what a layer gives


def test_a_plan_may_be_a_path_and_padding_counts_without_a_mask(tmp_path):
    model, call, plan = planned("opt", STATIC)
    plan.save(tmp_path / "plan")
    ids = [{"input_ids": c["input_ids"]} for c in padded(call)]
    found = get_linear_absmax(model, ids, tmp_path / "plan", progress=False)
    assert_same(found, get_static_decoder_layer_scales(model, ids, plan, progress=False)[1], rel=1e-5)
    masked = get_linear_absmax(model, padded(call), plan, progress=False)
    assert all(masked[n][side] <= found[n][side] * 1.001 for n in found for side in ("input", "output"))
    q = "model.decoder.layers.0.self_attn.q_proj"
    assert any(masked[n]["output"] < 0.99 * found[n]["output"] for n in found) and masked[q] != found[q]
    with pytest.raises(PlanError, match=r"pass what sqcompile\.calibrate gives"):
        get_linear_absmax(model, ids, 3, progress=False)


def test_experts_count_the_tokens_that_are_routed_to_them():
    model, call = build("mixtral")
    calls = padded(call)
    seen = []
    block = model.model.layers[0].mlp
    handle = block.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    for c in calls:
        with torch.no_grad():
            model(**c, use_cache=False)
    handle.remove()
    x = torch.cat([rows[c["attention_mask"].flatten().bool()] for rows, c in zip(seen, calls, strict=True)])
    with torch.no_grad():
        chosen = (x @ block.gate.weight.T).topk(2).indices
        y = torch.einsum("tk,tenk->ten", x, block.experts.gate_up_proj[chosen])
    found = get_linear_absmax(model, calls, progress=False)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert found[name] == pytest.approx({"input": float(x.abs().max()), "output": float(y.abs().max())}, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        (
            "llama",
            r"are of OPT's decoder layers, with fc1, .*, and model.layers.0 has mlp.down_proj, .*: pass an OPT, or ",
        ),
        ("gpt2", r"and the model has no 'layers': pass an OPT, or take get_linear_absmax"),
        ("whisper", r"and the model has encoder.layers, decoder.layers: pass an OPT"),
    ],
)
def test_layers_of_other_models_are_refused_before_data_is_run(family, message):
    model, call = build(family)
    batches = iter([call, "never asked for"])
    with pytest.raises(ArtifactError, match=message):
        get_static_decoder_layer_scales(model, batches, progress=False)
    assert next(batches) == "never asked for"


def test_two_uses_of_one_linear_give_the_larger_of_both():
    torch.manual_seed(0)
    a, b, x = nn.Linear(8, 8), nn.Linear(8, 4), torch.randn(5, 8)
    model = nn.Sequential(a, nn.Tanh(), a, b).eval()
    with torch.no_grad():
        first = a(x)
        second = a(first.tanh())
        last = b(second)
    found = get_linear_absmax(model, [x], progress=False)
    assert len(found) == 2 and found["3"] == pytest.approx(
        {"input": float(second.abs().max()), "output": float(last.abs().max())}
    )
    twice = next(sides for name, sides in found.items() if name != "3")
    assert float(x.abs().max()) > 1 and twice == pytest.approx(
        {"input": float(x.abs().max()), "output": max(float(first.abs().max()), float(second.abs().max()))}
    )


def test_an_output_that_is_not_finite_is_an_error_that_names_it():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).eval()
    with torch.no_grad():
        model[1].weight.fill_(3e38)
    with pytest.raises(
        CalibrationError, match=r"the output of 1\.weight \(node .*\) is not finite in calibration batch 0"
    ):
        get_linear_absmax(model, [torch.full((2, 8), 9.0)], progress=False)
    assert sqcompile.get_act_scales(model, [torch.full((2, 8), 9.0)], progress=False).keys() == {"0", "1"}
