"""vLLM's command line, run by the Python of its environment, with the same INT8 arithmetic on every processor.

    plain_vllm.py serve DIRECTORY ...

Where there is AMX, vLLM 0.32 takes another kernel, which wants bfloat16 activations and leaves static scales unread. Its INT8
experts run with AMX alone. What a checkpoint says is compared in float32, so that kernel is turned off here, and experts are
computed by PyTorch's operators, from the tensors that vLLM has read. Processes that vLLM spawns run this file, too.
"""

from __future__ import annotations

import torch

torch.cpu._is_amx_tile_supported = lambda: False


def _quantized(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row in steps of its largest value's 127th: INT8 values as floats, [M, K], and the steps, [M, 1]."""
    step = (x.abs().amax(-1, keepdim=True) / 127).clamp_min(1e-12)
    return (x / step).round().clamp(-127, 127), step


def _linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    q, step = _quantized(x)
    return (q.double() @ weight.double().T).to(x.dtype) * step * scale.view(1, -1)


def plain_experts() -> None:
    """vLLM's INT8 experts on CPUs read and keep their weights as ever, and are computed here."""
    from vllm.model_executor.layers.fused_moe.experts import cpu_moe

    def apply(self, output, hidden_states, w1, w2, topk_weights, topk_ids, *rest, **others) -> None:
        output.zero_()
        for e in range(w1.shape[0]):
            token, place = (topk_ids == e).nonzero(as_tuple=True)
            gate, up = _linear(hidden_states[token], w1[e], self.w1_scale[e]).chunk(2, -1)
            y = _linear(torch.nn.functional.silu(gate) * up, w2[e], self.w2_scale[e])
            output.index_add_(0, token, (y * topk_weights[token, place, None]).to(output.dtype))

    experts = cpu_moe.CPUExpertsInt8
    experts._supports_current_device = staticmethod(lambda: True)
    experts.process_weights_after_loading = lambda self, layer: None  # packs them for AMX
    experts.apply = apply


if __name__ == "__main__":
    from vllm.entrypoints.cli.main import main  # of the environment that runs this

    main()
