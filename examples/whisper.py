"""Whisper in INT8: encoder and decoder.

    python examples/whisper.py                                        # a tiny Whisper of random weights
    python examples/whisper.py --model path/of/whisper --sound folder/of/wavs

There is no speech model to ship, so without options the weights are random: what is found in the graph is that of a real
Whisper, and the error is of no meaning for speech. Recordings are 16-bit PCM of one channel at the model's rate.
"""

import argparse
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoFeatureExtractor, WhisperConfig, WhisperFeatureExtractor, WhisperForConditionalGeneration

import sqcompile


def chirps(count: int, seconds: float = 1.0, rate: int = 16000) -> list[np.ndarray]:
    """Tones that rise, in noise: float32 [samples] each."""
    t, random = np.arange(int(seconds * rate)) / rate, np.random.default_rng(0)
    tones = [np.sin(2 * np.pi * (200 + 100 * i) * t * (1 + t)) for i in range(count)]
    return [(0.3 * x + 0.01 * random.standard_normal(len(t))).astype(np.float32) for x in tones]


def recording(path: Path) -> np.ndarray:
    with wave.open(str(path), "rb") as f:
        return np.frombuffer(f.readframes(f.getnframes()), "<i2").astype(np.float32) / 2**15


def tiny() -> tuple[WhisperForConditionalGeneration, WhisperFeatureExtractor]:
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=128, d_model=128, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=256, decoder_ffn_dim=256, num_mel_bins=80, max_source_positions=50,
        max_target_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval(), WhisperFeatureExtractor(feature_size=80, chunk_length=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local directory of a Whisper")
    parser.add_argument("--sound", type=Path, help="a folder of .wav files")
    args = parser.parse_args()
    if args.model:
        model = WhisperForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
        extractor = AutoFeatureExtractor.from_pretrained(args.model)
    else:
        model, extractor = tiny()
    sounds = [recording(p) for p in sorted(args.sound.glob("*.wav"))] if args.sound else chirps(8)

    def batch(sound: list[np.ndarray]) -> dict[str, Tensor]:
        features = extractor(sound, sampling_rate=extractor.sampling_rate, return_tensors="pt").input_features
        with torch.no_grad():  # what the decoder reads in calibration is what the float model itself writes
            written = model.generate(features, max_length=20, do_sample=False)
        return {"input_features": features, "decoder_input_ids": written}

    # half of the recordings calibrate; the others are what is measured
    compiled = sqcompile.compile(model, [batch([sound]) for sound in sounds[::2]])
    print(str(compiled.report).splitlines()[-1])
    errors, same = [], []
    with torch.no_grad():
        for sound in sounds[1::2]:
            call = batch([sound])
            a, b = model(**call).logits, compiled(**call).logits
            errors.append((a - b).norm() / a.norm())
            same.append((a.argmax(-1) == b.argmax(-1)).double().mean())
    print(f"relative error of the logits: {torch.stack(errors).mean():.4f}")
    print(f"the likeliest token is the same at {100 * torch.stack(same).mean():.1f} % of positions")


if __name__ == "__main__":
    main()
