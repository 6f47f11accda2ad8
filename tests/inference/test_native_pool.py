"""The library's threads: a program ends although some of them are kept from running."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from nemotron4.inference.native import build

# A thread that is kept from running stays in its first tile until everything is done.
PROGRAM = r"""
#include "pool.h"
#include <cstdlib>
enum { JOBS = 5, TILES = 7 };
std::atomic<int> commits[JOBS][TILES];
std::atomic<bool> is_over;
std::thread::id caller;
bool holds_caller;
struct Task {
    int job;
    void compute(int tile, float *scratch) const {
        scratch[0] = (float)(job * TILES + tile);
        const bool is_caller = std::this_thread::get_id() == caller;
        while (is_caller == holds_caller && !is_over) std::this_thread::yield();
    }
    void commit(int tile, const float *scratch) const {
        if (scratch[0] != (float)(job * TILES + tile)) abort();
        for (int before = 0; before < job; before++)
            for (auto &count : commits[before])
                if (count != 1) abort();
        commits[job][tile]++;
        int done = 0;
        for (auto &count : commits[JOBS - 1]) done += count;
        if (done == TILES) is_over = true;
    }
};
int main(int, char **arguments) {
    caller = std::this_thread::get_id();
    holds_caller = arguments[1][0] == 'c';
    Pool pool(3);
    for (int program = 0; program < 3 * Pool::SLOTS; program++) {
        is_over = false;
        for (auto &job : commits)
            for (auto &count : job) count = 0;
        pool.begin();
        for (int job = 0; job < JOBS; job++) pool.add(TILES, 1, Task{job});
        pool.run();
        for (auto &job : commits)
            for (auto &count : job)
                if (count != 1) abort();
        pool.wait_for_stragglers();
    }
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pool")
    (folder / "program.cpp").write_text(PROGRAM)
    sources = [folder / "program.cpp", build.SOURCE / "pool.cpp"]
    command = [build._compiler(), "-std=c++17", "-O1", "-pthread", f"-I{build.SOURCE}", *sources]
    subprocess.run([*command, "-o", folder / "program"], check=True)
    return folder / "program"


@pytest.mark.parametrize("held", ["caller", "others"])
def test_a_program_ends_without_the_threads_that_are_kept_from_running(program: Path, held: str) -> None:
    assert subprocess.run([program, held], timeout=60).returncode == 0
