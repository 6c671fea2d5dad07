"""options: those of the commands, with their help."""

from __future__ import annotations

from typing import Annotated

import typer

Folder = Annotated[str, typer.Argument(metavar="DIR", help="what `sqcompile quantize` wrote", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object on stdout")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no bars and no notes on stderr")]
Samples = Annotated[int, typer.Option(min=1, help="rows of data at most; no more are read")]
SeqLen = Annotated[int | None, typer.Option(min=2, help="tokens of a row; 512, or as many as the model takes")]
Seed = Annotated[
    int | None,
    typer.Option(min=0, max=2**63 - 1, help="take the rows at random, by this seed; the first ones without it"),
]
BatchSize = Annotated[int | None, typer.Option(min=1, help="rows of a batch; about 4,096 tokens without it")]
TokenizerDir = Annotated[str | None, typer.Option("--tokenizer", metavar="DIR", help="where the tokenizer is")]
Device = Annotated[str | None, typer.Option(help="such as cpu or cuda; where it was saved without it")]
ComputesOn = Annotated[
    str | None, typer.Option("--device", help="where it is calibrated, such as cpu or cuda; a GPU if there is one")
]
Against = Annotated[str | None, typer.Option(metavar="MODEL_DIR", help="the float model to compare with")]

# of quantize
ModelDir = Annotated[str, typer.Argument(metavar="MODEL_DIR", help="a float model of transformers", show_default=False)]
Out = Annotated[str | None, typer.Option("--out", "-o", metavar="PATH", help="where to; replaced as a whole")]
Calib = Annotated[
    str | None,
    typer.Option(
        metavar="PATH", help="real inputs: .txt, .jsonl, .parquet, .npy, a directory of pictures or .wav files"
    ),
]
Format = Annotated[str, typer.Option(help="sqcompile, compressed-tensors (vLLM), smoothed (float), onnx or pt2")]
PlanFile = Annotated[str | None, typer.Option(metavar="FILE", help="a saved plan, instead of data and recipe")]
RecipeName = Annotated[
    str,
    typer.Option(rich_help_panel="Recipe", help="default, O1, O2, O3, fp8, or a .json file with fields of a Recipe"),
]
Alpha = Annotated[str | None, typer.Option(rich_help_panel="Recipe", help="auto, a number, or several: 0.3,0.5")]
Activation = Annotated[
    str | None, typer.Option(rich_help_panel="Recipe", help="per_token, per_tensor or per_tensor_static")
]
Weight = Annotated[str | None, typer.Option(rich_help_panel="Recipe", help="per_channel or per_tensor")]
Smooth = Annotated[
    bool | None, typer.Option("--smooth/--no-smooth", rich_help_panel="Recipe", help="whether to smooth")
]
Rotate = Annotated[str | None, typer.Option(rich_help_panel="Recipe", help="auto, none, 16, 32, 64 or 128")]
Shift = Annotated[
    bool | None,
    typer.Option("--shift/--no-shift", rich_help_panel="Recipe", help="whether biases may take means off inputs"),
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", rich_help_panel="Recipe", help="a module that stays in float; repeatable"),
]
LmHead = Annotated[
    bool | None,
    typer.Option("--lm-head/--no-lm-head", rich_help_panel="Recipe", help="the projection to the vocabulary"),
]
Attention = Annotated[str | None, typer.Option(rich_help_panel="Recipe", help="none, qk or qk_pv")]
Qk = Annotated[
    str | None,
    typer.Option(rich_help_panel="Recipe", help="scales of Q and K: per_token, per_head, per_tensor ..."),
]
Spikes = Annotated[
    str | None, typer.Option(rich_help_panel="Recipe", help="static scales where tokens spike: dynamic or static")
]
MinSpeedup = Annotated[
    float | None, typer.Option(rich_help_panel="Recipe", help="leave in float what gains less over bf16")
]
MaxDegradation = Annotated[
    float | None, typer.Option(rich_help_panel="Recipe", help="percent of perplexity that may be lost")
]
FloatWork = Annotated[
    float | None, typer.Option(rich_help_panel="Recipe", help="share of the work that may stay in float for accuracy")
]
Overrides = Annotated[
    str | None, typer.Option(metavar="JSON", rich_help_panel="Recipe", help='{"*.down_proj": {"alpha": 0.8}}')
]
Dtype = Annotated[str | None, typer.Option("--dtype", rich_help_panel="Recipe", help="int8 or fp8")]
ModelDtype = Annotated[str, typer.Option(help="of the float model: auto, float32, bfloat16 or float16")]
MaxMemory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="such as 6GiB: weights are read as they are used, and given back beyond it"),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="print what would be done; nothing is written")]
