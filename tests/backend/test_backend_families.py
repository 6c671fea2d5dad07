"""torch.compile(backend="smoothquant") of models that unpack the sizes of images: diffusers' transformers, Qwen2-VL."""

from __future__ import annotations

import pytest
import torch
from backend_cases import call, compiled
from conftest import relative_error
from torch._dynamo.utils import counters
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), pytest.mark.slow]


def same_at_every_size(model, calls):
    torch._dynamo.reset()
    net = compiled(model.eval(), calibration_steps=1)
    call(net, **calls[0])
    for kwargs in calls:
        got, want = call(net, **kwargs)[0], call(model, **kwargs)[0]
        assert 1e-6 < relative_error(got, want) < 0.05


def test_dit():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, patch_size=2,
        num_embeds_ada_norm=10,
    )  # fmt: skip
    same_at_every_size(
        model,
        [
            {
                "hidden_states": torch.randn(b, 4, 8, 8),
                "timestep": torch.full((b,), t),
                "class_labels": torch.zeros(b).long(),
            }
            for b, t in ((2, 5), (2, 7), (3, 9))
        ],
    )
    assert counters["stats"]["unique_graphs"] == 1


def test_flux():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    same_at_every_size(
        model,
        [
            {
                "hidden_states": torch.randn(b, n, 4),
                "encoder_hidden_states": torch.randn(b, t, 32),
                "pooled_projections": torch.randn(b, 32),
                "timestep": torch.full((b,), 0.5),
                "img_ids": torch.zeros(n, 3),
                "txt_ids": torch.zeros(t, 3),
            }
            for b, n, t in ((2, 16, 7), (2, 16, 9), (3, 25, 9))
        ],
    )
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:this is the last of the")
def test_qwen2_vl():
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 100, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=90, vision_start_token_id=91, vision_end_token_id=92, video_token_id=93,
    )  # fmt: skip

    def seeing(tokens, h, w):
        image = [91, *[90] * (h * w // 4), 92]
        ids = torch.cat([torch.randint(3, 80, (1, tokens)), torch.tensor([image]), torch.randint(3, 80, (1, 4))], 1)
        return {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(h * w, 3 * 2 * 4 * 4),
            "image_grid_thw": torch.tensor([[1, h, w]]), "mm_token_type_ids": (ids == 90).int(), "use_cache": False,
        }  # fmt: skip

    same_at_every_size(Qwen2VLForConditionalGeneration(config), [seeing(5, 4, 4), seeing(7, 4, 4), seeing(5, 4, 8)])
