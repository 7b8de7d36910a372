"""Commands that write, killed at random moments and on full disks: outputs are whole or absent, and can be made again.

    python -m tests.trials.kills --kills 200 --disks 40 --seed 1

Each trial runs a command in a process of its own, SIGKILLs it somewhere between its first byte and its last (or while
it computes), and looks at what is there: the old output untouched, the new one with the hashes of an undisturbed run,
or one that says that it is unfinished. Then the same command has to succeed, and to leave nothing else behind. Disks
are tmpfs of a random size where one can be mounted, else a limit on the size of files.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from retnet_tools.cli import app
from retnet_tools.config import RetNetConfig
from retnet_tools.console import progress_bar
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.paper import paper_config
from tests.helpers import random_source

CONFIG: RetNetConfig = paper_config(
    vocab_size=256, hidden_size=128, value_dim=256, ffn_dim=256, num_layers=3, num_heads=2
)
POLL = 0.0002
PROMPTS = "".join(json.dumps({"tokens": [n % 256, 7, n * 5 % 256]}) + "\n" for n in range(24))


@dataclass(frozen=True)
class Job:
    """A command that writes.

    Attributes:
        arguments: of the command, `{target}` for the output, `{inputs}` for what it reads.
        target: the output's name.
        marker: the file that says that a folder is whole; None where the output is a file.
        resumes: whether it goes on where it was stopped, so that part of it may be there.
    """

    arguments: tuple[str, ...]
    target: str
    marker: str | None = None
    resumes: bool = False


JOBS = {
    "convert": Job(("convert", "{inputs}/model", "{target}", "--max-shard-size", "500KB"), "out", "config.json"),
    "export": Job(("export", "{inputs}/model", "-o", "{target}"), "out", "retnet.json"),
    "quantize": Job(("quantize", "{inputs}/float", "-o", "{target}", "--quantize", "int4"), "out", "retnet.json"),
    "generate": Job(
        (
            "generate",
            "{inputs}/float",
            "--token-ids",
            "--prompts",
            "{inputs}/prompts.jsonl",
            "-o",
            "{target}",
            "-n",
            "6",
        ),
        "out.jsonl",
        resumes=True,
    ),
    "state": Job(("state", "save", "{inputs}/float", "--token-ids", "-p", "1 2 3 4", "-o", "{target}"), "a.state"),
}


def run(
    arguments: Sequence[str], errors: Path, prepare: Callable[[], None] = lambda: None, modules: Path | None = None
) -> int:
    """Start `retnet-tools` in a fork of this process; gives its process id.

    Args:
        modules: where to leave the names of what it imported.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        prepare()
        sys.argv = ["retnet-tools", *arguments]
        for number, path in ((1, os.devnull), (2, str(errors))):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        app.main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0
    finally:
        if modules is not None:
            modules.write_text("\n".join(sys.modules))
        os._exit(code)


def finish(pid: int) -> int:
    """The exit code of a process; minus a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def hashes(path: Path) -> dict[str, str]:
    """sha256 of an output's files by name; nothing where there is none."""
    files = [path] if path.is_file() else sorted(path.iterdir()) if path.is_dir() else []
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files if not file.name.startswith(".")}


