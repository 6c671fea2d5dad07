"""What Inductor freezes: graphs with something to fold or pack. The code of others is taken from its cache for other weights."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch._inductor.graph import GraphLowering

import sqcompile
from sqcompile import kernels
from sqcompile.compiled import inductor
from sqcompile.compiled.inductor import freezes

DATA = [torch.randn(64, 32, generator=torch.Generator().manual_seed(0))]


class Net(nn.Module):
    """``constant``: whether something is computed of parameters alone."""

    def __init__(self, seed: int = 0, constant: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.norm, self.up, self.down = nn.LayerNorm(32), nn.Linear(32, 64), nn.Linear(64, 32)
        self.table, self.constant = nn.Parameter(torch.randn(4, 8)), constant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(self.norm(x))))
        return torch.maximum(y, (self.table.softmax(-1) if self.constant else self.table).reshape(32))


def lowered(model: nn.Module, **recipe: object) -> torch.fx.GraphModule:
    made = sqcompile.compile(
        model.eval(), DATA, recipe=sqcompile.Recipe(0.5, **recipe), backend="eager", progress=False
    )
    return made.stages["lowered"]


def test_only_what_can_be_folded_or_packed_is_frozen():
    assert freezes(lowered(Net(), skip=("down",)))  # a float weight to be packed
    assert not freezes(lowered(Net(constant=True)))  # which `lower` has computed
    graph = torch.fx.Graph()
    x, table = graph.placeholder("x"), graph.get_attr("table")
    graph.output(
        graph.call_function(torch.ops.aten.add.Tensor, (x, graph.call_function(torch.ops.aten.sin.default, (table,))))
    )
    assert freezes(torch.fx.GraphModule({"table": torch.randn(4)}, graph))
    plain = lowered(nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32)))
    assert not freezes(plain)


def test_other_weights_are_not_those_of_the_cached_code(tmp_path, monkeypatch):
    def made(seed: int) -> tuple[nn.Module, sqcompile.CompiledModel]:
        torch.manual_seed(seed)
        layers = [m for _ in range(3) for m in (nn.LayerNorm(48), nn.Linear(48, 48))]
        model = nn.Sequential(*layers).eval()
        return model, sqcompile.compile(model, [torch.randn(64, 48)], progress=False)

    made(0)
    counters.clear()
    model, compiled = made(1)
    assert counters["inductor"]["fxgraph_cache_hit"] == 1
    x = torch.randn(16, 48)
    want, found = model(x), compiled(x)
    assert (found - want).norm() < 0.05 * want.norm()
    assert torch.allclose(found, compiled.stages["lowered"](x), atol=1e-5)

    monkeypatch.setattr(inductor, "_kernels", lambda: f"operators of {tmp_path}")
    counters.clear()
    made(1)
    assert counters["inductor"]["fxgraph_cache_hit"] == 0


@pytest.mark.parametrize("regional", [False, True])
@pytest.mark.parametrize("guard", [sympy.Eq, lambda s, size: sympy.Lt(s, size + 100)], ids=["fixed", "narrowed"])
def test_code_for_fixed_sizes_is_refused_again_and_not_taken_from_the_cache(monkeypatch, tmp_path, guard, regional):
    run = GraphLowering.run

    def guarding(self, *args):
        env = self._shape_env
        sizes = getattr(env, "backed_var_to_val", None) or env.var_to_val
        for s in [s for s in env.var_to_range if s in sizes]:
            env.evaluate_expr(guard(s, int(sizes[s])))
        return run(self, *args)

    monkeypatch.setattr(GraphLowering, "run", guarding)
    monkeypatch.setattr(inductor, "_kernels", lambda: f"of {tmp_path}")  # nothing is in the cache yet
    for seed in (0, 1):
        with pytest.raises(sqcompile.StageError, match="Inductor fixed sizes"):
            sqcompile.compile(Net(seed).eval(), DATA, regional=regional, progress=False)
    monkeypatch.setattr(GraphLowering, "run", run)
    model = Net(2).eval()
    compiled, x = sqcompile.compile(model, DATA, regional=regional, progress=False), torch.randn(900, 32)
    assert (compiled(x) - model(x)).norm() < 0.05 * model(x).norm()


def test_the_digest_of_the_operators_is_of_their_sources(tmp_path, monkeypatch):
    before = inductor._kernels.__wrapped__()
    assert before == inductor._kernels.__wrapped__()
    (tmp_path / "new.py").write_text("# another kernel")
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "__init__.py"))
    assert inductor._kernels.__wrapped__() != before


@pytest.mark.parametrize("regional", [False, True])
def test_the_users_own_tag_of_the_cache_stays(regional):
    with torch.compiler.config.patch(cache_key_tag="the user's"):
        sqcompile.compile(Net().eval(), DATA, regional=regional, progress=False)
        assert torch.compiler.config.cache_key_tag == "the user's"
