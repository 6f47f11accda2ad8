"""The command table: lazy, helpful about typing errors, quiet about interruptions."""

from __future__ import annotations

import errno
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import typer

from nemotron4 import __version__
from nemotron4.cli.commands import COMMANDS, Command
from nemotron4.cli.console import group, print_json
from nemotron4.cli.main import main
from nemotron4.errors import Nemotron4Error

HERE = __name__


def greet(
    name: str,
    times: int = typer.Option(1, min=1),
    json_: bool = typer.Option(False, "--json"),
) -> None:
    """Greet somebody."""
    if json_:
        print_json({"name": name, "times": times})
    else:
        print(f"hello {name} " * times)


def fail() -> None:
    raise Nemotron4Error("7 rows given; expected 8", hint="add one row")


def interrupt() -> None:
    raise KeyboardInterrupt


def fill_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device", "/full/file")


def leave_early() -> None:
    raise typer.Exit(3)


tools = group("Several tools.")


@tools.command()
def hammer(weight_kg: float = 1.0) -> None:
    """Strike."""
    print(f"bang {weight_kg}")


@tools.command()
def saw() -> None:
    """Cut."""


COMMAND_TABLE = {
    "greet": Command(f"{HERE}:greet", "Greet somebody"),
    "fail": Command(f"{HERE}:fail", "Fail"),
    "interrupt": Command(f"{HERE}:interrupt", "Be interrupted"),
    "fill-disk": Command(f"{HERE}:fill_disk", "Fill the disk"),
    "leave-early": Command(f"{HERE}:leave_early", "Leave with status 3"),
    "tools": Command(f"{HERE}:tools", "Several tools"),
    "absent": Command("nemotron4.no_such_module:run", "Would fail if it were imported"),
}


@pytest.fixture(autouse=True)
def importable_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, HERE, sys.modules.get(HERE) or _this_module())


def _this_module() -> object:
    module = type(sys)(HERE)
    module.__dict__.update(globals())
    return module


def _run(*arguments: str) -> int:
    return main(arguments, COMMAND_TABLE)


def test_help_lists_every_command_without_importing_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--help") == 0
    shown = capsys.readouterr().out
    for name, command in COMMAND_TABLE.items():
        assert name in shown
        assert command.help in shown


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run() == 0
    assert "Commands:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("--version") == 0
    assert capsys.readouterr().out == f"nemotron4 {__version__}\n"


def test_command_runs_with_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("greet", "Ada", "--times", "2", "--json") == 0
    assert capsys.readouterr().out == '{"name": "Ada", "times": 2}\n'


