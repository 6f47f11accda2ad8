"""The model card's own scripts, unchanged, and its job of two nodes with eight processes each."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import requests

from nemotron4.cli.main import main
from nemotron4.cli.megatron_gpt_eval import page_settings, run
from nemotron4.cluster.hydra import parse_overrides
from nemotron4.errors import ConfigError
from nemotron4.server.settings import PageSettings
from tests.checkpoint import nemo_layouts as layouts
from tests.cluster.test_ranks import free_port

CARD = Path(__file__).parent / "card"
ENTRY = [sys.executable, "-m", "nemotron4.cli.megatron_gpt_eval"]
LAYOUT = [
    "pipeline_model_parallel_split_rank=0",
    "tensor_model_parallel_size=8",
    "trainer.precision=bf16",
    "pipeline_model_parallel_size=2",
    "trainer.devices=8",
    "trainer.num_nodes=2",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = layouts.tiny_config(num_layers=2, context_length=2048)
    weights = layouts.hugging_face_weights(config)
    return layouts.write_release(tmp_path_factory.mktemp("job") / "model", config, weights, tensor_parallel=4)


def environment(**values: str) -> dict[str, str]:
    slurm = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return slurm | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"} | values


def test_the_offline_run_prints_both_results(model: Path) -> None:
    prompts = "prompts=['the quick','fox','lazy dog']"
    settings = ["inference.greedy=True", "inference.tokens_to_generate=4", "inference.add_BOS=False"]
    done = subprocess.run(
        [*ENTRY, f"gpt_model_file={model}", prompts, *settings],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [i for i, line in enumerate(lines) if line == "*" * 27] == [0, 2, 3, 5]
    first, second = ast.literal_eval(lines[1]), ast.literal_eval(lines[4])
    assert list(first) == ["sentences", "tokens", "logprob", "full_logprob", "token_ids", "offsets"]
    assert [len(answer["sentences"]) for answer in [first, *second]] == [3, 2, 1]
    assert all(s.startswith(p) for s, p in zip(first["sentences"], ["the quick", "fox"], strict=False))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "need at least a nemo file or checkpoint dir"),
        (["checkpoint_dir=/x"], "Lightning checkpoints are pickles"),
        (
            ["gpt_model_file=/x", *LAYOUT, "trainer.num_nodes=1"],
            "devices \\* num_nodes should equal tensor_model_parallel_size",
        ),
        (["gpt_model_file=/x", "port=http"], "port is 'http'; expected an integer"),
        (["gpt_model_file=/x", "trainer.precision=int4"], "trainer.precision is 'int4'"),
    ],
)
def test_wrong_arguments_are_refused_as_nemo_refuses_them(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(arguments, {})


def test_the_shim_is_written_and_never_over_a_real_nemo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "install-shim", "--prefix", str(tmp_path)]) == 0
    path = Path(capsys.readouterr().out.strip())
    assert path == tmp_path / "examples/nlp/language_modeling/megatron_gpt_eval.py"
    compile(path.read_text(), str(path), "exec")
    assert main(["launch", "install-shim", "--prefix", str(tmp_path)]) == 0
    path.write_text("# NVIDIA's own")
    assert main(["launch", "install-shim", "--prefix", str(tmp_path)]) == 1
    assert path.read_text() == "# NVIDIA's own"


# Interface flags of Linux: "lo" up and running, in a network of its own so that port 1424 is free.
LOOPBACK_UP = (
    "import fcntl, socket, struct; fcntl.ioctl(socket.socket(), 0x8914, struct.pack('16sh14x', b'lo', 0x41))"
)
NAMESPACE = """
set -e
root=$1; model=$2
"$PYTHON" -c "$LOOPBACK_UP"
mount -t tmpfs tmpfs "$root"
for top in /*; do
    case $top in /proc|/opt|/scripts) continue;; esac
    if [ -L "$top" ]; then cp -P "$top" "$root$top"
    elif [ -d "$top" ]; then mkdir "$root$top"; mount --rbind "$top" "$root$top"
    fi
done
mkdir "$root/proc" "$root/opt" "$root/scripts"
mount -t proc proc "$root/proc"
cp "$CARD/call_server.py.txt" "$root/scripts/call_server.py"
cp "$CARD/nemo_inference.sh" "$root/scripts/nemo_inference.sh"
chroot "$root" "$PYTHON" -m nemotron4 launch install-shim
chroot "$root" bash /scripts/nemo_inference.sh "$model"
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_card_s_scripts_run_unchanged_to_the_printed_answer(tmp_path: Path, model: Path) -> None:
    """In a root, mount and process namespace of its own, because the script ends in ``pkill python``."""
    namespace = ["unshare", "--map-root-user", "--mount", "--pid", "--net"]
    namespace += ["--fork", "--kill-child", "--mount-proc"]
    if subprocess.run([*namespace, "true"], capture_output=True, check=False).returncode != 0:
        pytest.skip("this system gives no namespaces to its users")
    root = tmp_path / "root"
    root.mkdir()
    # Debian's python3 may lack requests; the script's own python finds it by this path.
    site = str(Path(requests.__file__).parents[1])
    values = environment(SLURM_NODEID="0", SLURM_LOCALID="0", CARD=str(CARD), PYTHON=sys.executable)
    values |= {"PYTHONPATH": values["PYTHONPATH"] + os.pathsep + site, "LOOPBACK_UP": LOOPBACK_UP}
    done = subprocess.run(
        [*namespace, "bash", "-c", NAMESPACE, "job", str(root), str(model)],
        env=values,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    text = done.stdout
    assert "server (0.0.0.0:1424) is up running" in text, done.stderr
    prompt = "<extra_id_1>User\nWrite a poem on NVIDIA in the style of Shakespeare\n<extra_id_1>Assistant\n"
    after = text.split(prompt, 1)[1]
    answer = after.split("clean up dameons", 1)[0].strip()
    assert len(answer) > 20
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_two_nodes_of_eight_one_binds_the_others_wait_and_die_with_it(model: Path) -> None:
    port = free_port()
    arguments = [*ENTRY, f"gpt_model_file={model}", *LAYOUT, "server=True", f"port={port}"]
    job = {"SLURM_NTASKS": "16", "SLURM_NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            arguments,
            env=environment(**job, SLURM_NODEID=str(node), SLURM_LOCALID=str(local)),
            stderr=subprocess.DEVNULL,
        )
        for node in range(2)
        for local in range(8)
    ]
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(
                    urllib.request.Request(f"http://127.0.0.1:{port}/", method="PUT"), timeout=5
                )
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                assert time.monotonic() < deadline
                assert processes[0].poll() is None
                time.sleep(0.3)
        body = {"sentences": ["the quick"], "tokens_to_generate": 3, "greedy": True}
        answer = requests.put(f"http://127.0.0.1:{port}/generate", json=body, timeout=30).json()
        assert answer["sentences"][0].startswith("the quick")
        assert listeners(port) == {processes[0].pid}
        assert [process.poll() for process in processes] == [None] * 16
        processes[0].send_signal(signal.SIGKILL)
        assert [process.wait(timeout=15) for process in processes[1:]] == [0] * 15
    finally:
        for process in processes:
            process.kill()
            process.wait()


def listeners(port: int) -> set[int]:
    """Processes that hold a listening socket of the port (Linux)."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    inodes = {row[9] for row in rows if int(row[1].split(":")[1], 16) == port and row[3] == "0A"}
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            links = [os.readlink(fd) for fd in (process / "fd").iterdir()]
        except OSError:
            continue
        if any(link == f"socket:[{inode}]" for link in links for inode in inodes):
            found.add(int(process.name))
    return found


def test_the_port_is_refused_while_another_holds_it(model: Path) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        arguments = [*ENTRY, f"gpt_model_file={model}", "server=True", f"port={held.getsockname()[1]}"]
        done = subprocess.run(
            arguments, env=environment(), capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 1
    assert "cannot listen on 127.0.0.1" in done.stderr


def test_the_web_demo_s_options_become_the_page(capsys: pytest.CaptureFixture[str]) -> None:
    assert page_settings(parse_overrides([])) is None
    chosen = ["web_server=True", "web_port=9000", "username=ann", "password='p w'", "chat=True", "share=True"]
    page = page_settings(parse_overrides(chosen))
    assert page == PageSettings(starts_with="chat", port=9000, login=("ann", "p w"))
    said = capsys.readouterr().err
    assert "http://localhost:9000/" in said
    assert "nothing is tunnelled" in said
    assert "p w" not in said
    default = page_settings(parse_overrides(["web_server=True"]))
    assert default == PageSettings(starts_with="raw", port=9889, login=("test", "test2"))
    assert "default password" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="web_port is 5555; expected an integer other than port"):
        page_settings(parse_overrides(["web_server=True", "web_port=5555"]))
