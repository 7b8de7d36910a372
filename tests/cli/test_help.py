"""What `--help` shows is complete and comes at once; its examples, and completion, work."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from retnet_tools.cli.command import MAX_THREADS
from tests.commands import PROGRAM, parse

COMMANDS = [((name,), command) for name, command in PROGRAM.commands.items() if not hasattr(command, "commands")]
COMMANDS += [(("state", name), command) for name, command in PROGRAM.commands["state"].commands.items()]
NAMES = [words for words, _ in COMMANDS]
RETNET_TOOLS = [sys.executable, "-m", "retnet_tools.cli.app"]


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[" ".join(words) for words in NAMES])
def test_every_option_is_in_a_panel_with_its_default(words: tuple[str, ...], command, cli) -> None:
    text = cli(*words, "--help").out
    for param in command.params:
        assert all(name in text for name in (param.opts if param.param_type_name == "option" else []))
    panels = dict(re.findall(r"^([A-Z]\w+):\n((?:  .*\n)+)", text, re.MULTILINE))
    assert list(panels)[-2:] == ["Anywhere", "Examples"]
    assert "-h, --help  " in panels["Anywhere"]
    for flags in ("-q, --quiet", "-v, --verbose", "--debug", "-h, --help"):
        assert text.count(flags) == 1
    assert "<str>" not in text


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[" ".join(words) for words in NAMES])
def test_every_command_has_examples_that_parse(words: tuple[str, ...], command, cli) -> None:
    lines = command.epilog.splitlines()
    assert lines
    for line in lines:
        assert line.startswith(" ".join(("retnet-tools", *words)))
        parse(line)
    assert cli(*words, "--help").out.endswith("\n\nExamples:\n" + "".join(f"  {line}\n" for line in lines))


@pytest.mark.parametrize(("words", "command"), COMMANDS, ids=[" ".join(words) for words in NAMES])
def test_a_value_is_written_as_it_is_typed(words: tuple[str, ...], command, cli) -> None:
    text = " ".join(cli(*words, "--help").out.split())
    assert not re.search(r"\b(Onnx|Genai|Fp32|Fused|Canonical)\b|default: float", text)


def test_the_options_of_a_command_come_first_and_what_to_quantize_to_before_how(cli) -> None:
    text = cli("export", "--help").out
    assert re.findall(r"^([A-Z]\w+):$", text, re.MULTILINE)[:2] == ["Arguments", "Options"]
    assert text.index("--quantize TEXT") < text.index("--block-size")


def test_the_program_shows_its_commands_in_panels(cli) -> None:
    text = cli().out
    panels = re.findall(r"^([A-Z]\w+):\n((?:  .*\n)+)", text, re.MULTILINE)
    names = [name for name, _ in panels]
    assert (names[:3], names[-2:]) == (["Checkpoints", "Exports", "Numbers"], ["Anywhere", "Examples"])
    shown = {line.split()[0] for _, lines in panels[:3] for line in lines.splitlines() if line[2] != " "}
    assert shown == set(PROGRAM.commands)
    assert cli("--help").out == text


def test_help_imports_nothing_that_takes_long() -> None:
    code = "import sys; from retnet_tools.cli.app import app, main; sys.argv[1:] = ['export', '--help']\ntry: main()\n"
    code += "finally: print(sorted({'rich', 'numpy', 'torch', 'onnxruntime'} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.endswith("\n[]\n")


def test_help_takes_a_quarter_of_a_second_of_the_processor() -> None:
    best = 1.0
    for words in 5 * [["--help"], ["export", "--help"]]:
        before = os.times()
        subprocess.run([*RETNET_TOOLS, *words], check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        best = min(best, after.children_user + after.children_system - before.children_user - before.children_system)
    assert best < 0.25


@pytest.mark.parametrize(
    ("shell", "words"), [("bash", "complete -o default -F"), ("zsh", "#compdef"), ("fish", "complete --command")]
)
def test_completion_can_be_shown(shell: str, words: str) -> None:
    # Else it is for the shell that all this was started from, if there is one.
    named = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [*RETNET_TOOLS, "--show-completion", shell]
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=named)
    assert "_RETNET_TOOLS_COMPLETE=" in found.stdout
    assert words in found.stdout


@pytest.mark.parametrize(
    ("line", "expected"),
    [("retnet-tools exp", {"export"}), ("retnet-tools generate --te", {"--temperature", "--temp"})],
)
def test_completion_completes(line: str, expected: set[str]) -> None:
    words = {"_RETNET_TOOLS_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    found = subprocess.run(RETNET_TOOLS, capture_output=True, text=True, env=os.environ | words)
    assert set(found.stdout.split()) == expected


@pytest.mark.parametrize(
    "words", ["verify", "perplexity ckpt/ --text play.txt", "generate out/", "state save out/ -o x"]
)
def test_more_threads_than_a_machine_can_take_are_refused(words: str) -> None:
    parse(f"retnet-tools {words} --threads {MAX_THREADS}")
    with pytest.raises(Exception, match=rf"threads|{MAX_THREADS}"):
        parse(f"retnet-tools {words} --threads {MAX_THREADS + 1}")
