"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 without a GPU, with INT8 tensor cores and without spills."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sqcompile.kernels.rotation import BLOCKS

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="needs the compiler")

CAPABILITIES = (80, 90, pytest.param(100, marks=pytest.mark.slow))
SHARED_BYTES = {80: 166_912, 90: 232_448, 100: 232_448}  # what one program may use
BF16 = torch.bfloat16


def binary(name: str) -> Path:
    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def compile_for(capability: int, call: Callable[[], Any]) -> list[Any]:
    from sqcompile.kernels.triton.gemm.dry import dry

    with dry(capability) as compiled:
        call()
    assert compiled
    return compiled


def check_resources(kernels: list[Any], capability: int, tmp_path: Path) -> None:
    """No register spills (they show as stack or local memory), and shared memory that there is."""
    for i, kernel in enumerate(kernels):
        cubin = tmp_path / f"{i}.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [binary("cuobjdump"), "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
        ).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert found, usage
        registers, stack, local = map(int, found.groups())
        name = kernel.metadata.name
        assert stack == local == 0, f"{name} spills: {found.group()}"
        assert registers * 32 * kernel.metadata.num_warps <= 65536, f"{name}: {found.group()}"
        assert kernel.metadata.shared <= SHARED_BYTES[capability], f"{name}: {kernel.metadata.shared} bytes"


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def gemm(m: int, n: int, k: int, **more: Any) -> None:
    from sqcompile.kernels.triton.gemm.int8_gemm import int8_gemm

    q, w = empty(m, k, dtype=torch.int8), empty(n, k, dtype=torch.int8)
    int8_gemm(q, w, empty(m, 1, dtype=torch.float32), empty(n, dtype=torch.float32), **more)


def rowwise() -> dict[str, Callable[[], Any]]:
    from sqcompile.kernels.triton.rows.act import act_quantize
    from sqcompile.kernels.triton.rows.norm import norm_quantize
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    x, w, wide = empty(64, 4096), empty(4096), empty(8, 28672)
    static, multiplier = torch.empty(()), empty(16384, dtype=torch.float32)
    return {
        "token": lambda: quantize_rows(x),
        "tensor": lambda: quantize_rows(x, "tensor"),
        "static wide": lambda: quantize_rows(wide, scale=static),
        "token 16384 float32": lambda: quantize_rows(empty(8, 16384, dtype=torch.float32), multiplier=multiplier),
        "rms": lambda: norm_quantize(x, w, 1e-5, residual=x),
        "layer 16384": lambda: norm_quantize(
            empty(8, 16384), empty(16384), 1e-5, kind="layer", bias=empty(16384), multiplier=multiplier, keep=True
        ),
        "rms wide": lambda: norm_quantize(wide, empty(28672), 1e-5, residual=wide),
        "silu": lambda: act_quantize(empty(64, 14336), empty(64, 14336)),
        "gelu": lambda: act_quantize(empty(64, 14336), None, "gelu"),
        "gelu_tanh wide": lambda: act_quantize(wide, wide, "gelu_tanh", scale=static),
        **{f"{name} {block}": functools.partial(call, block) for name, call in rotated().items() for block in BLOCKS},
    }


