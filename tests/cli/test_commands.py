"""count and plan: the paper's numbers, JSON for programs, one line for every mistake."""

import io
import json
import os
import shlex
import subprocess
import sys

import pytest
from rich.console import Console

import tinylora_lite as tl
from tinylora_lite.cli import COMMANDS, build_parser, main, shared
from tinylora_lite.planning.shapes import model_config


def run_json(capsys, *argv: str) -> dict:
    assert main([*argv, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return json.loads(captured.out)


def count(capsys, model: str, **options) -> int:
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return run_json(capsys, "count", model, *flags)["parameters"]


@pytest.mark.parametrize(("n_tie", "expected"), [(1, 196), (2, 98), (8, 25), (16, 13), (32, 7), (196, 1), ("all", 1)])
def test_counts_of_the_paper(capsys, n_tie, expected):
    assert count(capsys, "qwen2.5-7b", method="tinylora", u=1, n_tie=n_tie) == expected


def test_structured_tying(capsys):
    assert count(capsys, "qwen2.5-3b", method="tinylora", n_tie=8, tying="structured") == 35


def test_one_method_in_words(capsys):
    assert main(["count", "qwen2.5-7b", "--method", "tinylora", "--u", "1", "--n-tie", "16"]) == 0
    out = capsys.readouterr().out
    assert out == "qwen2.5-7b, tinylora (u=1, n_tie=16, tying=tiled): 13 parameters, 26 bytes as bfloat16\n"


def test_all_methods(capsys):
    rows = run_json(capsys, "count", "qwen2.5-7b")["methods"]
    assert {row["method"] for row in rows} == {"full", "lora", "vera", "lora_xs", "tinylora"}
    lora = next(row for row in rows if row["settings"] == {"rank": 1})
    assert (lora["parameters"], lora["bytes"]) == (2_523_136, 5_046_272)


def test_the_table_holds_all_methods(capsys):
    assert main(["count", "qwen2.5-7b"]) == 0
    out = capsys.readouterr().out
    for text in ("full", "lora_xs", "vera", "2,523,136", "5.05 MB", "26 bytes", "15.23 GB"):
        assert text in out


def test_values_as_a_table_shows_them(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    values = {"count": 12345, "share": 0.123456, "shared": True, "vectors": list(range(1000, 1011)), "none": None}
    console = Console(file=io.StringIO())
    console.print(shared.described(values), shared.table([{"name": "a", "n": 7}, {"name": "b", "n": 12345}]))
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    eight = "1,000 1,001 1,002 1,003 1,004 1,005 1,006 1,007"
    assert lines[:4] == ["count 12,345", "share 0.1235", "shared yes", f"vectors {eight} and 3 more"]
    assert "b 12,345" in lines


def test_plan(capsys):
    result = run_json(capsys, "plan", "qwen2.5-7b", "--budget", "13", "--seed", "7")
    assert result["parameters"] == 13
    assert result["settings"] == {"rank": 2, "u": 1, "n_tie": 16, "tying": "tiled", "seed": 7}


def test_the_planned_line_is_python(capsys):
    assert main(["plan", "qwen2.5-3b", "--budget", "20"]) == 0
    words, line = capsys.readouterr().out.splitlines()
    assert words == "20 parameters on qwen2.5-3b, 40 bytes as bfloat16:"
    assert eval(line) == tl.plan(model_config("qwen2.5-3b"), 20)


def test_a_model_of_ones_own(capsys, tmp_path):
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=5, hidden_size=64, intermediate_size=96, vocab_size=100).save_pretrained(tmp_path)
    assert count(capsys, str(tmp_path), method="tinylora") == 35


@pytest.mark.parametrize(
    ("argv", "code", "reason"),
    [
        ([], 2, "required: COMMAND"),
        (["teach"], 2, "invalid choice: 'teach'"),
        (["count"], 2, "required: MODEL"),
        (["count", "nano", "--method", "magic"], 2, "invalid choice: 'magic'"),
        (["count", "nano", "--n-tie", "some"], 2, '--n-tie: must be an integer or "all", not some'),
        (["count", "nano", "--seed", "x"], 2, "--seed: a seed is an integer from 0 to 4294967295, not x"),
        (["plan-run", "nano", "--price", "0"], 2, "--price: must be at least 0.01, not 0"),
        (["plan-run", "nano", "--price", "nan"], 2, "--price: must be at least 0.01, not nan"),
        (["plan-run", "nano", "--length", "-5"], 2, "--length: must be at least 1, not -5"),
        (["plan-run", "nano", "--problems", "0"], 2, "--problems: must be at least 1, not 0"),
        (["plan", "nano"], 2, "required: --budget"),
        (["plan", "nano", "--budget", "few"], 2, "--budget"),
        (["plan", "nano", "--budget", "13", "--seed", "-1"], 2, "a seed is an integer"),
        (["count", "gpt-9"], 1, "no configuration of gpt-9"),
        (["count", "nano", "--u", "3"], 1, "--u is no setting of all methods; choose one with --method"),
        (["count", "nano", "--u", "0"], 1, "--u is no setting of all methods"),
        (["count", "nano", "--method", "lora"], 1, '"lora" needs rank='),
        (["count", "nano", "--method", "full", "--rank", "2"], 1, "--rank is no setting of full"),
        (["count", "nano", "--method", "tinylora", "--u", "0"], 1, "u must be"),
        (["plan", "nano", "--budget", "0"], 1, "budget=0"),
        (["demo", "--steps", "0"], 1, "steps must be"),
        (["demo", "--problems", "0"], 2, "--problems: must be at least 1, not 0"),
    ],
)
def test_mistakes_take_one_line(capsys, argv, code, reason):
    try:
        found = main(argv)
    except SystemExit as stop:
        found = stop.code
    captured = capsys.readouterr()
    assert (found, captured.out) == (code, "")
    assert reason in captured.err
    assert captured.err.startswith("tinylora")
    assert captured.err.count("\n") == 1


def test_a_terminal_that_lacks_the_characters():
    script = (
        "import sys; from tinylora_lite.cli import main, plan; plan.run = lambda _: print('\\u28ff', 'done'); "
        "sys.exit(main(['plan', 'nano', '--budget', '13']))"
    )
    environment = os.environ | {"PYTHONIOENCODING": "cp1252"}
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert (found.returncode, found.stdout, found.stderr) == (0, "? done\n", "")


def test_work_that_fails_in_torch_takes_one_line(capsys, monkeypatch):
    def exhausted(_):
        raise RuntimeError("out of memory\ntry less")

    monkeypatch.setattr("tinylora_lite.cli.plan.run", exhausted)
    assert main(["plan", "nano", "--budget", "13"]) == 1
    assert capsys.readouterr().err == "tinylora plan: error: out of memory try less\n"


def test_interruption(capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("tinylora_lite.cli.demo.run_demo", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "tinylora demo: stopped before the end\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_holds_an_example_that_parses(capsys, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    assert "--seed" in out
    assert "--json" in out
    example = shlex.split(out.split("example:\n")[1].split(">")[0])
    assert build_parser(command).parse_args(example[1:]).command == command


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert all(f" {name} {summary}" in out for name, (_, summary) in COMMANDS.items())


LIGHT = """
import json, os, sys
from tinylora_lite.cli import main

try:
    main(sys.argv[1:])
except SystemExit:
    pass
seconds = os.times().user + os.times().system
print(json.dumps([seconds, [name for name in ("torch", "transformers") if name in sys.modules]]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("words", "most"),
    [(["--version"], 0.5), (["--help"], 1.0), (["preset"], 1.5), *(([name, "--help"], 1.0) for name in COMMANDS)],
)
def test_what_needs_no_torch_does_not_wait_for_it(words, most):
    done = subprocess.run([sys.executable, "-c", LIGHT, *words], capture_output=True, text=True, check=True)
    seconds, heavy = json.loads(done.stderr)
    assert heavy == []
    assert seconds < 2 * most, "of the processor; twice the target, for a busy machine"


def test_as_a_module():
    found = subprocess.run([sys.executable, "-m", "tinylora_lite", "--version"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, f"tinylora {tl.__version__}\n")


def test_a_reader_that_leaves_early():
    command = f"{sys.executable} -m tinylora_lite count nano | true; exit ${{PIPESTATUS[0]}}"
    found = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert "Traceback" not in found.stderr
    assert "Exception" not in found.stderr