def test_command_help_comes_from_its_own_module(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("greet", "--help") == 0
    shown = capsys.readouterr().out
    assert "Usage: nemotron4 greet [OPTIONS]" in shown
    assert "--times" in shown


def test_group_runs_its_sub_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("tools", "hammer", "--weight-kg", "2.5") == 0
    assert capsys.readouterr().out == "bang 2.5\n"


def test_group_without_arguments_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("tools") == 0
    assert "hammer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["gret"], ["unknown command 'gret'", "did you mean 'greet'?"]),
        (["--versoin"], ["unknown option '--versoin'", "did you mean '--version'?"]),
        (["greet", "Ada", "--tines", "2"], ["unknown option '--tines'", "did you mean '--times'?"]),
        (["tools", "hammer", "--weight"], ["unknown option '--weight'", "did you mean '--weight-kg'?"]),
        (["tools", "hamer"], ["no such command 'hamer'", "hammer"]),
        (["greet"], ["missing argument 'name'", "see `nemotron4 greet --help`"]),
        (["greet", "Ada", "--times", "0"], ["'--times'", "greater than or equal to 1"]),
        (["greet", "Ada", "--times", "many"], ["'--times'", "valid integer"]),
        (["greet", "Ada", "--times"], ["requires an argument", "see `nemotron4 greet --help`"]),
    ],
)
def test_wrong_usage_names_the_nearest_and_exits_2(
    arguments: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    for words in expected:
        assert words in captured.err


def test_every_problem_of_a_command_line_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    line = "--port 99999 --frob 3 --dtype bf17 --max-model-len 4 --guard-mode x --max-running abc --context"
    assert main(["serve", *line.split()]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [error.split(": ")[1].split("'")[1] for error in errors] == [
        "--frob",
        "--max-model-len",
        "--context",
        "--port",
        "--dtype",
        "--guard-mode",
        "--max-running",
    ]
    assert main(["eval", "run", "--limit", "x", "--seeed=1"]) == 2
    told = capsys.readouterr().err
    for problem in ("'--seeed'", "'--limit'", "missing argument 'TASK'", "missing option '--out'"):
        assert problem in told, problem


def test_what_only_a_command_can_check_is_told_at_once_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranges are the parser's; names of models and files, and what does not go together, come after it."""
    output = ["-o", str(tmp_path / "no" / "out.jsonl")]
    assert main(["generate", "smolm2", "none.jsonl", *output, "--temperature", "-1", "--top-p", "3"]) == 2
    told = capsys.readouterr().err
    assert "'--temperature'" in told
    assert "'--top-p'" in told
    assert main(["generate", "smolm2", "none.jsonl", *output, "--best", "--logit-bias", "x"]) == 1
    told = capsys.readouterr().err
    for problem in ("--best needs", "'smolm2'", "none.jsonl: cannot be read", "does not exist", "logit_bias"):
        assert problem in told, problem


@pytest.mark.parametrize("words", [["--dtype", "bf16"], ["--dtype", "half"], ["--device", "gpu"]])
def test_values_of_other_tools_are_understood(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "no-such-model", "--port", "0", *words]) == 1
    assert "no model 'no-such-model'" in capsys.readouterr().err


def test_own_errors_print_message_and_hint_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("fail") == 1
    assert capsys.readouterr().err == "error: 7 rows given; expected 8\nhint: add one row\n"


def test_full_disk_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("fill-disk") == 1
    assert capsys.readouterr().err.startswith("error: /full/file: no space left on the disk\nhint: ")


def test_interruption_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert _run("interrupt") == 130
    assert capsys.readouterr().err == ""


def test_exit_status_of_a_command_is_kept() -> None:
    assert _run("leave-early") == 3


def test_a_bug_keeps_its_traceback() -> None:
    with pytest.raises(ModuleNotFoundError):
        _run("absent")


def test_help_loads_neither_torch_nor_a_command_module() -> None:
    program = """
        import sys
        from nemotron4.cli.main import main
        assert main(["--help"]) == 0
        heavy = {"torch", "numpy", "typer", "rich", "fastapi"} & set(sys.modules)
        assert not heavy, heavy
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, stdout=subprocess.DEVNULL)


@pytest.mark.parametrize(
    ("recipe", "error"),
    [
        (None, "recipe.toml: cannot be read: No such file"),
        ("stage = ", "recipe.toml: not valid TOML"),
        ('[data]\ntrain = ["rows.jsonl"]', "rows.jsonl: cannot be read: there is no such file"),
    ],
)
def test_train_tells_a_missing_file_before_it_loads_torch(
    recipe: str | None, error: str, tmp_path: Path
) -> None:
    if recipe is not None:
        (tmp_path / "recipe.toml").write_text(recipe)
    program = """
        import sys
        from nemotron4.cli.main import main
        assert main(["train", "recipe.toml"]) == 1
        assert "torch" not in sys.modules
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert error in done.stderr


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_of_each_command_loads_no_torch(name: str) -> None:
    program = """
        import sys
        from nemotron4.cli.main import main
        assert main([sys.argv[1], "--help"]) == 0
        assert "torch" not in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program), name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: nemotron4" in done.stdout


def test_a_reader_that_leaves_early_causes_no_message(tmp_path: Path) -> None:
    program = tmp_path / "chatter.py"
    program.write_text(
        textwrap.dedent(
            """
            import sys
            from nemotron4.cli.commands import Command
            from nemotron4.cli.main import main

            def chatter() -> None:
                while True:
                    print("x" * 1000)

            if __name__ == "__main__":
                sys.modules["chatter"] = sys.modules["__main__"]
                sys.exit(main(["chatter"], {"chatter": Command("chatter:chatter", "Write for ever")}))
            """
        )
    )
    with subprocess.Popen(
        [sys.executable, str(program)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=30) != 0
        assert process.stderr.read() == b""


@pytest.mark.parametrize(
    "arguments", [("-h",), ("help",), ("greet", "-h"), ("help", "greet"), ("tools", "hammer", "-h")]
)
def test_help_is_found_under_its_usual_names(
    arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(*arguments) == 0
    assert "Usage: nemotron4" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["serve", "smollm2", "--lora-path", "x"], "hint: here it is --adapter"),
        (["serve", "smollm2", "--tp", "2"], "hint: here it is --tensor-parallel"),
        (
            ["serve", "--model", "smollm2"],
            "hint: here MODEL is given without an option: nemotron4 serve MODEL",
        ),
        (["chat", "smollm2", "--n-predict", "9"], "hint: here it is --max-new-tokens"),
        (["chat", "smollm2", "--top_k", "9"], "unknown option '--top_k'"),
        (["serve", "smollm2", "-ngl", "99", "-fa", "-c", "9"], "option '-ngl'\nhint: here it is --device"),
        (["serve", "smollm2", "-ngl", "99", "-fa"], "option '-fa'\nhint: leave it out"),
        (["serve", "smollm2", "--trust-remote-code"], "hint: leave it out: code that comes with"),
        (["serve", "smollm2", "--seed", "1"], "hint: leave it out: a request brings its own seed"),
        (["generate", "smollm2", "--prompt", "Hi"], "hint: here INPUT is given without an option"),
        (["serve", "smollm2", "--tool-call-parser", "hermes"], "hint: here it is --tool-format"),
        (["eval", "run", "--tasks", "mmlu"], "hint: here TASK is given without an option"),
        (["eval", "run", "mmlu", "--num_fewshot", "5"], "hint: here it is --num-fewshot"),
        (["eval", "--tasks", "mmlu"], "hint: give a command first: list, score, run"),
        (["train", "sft.toml", "--per_device_train_batch_size", "8"], "here it is batch.row_tokens"),
        (["run", "smollm2"], "hint: here it is nemotron4 chat MODEL"),
        (["list"], "hint: here it is nemotron4 models list"),
        (["lm_eval"], "hint: here it is nemotron4 eval run"),
        (["grpo"], "hint: here it is nemotron4 train --new grpo"),
    ],
)
def test_other_tools_options_are_answered_with_ours(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert hint in capsys.readouterr().err


def test_what_the_system_refuses_is_one_line_with_the_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch_nowhere() -> None:
        (tmp_path / "absent" / "file").write_text("x")

    this = sys.modules[HERE]
    monkeypatch.setattr(this, "touch_nowhere", touch_nowhere, raising=False)
    table = {"touch": Command(f"{HERE}:touch_nowhere", "Write a file")}
    assert main(["touch"], table) == 1
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/absent/file: no such file or directory\n"
        "hint: check the path; a missing folder is not made for you\n"
    )


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["gr"], "greet"),
        (["tools", "ha"], "hammer"),
        (["greet", "Ada", "--ti"], "--times"),
        (["nothing", "--"], ""),
    ],
)
def test_a_shell_is_told_what_the_last_word_may_become(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run("--complete", *words) == 0
    assert capsys.readouterr().out.strip() == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_completion_script_is_printed_for_each_shell(
    shell: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["completion", shell]) == 0
    assert "nemotron4 --complete" in capsys.readouterr().out
