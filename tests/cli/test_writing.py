"""Every command writes through `retnet_tools.staging`: nothing is opened for writing, removed or renamed elsewhere."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

WATCHED = """
import json, os, sys

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
seen, synced = [], []

def watch(event, arguments):
    if event == "open" and isinstance(arguments[0], (str, bytes)) and (arguments[2] or 0) & WRITES:
        seen.append(("open", os.path.abspath(os.fsdecode(arguments[0]))))
    elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.truncate"):
        seen.append((event, os.path.abspath(os.fsdecode(arguments[1 if event == "os.rename" else 0]))))

fsync = os.fsync
os.fsync = lambda handle: (synced.append(os.readlink(f"/proc/self/fd/{handle}")), fsync(handle))[1]

from retnet_tools.cli import app

codes = []
commands = json.loads(sys.argv[1])
sys.addaudithook(watch)
for command in commands:
    sys.argv = ["retnet-tools", *command]
    try:
        app.main()
    except SystemExit as stop:
        codes.append(stop.code or 0)
    seen.append(("end", command[0]))
sys.stderr.write("WATCHED" + json.dumps([codes, seen, synced]))
"""
HIDDEN = re.compile(r"/\.[^/]+\.((partial|ready|unfinished)(/.*)?|lock)$")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="names of open files")
def test_every_command_writes_through_the_one_writer(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path("fixtures/shakespeare/heldout.txt").read_text()[:9000])
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "To be"}\n{"prompt": "or"}\n')
    model, out, small = (str(tmp_path / name) for name in ("converted", "out", "small"))
    state, plot = str(tmp_path / "a.state"), str(tmp_path / "a.svg")
    gptq = (
        "--method",
        "gptq",
        "--exclude",
        r"layers\.[1-9]|ffn|lm_head",
        "--calibration",
        str(text),
        "--calibration-tokens",
        "512",
    )
    commands = [
        ("convert", "fixtures/shakespeare", model),
        ("convert", "fixtures/shakespeare", model, "--to", "torchscale", "--force"),
        ("export", model, "-o", out),
        ("export", model, "-o", out, "--force", "--to", "genai"),
        ("export", model, "-o", out, "--force"),
        ("quantize", out, "-o", small, "--quantize", "int4", *gptq),
        ("quantize", out, "-o", small, "--force", "--quantize", "int8", "--text", str(text), "--text-tokens", "300"),
        ("generate", small, "-p", "To be", "-n", "2", "--state-out", state),
        ("state", "fork", state, "-o", str(tmp_path / "b.state")),
        ("state", "save", small, "-p", "or", "-o", str(tmp_path / "c.state")),
        *[("generate", small, "--prompts", str(tmp_path / "prompts.jsonl"), "-o", str(tmp_path / "a.jsonl"), "-n", "2")]
        * 2,
        ("perplexity", small, "--text", str(text), "-n", "300", "--plot", plot),
        (
            "bench",
            small,
            "-p",
            "4",
            "-n",
            "2",
            "-r",
            "1",
            "--quick",
            "--plot",
            plot,
            "--force",
            "--folder",
            str(tmp_path),
        ),
    ]
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, json.dumps(commands)], capture_output=True, text=True, check=False
    )
    assert "WATCHED" in done.stderr, done.stderr
    codes, seen, synced = json.loads(done.stderr.partition("WATCHED")[2])
    assert codes == [0] * len(commands), done.stderr.partition("WATCHED")[0]
    outputs, strays = set(), []
    for what, name in seen:
        path = Path(name)
        if tmp_path not in path.parents or path.is_dir() or HIDDEN.search(name) or "retnet-tools-" in name:
            continue
        if what == "os.rename":
            outputs.add(path)
        elif not (what == "open" and path.suffix == ".jsonl") and (what, path.suffix) != ("os.remove", ""):
            strays.append((what, name))
    # What is removed with a name of its own is what a replaced folder no longer has, or its marker.
    removed = {(what, Path(name).name) for what, name in strays if what == "os.remove"}
    assert {(what, name) for what, name in strays if what != "os.remove"} == set()
    assert {name for _, name in removed} <= {
        *("retnet.json", "config.json", "model.safetensors", "step.onnx", "prefill.onnx", "model.onnx"),
        *(
            "decoder.onnx",
            "genai_config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "README.md",
        ),
        *("args.json", "model.pt", "retnet_config.json", "model.safetensors.index.json", "special_tokens_map.json"),
    }
    written = {path.relative_to(tmp_path).parts[0] for path in outputs}
    assert written >= {"converted", "out", "small", "a.state", "b.state", "c.state", "a.svg"}
    names = {Path(name).name for name in synced}
    assert names >= {"weights.data", "step.onnx", "retnet.json", "model.safetensors", "config.json", "a.jsonl"}
    assert names >= {".a.state.partial", ".a.svg.partial", ".small.partial", ".out.partial"}
