"""The cache of rendered rows of these tests is their own."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NEMOTRON4_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