def rotated() -> dict[str, Callable[[int], Any]]:
    """Kernels that rotate in blocks of a size, or not."""
    from sqcompile.kernels.triton.rows.act import act_quantize
    from sqcompile.kernels.triton.rows.norm import norm_quantize
    from sqcompile.kernels.triton.rows.quantize import quantize_rows

    x, wide, single = empty(64, 4096), empty(8, 14336), empty(64, 4096, dtype=torch.float32)
    return {
        "rotated token": lambda block: quantize_rows(wide, rotation=block),
        "rotated float32": lambda block: quantize_rows(single, rotation=block),
        "rotated rms": lambda block: norm_quantize(x, empty(4096), 1e-5, residual=x, rotation=block),
        "rotated silu": lambda block: act_quantize(wide, wide, rotation=block),
    }


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_kernels_of_rows(capability, tmp_path):
    for call in rowwise().values():
        check_resources(compile_for(capability, call), capability, tmp_path)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_sum_over_gpus(capability, tmp_path):
    from sqcompile.kernels.triton.all_reduce import BLOCKS, all_reduce

    memories, calls = empty(4, dtype=torch.int64), empty(BLOCKS, dtype=torch.int32)
    for count, size in ((2, 4096), (2, 8 << 20), (4, 4096)):
        kernels = compile_for(
            capability, lambda n=count, k=size: all_reduce(empty(k), empty(k), memories, calls, 16 << 20, 1, n)
        )
        check_resources(kernels, capability, tmp_path)
        ptx = kernels[0].asm["ptx"]
        assert len(re.findall(r"atom\.global\.sys\.release", ptx)) == count - 1  # what was written is seen before it
        assert len(re.findall(r"(ld|atom)\.global\.sys\.acquire", ptx)) == count - 1  # and read after it
        assert not re.search(r"(ld|st)\.global\.b16", ptx) or size == 4096  # 16 bytes at a time


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_a_rotation_exchanges_values_in_registers(capability):
    """It takes no shared memory, as a detour through it would: what there is serves the row's absmax and the stores."""
    for call in rotated().values():
        plain, *others = [compile_for(capability, functools.partial(call, block))[0] for block in (0, *BLOCKS)]
        assert [o.metadata.shared for o in others] == [plain.metadata.shared] * len(BLOCKS)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_chosen_gemm_kernels_use_int8_tensor_cores(capability, tmp_path):
    instruction = {80: r"mma\.sync\S*s8\.s8", 90: r"wgmma\S*s32\.s8\.s8", 100: r"tcgen05\.mma\S*kind::i8"}[capability]
    for m, n, k in ((64, 4096, 4096), (300, 1024, 1024), (4096, 28672, 4096), (300, 1001, 1003)):
        kernels = compile_for(capability, lambda m=m, n=n, k=k: gemm(m, n, k))
        check_resources(kernels, capability, tmp_path)
        ptx = kernels[0].asm["ptx"]
        assert re.search(instruction, ptx), (m, n, k)
        assert ("cp.async.bulk.tensor" in ptx) == (capability >= 90 and m >= 300 and k % 16 == 0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_decode_kernels(capability, tmp_path):
    for m, k in ((1, 4096), (4, 14336), (3, 4098), (16, 4096)):
        kernels = compile_for(capability, lambda m=m, k=k: gemm(m, 4096, k))
        check_resources(kernels, capability, tmp_path)
        ptx = kernels[0].asm["ptx"]
        if m == 16:
            assert re.search(r"mma\.sync\S*m16n8k32\S*s8\.s8", ptx)
        else:
            assert ("dp4a.s32.s32" in ptx) == (k % 4 == 0)  # four products an instruction where rows are aligned
        for kernel in kernels:
            early = kernel.asm["ptx"].count("griddepcontrol.wait"), kernel.metadata.launch_pdl
            assert early == ((1, True) if capability >= 90 else (0, False))  # launched early means that it waits


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_grouped_gemm(capability, tmp_path):
    from sqcompile.kernels.triton.gemm.grouped import grouped_int8_gemm

    w, scales = empty(8, 2048, 1024, dtype=torch.int8), empty(8, 2048, dtype=torch.float32)
    for t in (64, 4096):
        q, rows = empty(t, 1024, dtype=torch.int8), empty(t, 1, dtype=torch.float32)
        kernels = compile_for(
            capability, lambda q=q, rows=rows: grouped_int8_gemm(q, w, rows, scales, torch.empty(8, dtype=torch.int32))
        )
        check_resources(kernels, capability, tmp_path)
        assert re.search(r"(mma\S*s8\.s8|kind::i8)", kernels[0].asm["ptx"])


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_the_shipped_configurations(name, tmp_path):
    from sqcompile.kernels.triton.gemm.tiles import Gpu, _shipped, table

    gpu = Gpu(name, 90, 132)
    assert name in _shipped(gpu)["measured"]
    shipped = {c: (m, n, k) for m, rows in table(gpu).items() for (n, k), c in rows.items()}
    assert shipped
    for c, (m, n, k) in list(shipped.items())[:: max(1, len(shipped) // 12)]:  # each takes a second
        kernels = compile_for(90, lambda c=c, m=m, n=n, k=k: gemm(m, n, k, config=c))
        check_resources(kernels, 90, tmp_path)
        if c.kind == "persistent" or c.swap:
            assert re.search(r"wgmma\S*s32\.s8\.s8", kernels[0].asm["ptx"]), c


def test_float32_results_fit_too(tmp_path):
    from sqcompile.kernels.triton.gemm.tiles import Config

    for c in (
        None,
        Config("persistent", 128, 256, 128, 3, 4, specialize=True),
        Config("persistent", 128, 128, 128, 5, 8),
    ):
        kernels = compile_for(90, lambda c=c: gemm(4096, 4096, 4096, dtype=torch.float32, config=c))
        check_resources(kernels, 90, tmp_path)


def test_warp_specialization_compiles(tmp_path):
    from sqcompile.kernels.triton.gemm.tune import SPECIALIZED

    kernels = compile_for(90, lambda: gemm(4096, 4096, 4096, config=SPECIALIZED[0]))
    check_resources(kernels, 90, tmp_path)
    assert "setmaxnreg" in kernels[0].asm["ptx"]  # registers move from the loading warps to the multiplying ones


# what `fuse` makes of a graph: a residual, or an activation and int8 out; biases or none
EPILOGUES: dict[str, dict[str, Any]] = {
    "residual": {"residual": empty(4096, 4096)},
    "bias, residual": {"bias": empty(4096), "residual": empty(4096, 4096)},
    "bias, relu, int8": {"bias": empty(4096), "activation": "relu", "out_scale": torch.empty(())},
    "bias, gelu, int8": {"bias": empty(4096), "activation": "gelu", "out_scale": torch.empty(())},
    "silu, int8": {"activation": "silu", "out_scale": torch.empty(())},
}


@pytest.mark.parametrize("name", EPILOGUES)
def test_every_epilogue_fits_the_chosen_tile(name, tmp_path):
    check_resources(compile_for(90, lambda: gemm(4096, 4096, 4096, **EPILOGUES[name])), 90, tmp_path)


@pytest.mark.skipif(torch.version.cuda is not None, reason="for CUDA, torch.library.triton_op imports it")
def test_importing_the_package_leaves_triton_alone():
    code = "import sys, sqcompile.kernels.triton; sys.exit('triton' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
