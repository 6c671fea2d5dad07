"""A vision transformer in INT8.

    python examples/vit.py
    python examples/vit.py --model path/of/a/vit --pictures folder/of/jpegs

Without options a small ViT is trained on the 1,797 handwritten digits of scikit-learn for some seconds, so that there is
an accuracy to compare. With a model of your own, its classes of your pictures are compared.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

import sqcompile


def digits() -> tuple[Tensor, Tensor]:
    """Pictures float32 [1797, 1, 8, 8] in [-1, 1], shuffled, and their digits int64 [1797]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = torch.randperm(len(found.images), generator=torch.Generator().manual_seed(0))
    pictures = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    return pictures[order], torch.tensor(found.target)[order]


def trained(pictures: Tensor, labels: Tensor, epochs: int = 30) -> nn.Module:
    """A ViT of 2 x 2 patches, 4 layers and 64 channels, trained on the pictures."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, num_labels=10, hidden_dropout_prob=0.0, **sizes)
    model = ViTForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(pictures)).split(64):
            loss = nn.functional.cross_entropy(model(pixel_values=pictures[rows]).logits, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local directory of an image classifier")
    parser.add_argument("--pictures", type=Path, help="a folder of pictures for it: half calibrate, half are compared")
    args = parser.parse_args()
    labels = None
    if args.model:
        from PIL import Image

        model = AutoModelForImageClassification.from_pretrained(args.model).eval()
        processor = AutoImageProcessor.from_pretrained(args.model)
        files = sorted(p for p in args.pictures.iterdir() if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
        pictures = processor([Image.open(p).convert("RGB") for p in files], return_tensors="pt").pixel_values
        calibration, test = pictures[::2], pictures[1::2]
    else:
        everything, classes = digits()
        model = trained(everything[:1400], classes[:1400])
        calibration, test, labels = everything[:128], everything[1400:], classes[1400:]

    compiled = sqcompile.compile(model, [{"pixel_values": batch} for batch in calibration.split(32)])
    print(str(compiled.report).splitlines()[-1])
    with torch.no_grad():
        floats, ints = model(pixel_values=test).logits, compiled(pixel_values=test).logits
    same = (floats.argmax(-1) == ints.argmax(-1)).double().mean()
    print(f"{len(test)} pictures: {100 * same:.2f} % in the same class")
    if labels is not None:
        right = [100 * (x.argmax(-1) == labels).double().mean() for x in (floats, ints)]
        print(f"accuracy: float {right[0]:.2f} %, INT8 {right[1]:.2f} %")


if __name__ == "__main__":
    main()
