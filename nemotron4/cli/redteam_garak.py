"""``nemotron4 redteam garak`` and ``compare``: scans by somebody else's attacks."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nemotron4.cli.console import note, present
from nemotron4.cli.options import (
    ConcurrencyOption,
    JsonOption,
    MaxTokensOption,
    NameAtServerOption,
    RunFolderOption,
    SeedOption,
    TemperatureOption,
)
from nemotron4.redteam.settings import ScanSettings

if TYPE_CHECKING:
    from nemotron4.redteam.garak_process import Target

START_S = 600.0


def garak(
    target: Annotated[
        str, typer.Option(metavar="URL|MODEL", help="A server (URL, .../generate too), or a model to serve.")
    ],
    out: RunFolderOption,
    probes: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GROUP", help="An area, module or probe; repeatable. Default: the report's ten areas."
        ),
    ] = None,
    generations: Annotated[
        int, typer.Option(min=1, help="Answers to each prompt.")
    ] = ScanSettings.generations,
    max_prompts: Annotated[
        int, typer.Option(min=1, help="Prompts of one probe, where it can be limited.")
    ] = ScanSettings.max_prompts,
    max_tokens: MaxTokensOption = ScanSettings.max_tokens,
    temperature: TemperatureOption = ScanSettings.temperature,
    concurrency: ConcurrencyOption = ScanSettings.concurrency,
    seed: SeedOption = ScanSettings.seed,
    online: Annotated[bool, typer.Option("--online", help="Run the probes that need a network too.")] = False,
    model_name: NameAtServerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Scan a model with garak, by the areas of the technical report.

    garak gets an environment of its own in the user's cache on first use: 1.8 GB and some minutes.
    """
    from nemotron4.redteam.garak_areas import plan_scan
    from nemotron4.redteam.garak_process import garak_environment, garak_python, known_probes
    from nemotron4.redteam.garak_report import summary_blocks, write_report
    from nemotron4.redteam.garak_scan import scan

    settings = ScanSettings(
        generations=generations,
        max_prompts=max_prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        concurrency=concurrency,
        seed=seed,
        is_online=online,
    )
    python = garak_python(note)
    known = known_probes(python, garak_environment(out, settings))
    plan = plan_scan(known, probes or [], is_online=online)
    with _open_target(target, model_name) as opened:
        note(
            f"{len(plan.units)} processes for {sum(len(unit.probes) for unit in plan.units)} probes; "
            f"{len(plan.skipped)} probes skipped"
        )
        result = scan(plan, opened, settings, out=out, python=python, note=note)
    written = write_report(result, out)
    present(result.to_json(), summary_blocks(result), as_json=as_json)
    note(f"wrote {', '.join(map(str, written))}")
    if any(probe.status == "failed" for probe in result.probes):
        note("some probes failed: see 'What did not run' in the report; the same command tries them again")
        raise typer.Exit(1)


@contextlib.contextmanager
def _open_target(target: str, model_name: str | None) -> Iterator[Target]:
    """The server at an address, or a model served by a child process for as long as the scan takes."""
    from nemotron4.client.http import base_url
    from nemotron4.client.remote import KEY_VARIABLE, connect, is_address
    from nemotron4.redteam.garak_process import Target

    if is_address(target):
        url = base_url(target)
        name = connect(url, model_name).name
        yield Target(url=url, model=name, api_key=os.environ.get(KEY_VARIABLE))
        return
    from nemotron4.cli.child_server import ChildServer
    from nemotron4.progress import Waiting

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "nemotron4.cli.lifeline", "serve", target, "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder:
        server = ChildServer(command, url=f"http://127.0.0.1:{port}", log=Path(folder) / "serve.log")
        with server:
            with Waiting(f"loading {target}"):
                server.wait_until_ready(timeout_s=START_S)
            url = f"{server.url}/v1"
            yield Target(url=url, model=connect(url, None).name)


def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of a scan.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Folder of another scan.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two scans over the probes that ran in both, with Fisher's exact test."""
    from nemotron4.redteam.garak_report import compare as compare_scans
    from nemotron4.redteam.garak_report import comparison_blocks
    from nemotron4.redteam.garak_scan import load_scan

    comparison = compare_scans(load_scan(first), load_scan(second))
    present(comparison.to_json(), comparison_blocks(comparison), as_json=as_json)
