"""Compile the C++ of this folder into shared libraries in the user's cache.

One has all but the kernels. They have one for each instruction set, so that a first start compiles those of
its processor alone. A library's name holds a hash of the source, the compiler and the flags, so a new version
of any of them gets one of its own and an old one is never loaded by mistake.
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
from functools import cache
from pathlib import Path

from nemotron4.config import user_cache_dir
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
STEP = "step"
PLAIN = (STEP, "pack", "pool", "dispatch", "sample")


class BuildError(Exception):
    """Why there is no library; the message is one line."""


def library_path(part: str) -> Path:
    """The library of ``part``, STEP or an instruction set, built where it is not yet. Raises BuildError."""
    if platform_sets() is None or sys.platform == "win32":
        raise BuildError(f"no kernels for {platform.machine()} on {sys.platform}")
    ready = SOURCE / f"{part}.so"  # a wheel may carry it
    if ready.exists():
        return ready
    compiler = _compiler()
    # Of the user, wherever the models are kept: another NEMOTRON4_CACHE needs no other library.
    target = user_cache_dir() / "native" / f"{_digest(compiler)}-{part}.so"
    try:
        if not target.exists():
            _build_once(target, compiler, part)
    except OSError as error:
        raise BuildError(f"{target.parent}: {error.strerror}") from error
    return target


def platform_sets() -> dict[str, tuple[str, ...]] | None:
    """The instruction sets that this kind of machine may have, with their flags."""
    machine = platform.machine().lower()
    return INSTRUCTION_SETS.get({"amd64": "x86_64"}.get(machine, machine))


def _build_once(target: Path, compiler: str, part: str) -> None:
    """Processes that start together wait for the first of them."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for left in target.parent.glob(f"{target.stem}-*"):  # by a compilation that was killed
                shutil.rmtree(left, ignore_errors=True)
            _say_that_it_takes_long()
            build(target, compiler, part)


@cache
def _say_that_it_takes_long() -> None:
    print("compiling the CPU kernels (once, about 10 s on two idle cores) ...", file=sys.stderr)


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


def build(target: Path, compiler: str, part: str, extra: tuple[str, ...] = ()) -> None:
    """Compile the files of one library, several at a time, link, and rename into place. Raises BuildError."""
    sets = platform_sets() or {}
    jobs: list[tuple[str, tuple[str, ...]]] = [(name, ()) for name in PLAIN]
    if part != STEP:
        jobs = [("kernels", (f"-DISA={part}", *sets[part]))]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f"{target.stem}-") as folder:

        def compile_one(job: tuple[str, tuple[str, ...]]) -> str:
            name, flags = job
            output = f"{folder}/{name}.o"
            _run([compiler, *FLAGS, *flags, *extra, "-c", str(SOURCE / f"{name}.cpp"), "-o", output])
            return output

        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            objects = list(pool.map(compile_one, jobs))
        _run([compiler, "-shared", "-pthread", *extra, *objects, "-o", f"{folder}/library.so"])
        publish(Path(folder, "library.so"), target)


def _run(command: list[str]) -> None:
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        first = next((line for line in lines if "error" in line), lines[0])
        raise BuildError(f"{Path(command[0]).name} failed: {first}")


@cache
def load_library(part: str) -> ctypes.CDLL:
    """The loaded library. Raises BuildError."""
    path = library_path(part)
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded: {error}") from error
