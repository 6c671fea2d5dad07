"""W8A8 by torchao and by llm-compressor, each as its own documentation has it; either is imported when it is asked for.

A recipe here takes a transformers model in float32, which it may change in place, and calibration windows, int64
[windows, length]. It gives the quantized model and remarks in words. What a tool refuses, it raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

BATCH = 4  # calibration windows in a call
Recipe = Callable[[nn.Module, Tensor], tuple[nn.Module, str]]

# What llm-compressor's table of architectures lacks, written as its README says, and as the table has it for models alike:
# [linears that read the norm's output], the norm.
_BY_HAND = {
    "GPTNeoXForCausalLM": [
        (["re:.*query_key_value"], "re:.*input_layernorm"),
        (["re:.*dense_h_to_4h"], "re:.*post_attention_layernorm"),
    ],
    "OPTForCausalLM": [
        (["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*self_attn_layer_norm"),
        (["re:.*fc1"], r"re:.*layers\.\d+\.final_layer_norm"),
    ],
}


def torchao_recipes() -> dict[str, Recipe]:
    """What torchao is asked for, by name.

    Raises:
        ModuleNotFoundError: torchao is not installed.
    """
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig as Dynamic
    from torchao.quantization import PerRow, PerTensor
    from torchao.quantization.quant_api import Int8StaticActivationInt8WeightConfig as Static

    return {
        "torchao, W8A8 per token": _torchao(Dynamic),
        "torchao, SmoothQuant .5": _torchao(Dynamic, 0.5),
        "torchao, SmoothQuant .8": _torchao(Dynamic, 0.8),
        "torchao, SmoothQuant .8, static per tensor": _torchao(
            lambda: Static(granularity=[PerTensor(), PerRow()]), 0.8
        ),
    }


def _torchao(config: Callable[[], Any], alpha: float | None = None) -> Recipe:
    """quantize_ of all linears but the head, with SmoothQuant if there is an alpha."""

    def quantize(model: nn.Module, windows: Tensor) -> tuple[nn.Module, str]:
        from torchao.prototype.smoothquant import SmoothQuantConfig
        from torchao.quantization import quantize_
        from torchao.quantization.quantize_.common.quantization_step import QuantizationStep

        def wanted(module: nn.Module, name: str) -> bool:
            return isinstance(module, nn.Linear) and module is not _head(model)

        if alpha is None:
            quantize_(model, config(), filter_fn=wanted)
            return model, ""
        smooth = SmoothQuantConfig(base_config=config(), step=QuantizationStep.PREPARE, alpha=alpha)
        quantize_(model, smooth, filter_fn=wanted)
        with torch.no_grad():
            for batch in windows.split(BATCH):
                model(input_ids=batch, use_cache=False)
        smooth.step = QuantizationStep.CONVERT.value
        quantize_(model, smooth, filter_fn=wanted)
        return model, ""

    return quantize


def llm_compressor_recipes() -> dict[str, Recipe]:
    """What llm-compressor is asked for, by name: its scheme W8A8 is per channel and per token.

    Raises:
        ModuleNotFoundError: llm-compressor is not installed.
    """
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform import SpinQuantModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    class Uncentred(SpinQuantModifier):
        """Centring the embeddings leaves a model with LayerNorm as it was, but changes one with RMSNorm, quantized or not."""

        def _center_embeddings(self, model: nn.Module) -> None:
            pass

    def rtn() -> Any:
        return QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])

    def gptq() -> Any:
        return GPTQModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"])

    def smooth(strength: float) -> Callable[..., Any]:
        return lambda mappings=None: SmoothQuantModifier(smoothing_strength=strength, mappings=mappings)

    def spin() -> Any:
        # Hadamard matrices of the whole width exist for powers of two; 64 divides the widths of the models here
        return Uncentred(rotations=["R1", "R2", "R4"], transform_type="hadamard", transform_block_size=64)

    return {
        "llm-compressor, SmoothQuant .5 + W8A8": _oneshot(rtn, smooth(0.5), mapped=True),
        "llm-compressor, SmoothQuant .8 + W8A8": _oneshot(rtn, smooth(0.8), mapped=True),
        "llm-compressor, SmoothQuant .8 + GPTQ W8A8": _oneshot(gptq, smooth(0.8), mapped=True),
        "llm-compressor, SpinQuant + W8A8": _oneshot(rtn, spin),
    }


def _oneshot(quantizer: Callable[[], Any], transform: Callable[..., Any], mapped: bool = False) -> Recipe:
    """oneshot with a transform and a quantizer.

    Where a transform that takes mappings does not know the model, it is tried once more with those of `_BY_HAND`, and the
    remark says so.
    """

    def quantize(model: nn.Module, windows: Tensor) -> tuple[nn.Module, str]:
        mappings = _BY_HAND.get(type(model).__name__) if mapped else None
        try:
            return _run_oneshot(model, windows, [transform(), quantizer()]), ""
        except Exception as e:
            if mappings is None:
                raise
            refusal = words(e)
        # mappings are resolved before anything is changed
        done = _run_oneshot(model, windows, [transform(mappings=mappings), quantizer()])
        return done, f"mappings by hand, without which {refusal}"

    return quantize


def words(error: BaseException) -> str:
    """An error and what it comes from, in its own words."""
    said = f"{type(error).__name__}: {error}"
    return said if error.__cause__ is None else f"{said}, from {words(error.__cause__)}"


def _run_oneshot(model: nn.Module, windows: Tensor, recipe: Sequence[Any]) -> nn.Module:
    from llmcompressor import oneshot
    from llmcompressor.core import reset_session
    from loguru import logger
    from torch.utils.data import DataLoader

    logger.remove()
    reset_session()  # what an earlier run that failed has left
    rows: Any = [{"input_ids": w} for w in windows]
    loader = DataLoader(rows, batch_size=BATCH)
    oneshot(model=model, dataset=loader, recipe=[*recipe], num_calibration_samples=len(windows))
    return model.eval()


def _head(model: Any) -> nn.Module:
    """The projection to the vocabulary, which every tool leaves in float."""
    return model.get_output_embeddings()
