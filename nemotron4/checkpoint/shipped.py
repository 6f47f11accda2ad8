"""The adapter that ships with the package, and the model that it makes with its base.

``adapters/smollm2`` teaches the demo model the card's prompt format (recipes/smollm2 made it), and its
template makes that the format of chats too. Base and adapter are merged once, in float32, rounded to eight
bits and kept with the pulled model, so that later starts read a file whose blocks the engine computes with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nemotron4.checkpoint.cache import DEMO_NAME, locked_partial, model_dir, resolve
from nemotron4.errors import DownloadError
from nemotron4.runs import publish
from nemotron4.text.tokenizer_files import TEMPLATE_FILE

if TYPE_CHECKING:
    from nemotron4.checkpoint.interface import Checkpoint

AUTO, NONE = "auto", "none"
FOLDER = Path(__file__).with_name("adapters") / DEMO_NAME
WEIGHTS = FOLDER / "adapter_model.safetensors"


def chosen_adapter(model: str | Path | Checkpoint, adapter: str | Path | None) -> Path | None:
    """The folder that is meant: ``auto`` is the adapter that ships for the pulled name, or none."""
    if adapter is None or adapter == NONE:
        return None
    if adapter != AUTO:
        return Path(adapter)
    return FOLDER if model == DEMO_NAME else None


def with_shipped(
    model: str | Path | Checkpoint,
    adapter: str | Path | None,
    tell: Callable[[str], None] = lambda line: None,
) -> tuple[str | Path | Checkpoint, Path | None]:
    """What to open, and the adapter that is still to be put on it."""
    chosen = chosen_adapter(model, adapter)
    if chosen != FOLDER:
        return model, chosen
    tell(
        f"{DEMO_NAME} with its adapter, which speaks the card's prompt format, in chats too; "
        "--adapter none is the bare model in ChatML"
    )
    merged = merged_file()
    if not merged.is_file():
        resolve(DEMO_NAME)  # says how to get it
        tell("merging the adapter with the model (once, some seconds) ...")
        try:
            _merge(merged)
        except (DownloadError, OSError):  # a cache that cannot be written: merged in memory, at each start
            return model, chosen
    return merged, None


def merged_file() -> Path:
    """Where the merged model is kept: another adapter, or another format, is another file."""
    files = (WEIGHTS, FOLDER / TEMPLATE_FILE)
    version = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]
    return model_dir(DEMO_NAME) / f"with-adapter-{version}" / f"{DEMO_NAME}.gguf"


def _merge(merged: Path) -> None:
    # Imported here because a start from the merged file needs no torch.
    from nemotron4.checkpoint.convert import ConvertOptions, convert
    from nemotron4.checkpoint.opening import open_checkpoint

    with locked_partial(f"{DEMO_NAME}-{merged.parent.name}") as partial:
        if merged.is_file():  # another process made it while this one waited
            return
        options = ConvertOptions(to="gguf", quantize="q8_0", adapter=FOLDER)
        [written] = convert(open_checkpoint(DEMO_NAME), partial, options)
        merged.parent.mkdir(exist_ok=True)
        publish(partial / written.name, merged)
        (partial / "manifest.json").unlink()
