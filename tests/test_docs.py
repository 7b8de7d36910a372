"""What README.md, docs/ and examples/ show works as it stands: commands run and print what is shown, Python runs."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path

import pytest

from retnet_tools.formats import FORMATS
from tests.test_architecture import WAY

ROOT = Path(__file__).parent.parent
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]}
WRITTEN = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
LINKS = [
    (page.relative_to(ROOT).as_posix(), link)
    for page in WRITTEN
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text(encoding="utf-8"))
]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]\d+)?")
GENERATED = {"generate", "state load"}
"""Commands whose text is the model's, which differs from processor to processor where it is drawn."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def shown(page: str) -> list[tuple[str, list[str]]]:
    """The commands of a page in their order, each with the lines of output below it."""
    commands: list[tuple[str, list[str]]] = []
    for line in "".join(blocks(page, "console")).splitlines():
        if line.startswith("$ "):
            commands.append((line.removeprefix("$ "), []))
        elif line.strip():
            commands[-1][1].append(line)
    return commands


def without_numbers(line: str) -> str:
    return " ".join(NUMBER.sub("#", line).split())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a reader stands: the checkpoint and the fixtures of the source tree."""
    for name in ("ckpt", "fixtures"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [name for name in PAGES if blocks(name, "console") or blocks(name, "python")])
def test_a_page_does_what_it_shows(page: str, folder: Path, cli, capsys) -> None:
    for command, lines in shown(page):
        name, *words = shlex.split(command, comments=True)
        assert name == "retnet-tools", command
        result = cli(*words)
        assert result.exit_code == 0, f"{command}: {result.err}"
        if " ".join(words[: 2 if words[0] == "state" else 1]) not in GENERATED:
            printed = {without_numbers(line) for line in (result.out + result.err).splitlines()}
            missing = [line for line in lines if without_numbers(line) not in printed]
            assert not missing, f"{command} does not print {missing} but {result.out}"
    for code in blocks(page, "python"):
        if "onnxruntime_genai" in code:
            pytest.importorskip("onnxruntime_genai")
        exec(compile(code, page, "exec"), {"__name__": page})
        assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: Path, folder: Path, cli, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    target = "genai" if "genai" in example.stem else "onnx"
    if target == "genai":
        pytest.importorskip("onnxruntime_genai")
    assert cli("export", "ckpt/", "--to", target).exit_code == 0
    monkeypatch.setattr("sys.argv", [str(example), f"ckpt-{target}"])
    runpy.run_path(str(example), run_name="__main__")
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("page", "link"), LINKS, ids=str)
def test_a_link_leads_somewhere(page: str, link: str) -> None:
    name, _, place = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    assert target.exists()
    if place:
        headings = re.findall(r"^#+ (.+)$", target.read_text(encoding="utf-8"), re.MULTILINE)
        assert place in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_option_that_is_named_exists(cli) -> None:
    commands = [c for c in re.findall(r"^  ([a-z]+) ", cli("--help").out, re.MULTILINE) if c != "state"]
    commands += [f"state {name}" for name in re.findall(r"^  ([a-z]+) ", cli("state", "--help").out, re.MULTILINE)]
    known = {option for name in commands for option in re.findall(r"--[a-z][a-z-]+", cli(*name.split(), "--help").out)}
    known |= set(re.findall(r"--[a-z][a-z-]+", cli("--help").out))
    others = {"--evaluate", "--list", "--no-deps"}  # of programs in benchmarks/ and fixtures/
    for trial in (ROOT / "tests" / "trials").glob("*.py"):
        others |= set(re.findall(r'add_argument\("(--[a-z-]+)"', trial.read_text(encoding="utf-8")))
    for page, text in PAGES.items():
        lines = [line for line in text.splitlines() if "benchmarks/" not in line]
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", "\n".join(lines)))
        assert named <= known | others, f"{page}: {sorted(named - known - others)}"


def test_contributing_lists_the_way_that_an_export_takes() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = text.partition("<!-- way -->")[2].partition("<!-- /way -->")[0]
    assert re.findall(r"`(\w+)`", steps) == WAY.split()


def test_contributing_names_files_that_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.[a-z]+)?)`", text):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "retnet_tools")), name


def test_the_readme_is_short() -> None:
    assert len(PAGES["README"].splitlines()) < 150


def test_every_layout_is_in_the_table_with_what_is_done_with_it() -> None:
    rows = {}
    for line in PAGES["formats"].splitlines():
        if match := re.fullmatch(r"\| `([a-z][a-z-]+)` \|.*\| (\S[^|]*) \| (\S[^|]*) \|", line):
            rows[match[1]] = match[2].strip(), match[3].strip()
    assert set(rows) == {spec.name for spec in FORMATS}
    for spec in FORMATS:
        read, written = rows[spec.name]
        assert read == "yes"
        assert (spec.write is not None) == written.startswith("yes")
