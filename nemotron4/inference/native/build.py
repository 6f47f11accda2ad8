"""Compile the C++ of this folder into a shared library in the user's cache.

The library's name holds a hash of the source, the compiler and the flags, so a new version of any of them
gets a library of its own and an old one is never loaded by mistake.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

from nemotron4.config import user_cache_dir
from nemotron4.progress import Progress
from nemotron4.runs import publish

SOURCE = Path(__file__).parent
FLAGS = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_VNNI = (*_AVX512, "-mavx512vnni")
_BF16 = (*_VNNI, "-mavx512bf16")
_AMX = (*_BF16, "-mamx-tile", "-mamx-int8", "-mamx-bf16")
INSTRUCTION_SETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {"avx2": _AVX2, "avx512": _AVX512, "vnni": _VNNI, "bf16": _BF16, "amx": _AMX},
    "aarch64": {"generic": ("-O3",)},
    "arm64": {"generic": ("-O3",)},
}
PLAIN = ("step", "pack", "pool", "dispatch", "sample")


class BuildError(Exception):
    """Why there is no library; the message is one line."""


@lru_cache(maxsize=1)
def library_path() -> Path:
    """The library, built if it is not in the cache yet. Raises BuildError."""
    machine = platform.machine().lower()
    kinds = INSTRUCTION_SETS.get({"amd64": "x86_64"}.get(machine, machine))
    if kinds is None or sys.platform == "win32":
        raise BuildError(f"no kernels for {machine} on {sys.platform}")
    ready = (
        SOURCE / "kernels.so"
    )  # a wheel may carry it; not library.so, which Python would import for library.py
    if ready.exists():
        return ready
    compiler = _compiler()
    # Of the user, wherever the models are kept: another NEMOTRON4_CACHE needs no other library.
    target = user_cache_dir() / "native" / f"{_digest(compiler)}.so"
    try:
        if not target.exists():
            _build_once(target, compiler, kinds)
    except OSError as error:
        raise BuildError(f"{target.parent}: {error.strerror}") from error
    return target


def _build_once(target: Path, compiler: str, kinds: dict[str, tuple[str, ...]]) -> None:
    """Processes that start together wait for the first of them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            print("compiling the CPU kernels (once, about 15 s on two idle cores) ...", file=sys.stderr)
            build(target, compiler, kinds, is_shown=True)


def _compiler() -> str:
    for name in filter(None, (os.environ.get("CXX"), "g++", "clang++", "c++")):
        if path := shutil.which(name):
            return path
    raise BuildError("no C++ compiler (g++ or clang++)")


def _digest(compiler: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    parts = [version, repr((FLAGS, INSTRUCTION_SETS)).encode()]
    parts += [path.read_bytes() for path in sorted(SOURCE.glob("*.[ch]*"))]
    return hashlib.blake2b(b"\0".join(parts), digest_size=12).hexdigest()


def build(
    target: Path,
    compiler: str,
    kinds: dict[str, tuple[str, ...]],
    extra: tuple[str, ...] = (),
    *,
    is_shown: bool = False,
) -> None:
    """Compile every file, several at a time, link, and rename into place. Raises BuildError."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        jobs: list[tuple[str, str, tuple[str, ...]]] = [
            ("kernels.cpp", f"{isa}.o", (f"-DISA={isa}", *flags)) for isa, flags in kinds.items()
        ]
        jobs += [(f"{name}.cpp", f"{name}.o", ()) for name in PLAIN]

        def compile_one(job: tuple[str, str, tuple[str, ...]]) -> None:
            source, output, flags = job
            _run([compiler, *FLAGS, *flags, *extra, "-c", str(SOURCE / source), "-o", f"{folder}/{output}"])
            if progress is not None:
                progress.add(1)

        with (
            Progress(len(jobs), name="compiling", unit="files", is_kept=False)
            if is_shown
            else nullcontext() as progress,
            ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool,
        ):
            list(pool.map(compile_one, jobs))
        objects = [f"{folder}/{output}" for _, output, _ in jobs]
        _run([compiler, "-shared", "-pthread", *extra, *objects, "-o", f"{folder}/library.so"])
        publish(Path(folder, "library.so"), target)


def _run(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{Path(command[0]).name} failed: {first}")


@lru_cache(maxsize=1)
def load_library() -> ctypes.CDLL:
    """The loaded library. Raises BuildError."""
    path = library_path()
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