def hidden(folder: Path) -> list[str]:
    """What is left behind, anywhere in a folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


class Trial:
    """One job in a folder of its own."""

    def __init__(self, name: str, inputs: Path, folder: Path, expected: dict[str, str], *, old: bool) -> None:
        self.job, self.folder, self.expected = JOBS[name], folder, expected
        self.target = folder / self.job.target
        self.errors = inputs / "stderr"
        words = [word.format(target=self.target, inputs=inputs) for word in self.job.arguments]
        self.arguments = [*words, *(["--force"] if old and not self.job.resumes else [])]
        if old and not self.job.resumes:
            self._put_old(inputs / "old" / name / self.job.target)
        self.before = hashes(self.target)

    def _put_old(self, old: Path) -> None:
        shutil.copytree(old, self.target) if old.is_dir() else shutil.copyfile(old, self.target)

    def problem(self) -> str:
        """What is wrong with what an interrupted run left; nothing where all is well."""
        found = hashes(self.target)
        if not found or found in (self.before, self.expected):
            return ""
        if self.job.resumes:
            lines = self.target.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines if line.endswith(b"\n")]
            good = len(lines) - len(whole) <= 1 and all(json.loads(line)["index"] == i for i, line in enumerate(whole))
            return "" if good else "answers that are not the first ones"
        if self.job.marker is not None and self.job.marker not in found:
            return ""
        return f"neither old nor new nor unfinished: {sorted(found)}"

    def again(self) -> str:
        """Run the command again; what is wrong then."""
        if not self.target.exists() or not hashes(self.target):
            arguments = [word for word in self.arguments if word != "--force"]
        else:
            arguments = [*self.arguments, *([] if "--force" in self.arguments or self.job.resumes else ["--force"])]
        if code := finish(run(arguments, self.errors)):
            return f"a rerun ended with {code}: {self.errors.read_text().strip()}"
        if hashes(self.target) != self.expected:
            return "a rerun wrote something else"
        return f"left behind: {left}" if (left := hidden(self.folder)) else ""


@dataclass(frozen=True)
class Undisturbed:
    """What a job does when nobody disturbs it.

    Attributes:
        hashes: of what it writes.
        start, end: seconds to its first byte on the disk, and to its end.
    """

    hashes: dict[str, str]
    start: float
    end: float


def make_inputs(folder: Path, seed: int) -> None:
    """A checkpoint, an export and prompts."""
    folder.mkdir()
    write_canonical(folder / "model", CONFIG, random_source(CONFIG, seed))
    (folder / "prompts.jsonl").write_text(PROMPTS)
    _succeed(("export", f"{folder}/model", "-o", f"{folder}/float"), folder / "stderr")


def run_jobs(inputs: Path, out: Path) -> dict[str, Undisturbed]:
    """Run each job once, into a folder of its name. What they import is imported here then, so that a fork of this
    process is at its work at once.
    """
    done = {}
    for name, job in JOBS.items():
        place = out / name
        place.mkdir(parents=True)
        words = [word.format(target=place / job.target, inputs=inputs) for word in job.arguments]
        began = start = time.monotonic()
        pid = run(words, inputs / "stderr", modules=inputs / "modules")
        while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            if start == began and hidden(place):
                start = time.monotonic()
            time.sleep(POLL)
        assert finish(pid) == 0, (inputs / "stderr").read_text()
        for module in (inputs / "modules").read_text().split():
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        done[name] = Undisturbed(hashes(place / job.target), start - began, time.monotonic() - began)
    return done


def _succeed(words: Sequence[str], errors: Path) -> None:
    assert finish(run(words, errors)) == 0, errors.read_text()


def kill(trial: Trial, pick: random.Random, usual: Undisturbed) -> bool:
    """Start the command and kill it; whether it was still running.

    One in five is killed at any moment, the others while something of theirs is on the disk.
    """
    pid = run(trial.arguments, trial.errors)
    delay = pick.random() * usual.end
    if pick.random() < 0.8:
        while not hidden(trial.folder) and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(POLL)
        delay = pick.random() * (usual.end - usual.start)
    time.sleep(delay)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return finish(pid) == -signal.SIGKILL


def limit_files(size: int) -> None:
    """Let no file grow past a size: the system's error is that of a full disk, for this process alone."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[bool]:
    """A file system of a size at a folder; False where none can be mounted."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    mounted = (
        shutil.which("mount") is not None and subprocess.run(command, capture_output=True, check=False).returncode == 0
    )
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(trial: Trial, size: int, mounted: bool) -> str:
    """Run a command on a disk of that size; what is wrong."""
    prepare = (lambda: None) if mounted else (lambda: limit_files(size))
    code = finish(run(trial.arguments, trial.errors, prepare))
    told = trial.errors.read_text().strip()
    if code == 0:
        return "" if hashes(trial.target) == trial.expected else "wrote something else"
    if code != 1 or told.count("\n") or "error: " not in told:
        return f"exit code {code}: {told}"
    left = [name for name in hidden(trial.folder) if not name.endswith(".lock")]
    return trial.problem() or (f"left behind: {left}" if left else "")


def main() -> int:
    """Run the trials, say what failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--disks", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    pick, failures, seen = random.Random(options.seed), [], Counter[str]()
    with tempfile.TemporaryDirectory(prefix="retnet-tools-kills-") as scratch, progress_bar() as progress:
        inputs, other = Path(scratch) / "inputs", Path(scratch) / "other"
        for place, seed in ((other, 2), (inputs, 1)):
            make_inputs(place, seed)
        run_jobs(other, inputs / "old")
        usual = run_jobs(inputs, inputs / "expected")
        number = 0
        while number < options.kills:
            progress("kills", number, options.kills + options.disks)
            name, folder = pick.choice(list(JOBS)), Path(tempfile.mkdtemp(dir=scratch))
            trial = Trial(name, inputs, folder, usual[name].hashes, old=pick.random() < 0.5)
            running = kill(trial, pick, usual[name])
            state = "new" if hashes(trial.target) == trial.expected else "old" if trial.before else "none or part"
            seen[f"{name} killed, {state} output" if running else f"{name} finished first"] += 1
            number += running
            if problem := trial.problem() or trial.again():
                failures.append(f"kill {number} of {name}: {problem}")
            shutil.rmtree(folder)
        for number in range(options.disks):
            progress("disks", options.kills + number, options.kills + options.disks)
            name, folder = pick.choice(list(JOBS)), Path(tempfile.mkdtemp(dir=scratch))
            needed = sum(path.stat().st_size for path in (inputs / "expected" / name).rglob("*") if path.is_file())
            size = max(4096, int(pick.random() * 1.3 * needed))
            with small_disk(folder, size) as mounted:
                trial = Trial(name, inputs, folder, usual[name].hashes, old=False)
                problem = fill(trial, size, mounted)
                whole = hashes(trial.target) == trial.expected
                seen[f"{name} on a {'tmpfs' if mounted else 'limit'}, {'whole' if whole else 'full'}"] += 1
                if mounted:
                    subprocess.run(["mount", "-o", "remount,size=100M", str(folder)], check=True)
                if problem := problem or trial.again():
                    failures.append(f"disk {number} of {size} bytes, {name}: {problem}")
            shutil.rmtree(folder)
    for what, count in sorted(seen.items()):
        print(f"{count:4} {what}")
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{options.kills} kills and {options.disks} disks, seed {options.seed}: {len(failures)} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
