"""Options that several sub-commands share: one spelling, one help text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from nemotron4.errors import unknown_name

PORT = 1424  # of the model card's own job
GPU = "h100-80gb"


def one_of(*names: str, **other_words: str) -> Callable[[str | None], str | None]:
    """Checks a value while the command line is read; ``other_words`` of other tools mean one of the names."""

    def check(value: str | None) -> str | None:
        value = other_words.get(value or "", value)
        if value is not None and value not in names:
            message, hint = unknown_name("value", value, names)
            raise typer.BadParameter(f"{message} ({hint})")
        return value

    return check


ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="smollm2, a directory, a .gguf or .nemo file, or a hub id.")
]
RowFilesArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE...",
        help="JSON lines, CSV, TSV, text, Parquet, Arrow, a folder, a pattern, or hub:ORG/NAME:split.",
    ),
]
_SAME_DTYPES = {
    "fp32": "float32", "float": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16"
}  # fmt: skip
DtypeOption = Annotated[
    str,
    typer.Option(
        callback=one_of("auto", "float32", "bfloat16", "float16", **_SAME_DTYPES),
        help="auto, float32, bfloat16 or float16.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(callback=one_of("auto", "cpu", "cuda", gpu="cuda"), help="auto, cpu or cuda.")
]
QuantizeOption = Annotated[
    str | None,
    typer.Option(
        callback=one_of("int8", "int4"), help="Quantise the weights while loading (CPU): int8 or int4."
    ),
]
AdapterOption = Annotated[
    str,
    typer.Option(
        metavar="PATH", help="A trained adapter. auto: the one that ships for the model. none: no adapter."
    ),
]
ForceAdapterOption = Annotated[
    bool, typer.Option("--force-adapter", help="Accept another base than the adapter records.")
]
ChatTemplateOption = Annotated[
    str | None, typer.Option(metavar="FILE", help="Format of turns: nemotron4, chatml or a Jinja file.")
]
JsonSchemaOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A JSON schema that every answer fits.")
]
ContextOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens of prompt and answer; default the model's.")
]
KvCacheDtypeOption = Annotated[
    str, typer.Option(help="Keys and values: auto, int8 (on a CPU), or a type of vLLM's (fp8, ...).")
]
GpuMemoryOption = Annotated[
    float | None, typer.Option(min=0.01, max=1, help="Share of the GPU's memory; vLLM takes 0.9.")
]
RevisionOption = Annotated[str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a hub id.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
FolderArgument = Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run or a study.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="NAME=VALUE", help="Override a value of the recipe by its dotted name."),
]
ServedNameOption = Annotated[
    list[str] | None, typer.Option(metavar="NAME", help="What requests may call the model; repeatable.")
]
RunFolderOption = Annotated[
    Path, typer.Option(metavar="DIR", help="Folder of the run; the same command resumes it.")
]
TargetOption = Annotated[str, typer.Option(metavar="URL", help="The model's server (.../generate too).")]
NameAtServerOption = Annotated[str | None, typer.Option(help="Its name at its server.")]
MaxTokensOption = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
TemperatureOption = Annotated[float, typer.Option(min=0, help="0 is greedy.")]
TopPOption = Annotated[
    float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens of this total probability.")
]
SeedOption = Annotated[int, typer.Option(help="Equal seeds draw the same.")]
ConcurrencyOption = Annotated[int, typer.Option(min=1, help="Requests under way at once.")]
PolicyOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Policy text O1 to O13 instead of ours.")
]
RAW_HELP = "Ask by /v1/completions, as AEGIS' classifiers need it."
RawOption = Annotated[bool, typer.Option("--raw", help=RAW_HELP)]
Latin1Option = Annotated[bool, typer.Option("--latin-1", help="The files are Latin-1, not UTF-8.")]
