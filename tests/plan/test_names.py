"""Names a person would write: sites, refusals, ranges of blocks."""

from __future__ import annotations

import pytest

from sqcompile.plan.names import collapse, refusal_lines, site_labels


def test_site_labels_are_what_a_person_would_write() -> None:
    layer = "model.layers.{}."
    keys, linears = [], []
    for i in range(32):
        names = [layer.format(i) + f"self_attn.{n}_proj.weight" for n in "qkvo"]
        linears += names
        keys += [layer.format(i) + "input_layernorm.weight -> " + ", ".join(names[:3]), f"{names[2]} -> {names[3]}"]
    labels = site_labels(keys, linears)
    assert [l.key for l in labels] == keys
    assert str(labels[0]) == "model.layers.0: input_layernorm -> q_proj, k_proj, v_proj"
    assert (labels[0].block, labels[0].producer, labels[0].balance[0]) == (
        "model.layers.0",
        "input_layernorm",
        "q_proj",
    )
    assert collapse(map(str, labels)) == [
        "model.layers.{0..31}: input_layernorm -> q_proj, k_proj, v_proj",
        "model.layers.{0..31}: v_proj -> o_proj",
    ]


@pytest.mark.parametrize(
    ("key", "linears", "label"),
    [
        ("rms_norm_3 -> a.q_proj.weight, a.k_proj.weight", [], "rmsnorm -> q_proj, k_proj"),
        ("layer_norm -> fc.weight", [], "layernorm -> fc"),
        ("norm.g -> fc.weight", [], "norm.g -> fc"),
        ("input -> h.0.mlp.fc2.weight", [], "h.0: fc2 input × 1/s"),
        ("net.0.weight -> net.2.weight", [], "net.0 -> net.2"),
        ("fc.weight -> fc2.weight#2", [], "fc -> fc2#2"),
        ("b.0.up.dense.weight -> b.0.down.dense.weight", ["b.1.up.dense.weight"], "b.0: up.dense -> down.dense"),
        ("enc.3.norm.weight -> head.weight", [], "enc.3.norm -> head"),
        ("norm.weight -> d.0.k.weight, d.1.k.weight", [], "norm -> d.{0..1}.k"),
    ],
)
def test_short_names_are_unique_in_their_block(key: str, linears: list[str], label: str) -> None:
    own = [n for n in key.replace(" -> ", ", ").split(", ") if n.split("#")[0].endswith("weight")]
    assert str(site_labels([key], own + linears)[0]) == label


def test_lines_collapse_over_indices_alone() -> None:
    assert collapse(["a.0: x", "a.1: x", "a.2: y", "a.5: x"]) == ["a.{0..1, 5}: x", "a.2: y"]
    assert collapse([f"l.{i}.e.{j}: up -> down" for i in range(2) for j in range(3)]) == [
        "l.{0..1}.e.{0..2}: up -> down"
    ]
    assert collapse([f"l.{i + 1}: q: l.{i}.norm joins" for i in range(3)]) == ["l.{1..3}: q: l.{0..2}.norm joins"]
    assert collapse(["fc1 -> x", "fc2 -> x"]) == ["fc1 -> x", "fc2 -> x"]
    assert refusal_lines([(f"h.{i}.fc2.weight", f"h.{i}.fc1.weight passes gelu") for i in range(2)], []) == [
        "h.{0..1}: fc2: fc1 passes gelu"
    ]


def test_ranges_are_not_merged_again() -> None:
    lines = [f"layers.0.experts.{j}: r" for j in (0, 2, 9)] + [f"layers.1.experts.{j}: r" for j in (0, 3, 9)]
    assert collapse(lines) == ["layers.0.experts.{0, 2, 9}: r", "layers.1.experts.{0, 3, 9}: r"]
