"""``python -m sqcompile.show``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from draw_cases import PostNorm
from families import CAUSAL, OTHERS
from torch import Tensor, nn

from sqcompile.show.__main__ import main
from sqcompile.show.load import load, parse_input


def factory() -> tuple[nn.Module, Tensor]:
    return PostNorm().eval(), torch.randn(4, 16)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["llama", "--layers", "1", "--draw", str(tmp_path / "g.svg")])
    out = capsys.readouterr().out
    assert "8 linears, 8 of them at 5 sites where a parameter absorbs 1/s" in out
    assert "  model.layers.0: input_layernorm -> q_proj, k_proj, v_proj\n" in out
    svg = (tmp_path / "g.svg").read_text(encoding="utf-8")
    assert re.search(
        r'<g class="node linear balance" data-node="\w+"[^>]*><title>[^<]*</title><rect[^>]*/>.*?>q_proj</text>', svg
    )
    main([f"{__name__}:factory", "--stage", "quantized"])
    out = capsys.readouterr().out
    assert "  up: norm joins a residual stream\n" in out and "sqcompile.quantize(" in out
    main([f"{__name__}:PostNorm", "--input", "f32[2, 16]", "--stage", "traced"])
    assert "%gelu: f32[s0, 32] = aten.gelu(%linear)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["no_such_type"], "there is no directory 'no_such_type', and no tiny model of that name"),
        (["no.such.module:factory"], "importable from here"),
        ([f"{__name__}:PostNorm"], "pass --input"),
        ([f"{__name__}:PostNorm", "--input", "16"], "write a dtype and a shape"),
        ([f"{__name__}:factory", "--draw", "graph.pdf"], r"ends in \.svg or \.html"),
    ],
)
def test_command_line_errors(argv: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        main(argv)


@pytest.mark.parametrize("kind", sorted({*(kind for kind, _ in CAUSAL.values()), *OTHERS} - {"t5 gated"}))
def test_every_family_has_a_tiny_model_and_a_call_of_it(kind: str) -> None:
    model, call = load(kind)
    with torch.no_grad():
        out = dict(model(**call))
    assert all(bool(t.isfinite().all()) for t in out.values() if isinstance(t, Tensor))


@pytest.mark.parametrize("kind", ["siglip", "llava", "wav2vec2", "dinov2"])
def test_models_that_read_pictures_or_sound_have_a_call(kind: str) -> None:
    model, call = load(kind)
    with torch.no_grad():
        model(**call)


@pytest.mark.parametrize(
    ("kind", "linears"), [("clip", 26), ("swin", 12), pytest.param("whisper", 32, marks=pytest.mark.slow)]
)
def test_command_line_on_models_that_read_no_tokens_alone(
    kind: str, linears: int, capsys: pytest.CaptureFixture[str]
) -> None:
    main([kind])
    assert capsys.readouterr().out.startswith(f"{linears} linears, ")


def test_inputs_in_the_notation_of_show() -> None:
    name, ids = parse_input("input_ids=i64[2, 16]", rows=5)
    assert (name, ids.shape, ids.dtype) == ("input_ids", (2, 16), torch.int64) and int(ids.max()) < 5
    assert parse_input("bf16[3]")[1].dtype == torch.bfloat16
