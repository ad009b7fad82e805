"""What several test files need: a little real text, a cache of their own, and a way to start and kill runs."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher import Launcher

# Before torch is imported, and for every child: tests that start several processes would fight for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # nor do the few with several threads wait by spinning

# One server forks the children of all tests; it starts with the first and imports this once.
multiprocessing.set_forkserver_preload(
    ["transformers.models.llama.modeling_llama", "launched", "killed_run", "step.two_ranks"]
)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Caches of the tests are made by the tests."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FALLLINE_CACHE"] = str(folder)
    yield folder
    del os.environ["FALLLINE_CACHE"]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty files of real English."""
    from pydoc_data.topics import topics

    folder = tmp_path_factory.mktemp("corpus")
    for name in sorted(topics)[:60]:
        (folder / f"{name}.txt").write_text(topics[name], encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def fallline(tmp_path_factory: pytest.TempPathFactory, own_cache: Path) -> Launcher:
    return Launcher(tmp_path_factory.mktemp("launcher"))


@pytest.fixture(scope="session")
def smollm2(own_cache: Path) -> Path:
    """The folder of the model `smollm2-135m-instruct`, fetched and converted once; for slow tests."""
    from fallline.errors import InputError
    from fallline.models.smollm2_135m_instruct import folder

    try:
        return folder()
    except InputError as error:
        if "cannot be fetched" in str(error):
            pytest.skip(str(error))
        raise
