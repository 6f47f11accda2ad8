"""Batch scripts: what they ask for, that bash and shellcheck accept them, and what is refused before."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron4.cli.main import main
from nemotron4.cluster.slurm import SlurmJob, serve_script, synth_script, train_script
from nemotron4.errors import ConfigError
from tests.tiny_models import nemotron_directory

GPUS = SlurmJob(name="job", nodes=2, gpus_per_node=8, account="me", partition="batch")
ONE = SlurmJob(name="job", gpus_per_node=1, container="image:tag", mounts=("/a b:/c",))
SCRIPTS = {
    "serve": serve_script(ONE, ["my model", "--port", "1424"]),
    "train": train_script(GPUS, ["recipe.toml", "parallel.data=16", "name=it's"]),
    "synth": synth_script(SlurmJob(name="job", gpus_per_node=0), "recipe.toml", "/out dir", shards=64),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_clean(name: str, tmp_path: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    path = tmp_path / "job.sh"
    path.write_text(SCRIPTS[name])
    subprocess.run(["bash", "-n", str(path)], check=True)
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def run_with_fakes(script: str, folder: Path, **variables: str) -> list[list[str]]:
    """Run a script with srun and scontrol that only note their arguments."""
    for name, body in {
        "srun": 'printf "%s\\n" "$@" >> "$LOG"; echo -- >> "$LOG"',
        "scontrol": "printf 'gpu1\\n'; sleep 0.2; printf 'gpu2\\n'",
    }.items():
        path = folder / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
    log = folder / "log"
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "LOG": str(log)} | variables
    subprocess.run(["bash", "-c", script], env=environment, check=True, timeout=20)
    return [call.split("\n")[:-1] for call in log.read_text().split("--\n")[:-1]]


def test_training_starts_one_launcher_with_the_right_arguments(tmp_path: Path) -> None:
    script = SCRIPTS["train"]
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=8" in script
    [call] = run_with_fakes(script, tmp_path, SLURM_JOB_NODELIST="gpu[1-2]", SLURM_JOB_ID="77")
    assert call[:2] == ["--kill-on-bad-exit=1", "python3"]
    assert "--nnodes=2" in call
    assert "--nproc-per-node=8" in call
    assert "--rdzv-endpoint=gpu1:29500" in call
    assert call[-5:] == ["nemotron4", "train", "recipe.toml", "parallel.data=16", "name=it's"]


def test_a_shard_gets_its_own_folder_and_number(tmp_path: Path) -> None:
    script = SCRIPTS["synth"]
    assert "#SBATCH --array=0-63" in script
    assert "--gpus-per-node" not in script
    [call] = run_with_fakes(script, tmp_path, SLURM_ARRAY_TASK_ID="5")
    assert call[-4:] == ["--out", "/out dir/shard-5", "--shard", "5/64"]


def test_serving_runs_in_the_container(tmp_path: Path) -> None:
    [call] = run_with_fakes(SCRIPTS["serve"], tmp_path)
    assert call[1:3] == ["--container-image=image:tag", "--container-mounts=/a b:/c"]
    assert call[-4:] == ["serve", "my model", "--port", "1424"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"nodes": 0}, "nodes is 0"),
        ({"time": "soon"}, "time is 'soon'"),
        ({"account": "me; rm -rf /"}, "account is 'me; rm"),
        ({"mounts": ("a:b",)}, "without a container"),
    ],
)
def test_settings_that_slurm_would_misread_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SlurmJob(name="job", **changes)  # type: ignore[arg-type]


def test_the_command_checks_the_processes_of_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "sft.toml"
    recipe.write_text("[parallel]\ntensor = 8\n")
    arguments = ["launch", "slurm", str(recipe), "--job", "train", "--nodes", "2", "--gpus-per-node", "8"]
    assert main(arguments) == 1
    assert "= 8 processes, but the job has 16 GPUs" in capsys.readouterr().err
    assert main([*arguments, "parallel.data=2"]) == 0
    assert "parallel.data=2" in capsys.readouterr().out
    assert main(["launch", "slurm", str(tmp_path / "none.toml"), "--job", "train"]) == 1


def test_the_command_checks_that_the_model_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nemotron_directory(tmp_path / "m")
    assert main(["launch", "slurm", str(model)]) == 0
    assert f"serve {model} --host 0.0.0.0 --port 1424" in capsys.readouterr().out
    job = ["launch", "slurm", str(model), "--nodes", "2", "--gpus-per-node", "2"]
    assert main(job) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n#SBATCH --gpus-per-node=2\n" in script
    assert "--engine vllm --tensor-parallel 2 --pipeline-parallel 2 --nodes 2" in script
    assert main([*job, "--pipeline-parallel", "1"]) == 1
    assert "tensor_parallel 2 x pipeline_parallel 1 use 2 GPUs; the job has 4" in capsys.readouterr().err


def test_submit_hands_the_script_to_sbatch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "synth.toml"
    recipe.write_text("")
    arguments = ["launch", "slurm", str(recipe), "--job", "synth", "--out", str(tmp_path), "--submit"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(arguments) == 1
    assert "sbatch is not on this machine" in capsys.readouterr().err
    fake = tmp_path / "sbatch"
    fake.write_text('#!/bin/bash\nread -r first; echo "Submitted batch job 7 ($first)"\n')
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert main(arguments) == 0
    assert capsys.readouterr().out == "Submitted batch job 7 (#!/bin/bash)\n"


def test_the_script_ends_after_the_server_that_it_told_to_end(tmp_path: Path) -> None:
    """Slurm ends what still runs when the script is over."""
    server = tmp_path / "srun"
    server.write_text(
        '#!/bin/bash\ntrap \'sleep 0.7; touch "$0.ended"; exit 0\' TERM\ntouch "$0.started"\n'
        "while :; do sleep 0.05; done\n"
    )
    server.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    with subprocess.Popen(["bash", "-c", SCRIPTS["serve"]], env=environment) as script:
        while not (tmp_path / "srun.started").exists():
            time.sleep(0.02)
        script.terminate()
        script.wait(timeout=20)
        assert (tmp_path / "srun.ended").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["name=1"], "settings is given for --job serve"),
        (["--job", "train", "--context", "9"], "context is given for --job train"),
        (["--job", "train", "--out", "x"], "out is given for --job train"),
    ],
)
def test_what_the_job_does_not_read_is_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["launch", "slurm", "recipe.toml", *arguments]) == 1
    assert message in capsys.readouterr().err
