"""An index out of its table's range is an IndexError in words, wherever compiled code would end the process."""

from __future__ import annotations

import pytest
import torch
from golden_cases import graph
from torch import nn
from torch.nn import functional as F

import sqcompile
from sqcompile.kernels.ops import sqcompile_ops
from sqcompile.passes.lowering.id_ranges import _reads


class Table(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.embed, self.places, self.fc, self.read = nn.Embedding(10, 16), nn.Embedding(9, 16), nn.Linear(16, 16), read

    def forward(self, ids, mask=None):
        return self.fc(self.read(self, ids, mask))


def counted(m, ids, mask):
    """Positions as OPT and RoBERTa count them."""
    return m.embed(ids) + m.places((mask.cumsum(1) * mask - 1) + 2)


# how a table is read, the range, what the message names
READS = {
    "embedding": (lambda m, ids, mask: m.embed(ids), (0, 9), "ids indexes embed.weight"),
    "a shifted embedding": (lambda m, ids, mask: m.embed(ids + 1), (-1, 8), "computed from ids indexes embed.weight"),
    "a slice": (lambda m, ids, mask: m.embed(ids[:, :2]), (0, 9), "computed from ids"),
    "fancy indexing": (lambda m, ids, mask: m.embed.weight[ids], (-10, 9), "ids indexes embed.weight, which takes -10 to 9"),
    "rows picked": (lambda m, ids, mask: m.embed.weight.index_select(0, ids.flatten()), (0, 9), "ids"),
    "one-hot": (lambda m, ids, mask: F.one_hot(ids, 10).float() @ m.embed.weight, (0, 9), "ids indexes one_hot"),
    "data": (lambda m, ids, mask: (m.embed.weight * mask.sum()).gather(0, ids.flatten()[:, None].expand(-1, 16)), (0, 9), "ids"),
}  # fmt: skip


def compiled(model, call, backend):
    return sqcompile.compile(model, [call], backend=backend, progress=False)


@pytest.mark.parametrize("name", READS)
def test_ids_out_of_range(name):
    read, (low, high), match = READS[name]
    model, mask = Table(read).eval(), torch.ones(2, 4, dtype=torch.long)
    net = compiled(model, {"ids": torch.randint(0, 9, (2, 4)), "mask": mask}, "eager")
    for good in (low, high):
        ids = torch.full((3, 5), 1).index_fill(1, torch.tensor([1]), good)
        assert net(ids, mask=torch.ones_like(ids)).isfinite().all()
    for bad in (low - 1, high + 1):
        ids = torch.full((3, 5), 1).index_fill(1, torch.tensor([1]), bad)
        with pytest.raises((IndexError, RuntimeError)):
            model(ids, mask=torch.ones_like(ids))
        with pytest.raises(sqcompile.IndexRangeError, match=match) as info:
            net(ids, mask=torch.ones_like(ids))
        assert isinstance(info.value, IndexError) and isinstance(info.value, sqcompile.SQCompileError)
    if name == "a slice":  # what is not read may be anything
        assert net(torch.tensor([[1, 2, -100]]), mask=mask[:1, :3]).isfinite().all()


class Picks(nn.Module):
    """Reads what it has computed, of dynamic sizes, with indices that an input gives."""

    def __init__(self, read):
        super().__init__()
        self.fc1, self.fc2, self.read = nn.Linear(16, 16), nn.Linear(16, 16), read

    def forward(self, x, ids):
        return self.fc2(self.read(self.fc1(x), ids))


# how it is read; the last index that may be, of x [B, S, 16]; whether it may count from the end
PICKS = {
    "one token of each row": (lambda h, ids: h[torch.arange(h.shape[0]), ids], 1, True),
    "gather": (lambda h, ids: h.gather(1, ids[:, None, None].expand(-1, 1, 16)), 1, False),
    "gather, dim from the end": (lambda h, ids: h.gather(-2, ids[:, None, None].expand(-1, 1, 16)), 1, False),
    "index_select": (lambda h, ids: h.index_select(1, ids), 1, False),
    "index_select, dim from the end": (lambda h, ids: h.index_select(-2, ids), 1, False),
    "rows": (lambda h, ids: h[ids], 0, True),
    "of all": (lambda h, ids: h.flatten(0, 1)[ids], None, True),
    "rotary": (lambda h, ids: h + torch.cos(torch.arange(h.shape[1])[:, None] * torch.ones(16))[ids][:, None], 1, True),
}  # fmt: skip


@pytest.mark.parametrize("name", PICKS)
def test_what_is_computed_is_a_table_of_dynamic_size(name):
    read, dim, negative = PICKS[name]
    model = Picks(read).eval()
    net = compiled(model, {"x": torch.randn(4, 16, 16), "ids": torch.randint(0, 4, (4,))}, "eager")
    for sizes in ((4, 16), (3, 10), (7, 5)):
        x = torch.randn(*sizes, 16)
        size = sizes[0] * sizes[1] if dim is None else sizes[dim]
        for good in (0, size - 1, *([-size] if negative else [])):
            ids = torch.full((sizes[0],), good)
            assert (net(x, ids) - model(x, ids)).norm() < 0.05 * model(x, ids).norm()
        for bad in (size, -size - 1 if negative else -1):
            with pytest.raises(sqcompile.IndexRangeError, match=f"ids indexes .* and is {bad}"):
                net(x, torch.full((sizes[0],), bad))


def test_the_backend_reads_what_is_computed():
    model = Picks(PICKS["one token of each row"][0]).eval()
    plan = sqcompile.calibrate(model, [(torch.randn(4, 16, 16), torch.zeros(4).long())], progress=False)
    torch._dynamo.reset()
    net = torch.compile(model, backend="smoothquant", dynamic=True, options={"plan": plan, "compiler": "eager"})
    with torch.no_grad():
        for sizes in ((4, 16), (3, 10)):
            x, ids = torch.randn(*sizes, 16), torch.full(sizes[:1], sizes[1] - 1)
            assert (net(x, ids) - model(x, ids)).norm() < 0.05 * model(x, ids).norm()
            with pytest.raises(sqcompile.IndexRangeError):
                net(x, ids + 1)


def test_a_mask_takes_as_many_dims_as_it_has():
    """So that an index after it is of a later dim."""
    gm = graph("""
    %x: f32[2, 3, 5] = input
    %keep: b1[2, 3] = input
    %ids: i64[6] = input
    %y = aten.index(%x, [%keep, %ids])
    return [%y]
""", {})  # fmt: skip
    (node,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.index.Tensor)
    assert [dim for _, _, dim, _ in _reads(node)] == [0, 2]


def test_positions_past_their_table():
    for read, match in (
        (counted, "what is computed from mask indexes places.weight, which takes 0 to 8, and is 11"),
        (lambda m, ids, mask: m.embed(ids) + m.places(torch.arange(ids.shape[1])), "positions indexes places.weight"),
    ):
        net = compiled(Table(read).eval(), {"ids": torch.ones(2, 4).long(), "mask": torch.ones(2, 4).long()}, "eager")
        ids = torch.ones(1, 10, dtype=torch.long)
        assert net(ids[:, :7], mask=ids[:, :7]).isfinite().all()
        with pytest.raises(sqcompile.IndexRangeError, match=match):
            net(ids, mask=ids)


def test_what_the_model_chooses_itself_is_not_checked():
    def chosen(m, ids, mask):
        return m.embed.weight[m.embed(ids.clamp(0, 9)).argmax(-1) % 10]

    net = compiled(Table(chosen).eval(), {"ids": torch.ones(2, 4).long()}, "eager")
    checks = net.lowered.graph.find_nodes(op="call_function", target=sqcompile_ops.checked_ids.default)
    assert [n.args[1:3] for n in checks] == [(0, 10)]


def test_the_process_survives_in_compiled_code():
    model = Table(lambda m, ids, mask: m.embed(ids)).eval()
    net = compiled(model, {"ids": torch.randint(0, 9, (2, 4))}, "inductor")
    ids = torch.randint(0, 9, (3, 5))
    assert (net(ids) - model(ids)).norm() < 0.05 * model(ids).norm()
    for bad in (10, -1, -100, 2**40):
        with pytest.raises(
            sqcompile.IndexRangeError, match=f"ids indexes embed.weight, which takes 0 to 9, and is {bad}"
        ):
            net(ids.index_fill(1, torch.tensor([2]), bad))
    assert (net(ids) - model(ids)).norm() < 0.05 * model(ids).norm()


@pytest.mark.parametrize("compiler", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_backend_checks_too(compiler):
    model = Table(lambda m, ids, mask: m.embed(ids)).eval()
    ids = torch.randint(0, 9, (3, 5))
    plan = sqcompile.calibrate(model, [ids], progress=False)
    torch._dynamo.reset()
    net = torch.compile(model, backend="smoothquant", options={"plan": plan, "compiler": compiler})
    with torch.no_grad():
        net(ids)
        with pytest.raises(
            sqcompile.IndexRangeError, match=r"^ids indexes embed.weight, which takes 0 to 9, and is 10"
        ):
            net(ids.index_fill(1, torch.tensor([2]), 10))
        net(ids)


def test_the_operator():
    ids = torch.randint(0, 9, (2, 3)).t()
    torch.library.opcheck(sqcompile_ops.checked_ids.default, (ids, 0, 9, "ids"))
    assert torch.equal(sqcompile_ops.checked_ids(ids, 0, 9, "ids"), ids)
    assert sqcompile_ops.checked_ids(ids[:0], 0, 9, "ids").shape == (0, 2)
