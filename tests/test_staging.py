"""The writer of outputs: whole or absent, on the disk, one at a time, nobody else's touched."""

import errno
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

from retnet_tools import locks, replacing, staging
from retnet_tools.errors import InputError, OutputError, RetNetToolsError, UsageError
from retnet_tools.staging import appended_file, check_file, check_folder, locked, staged_file, staged_folder, whole_file

HOLD = """
import sys
from pathlib import Path
from retnet_tools import staging
target = Path(sys.argv[1])
if target.suffix:
    context = staging.staged_file(target, force=True)
else:
    context = staging.staged_folder(target, marker="done", required_bytes=0, force=True)
with context as path:
    if not target.suffix:
        (path / "weights").write_text("half")
    else:
        path.write_text("half")
    print("holds", flush=True)
    sys.stdin.read()
    if not target.suffix:
        (path / "done").write_text("new")
"""


@contextmanager
def other_process(target: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is writing to a target until its stdin ends."""
    command = [sys.executable, "-c", HOLD, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "holds\n"
        yield process
        process.stdin.close()


def write_folder(target: Path, content: str = "new", *, force: bool = False, stale: tuple[str, ...] = ()) -> None:
    with staged_folder(target, marker="done", required_bytes=0, force=force, stale=lambda: stale) as folder:
        (folder / "weights").write_text(content)
        (folder / "done").write_text(content)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", ["out", "out.txt"])
@pytest.mark.parametrize("there", [False, True])
def test_of_two_runs_one_wins_and_the_other_says_so(name: str, there: bool, tmp_path: Path) -> None:
    target = tmp_path / name
    if there:
        write_folder(target) if name == "out" else target.write_text("old")
    with other_process(target):
        with pytest.raises(UsageError, match="another process writes to"):
            write_folder(target, force=True)
        with pytest.raises(UsageError, match="another process writes to"), staged_file(target, force=True):
            pass
        with pytest.raises(UsageError, match="another process writes to"), appended_file(target):
            pass
    assert names(tmp_path) == [name]
    assert (target / "weights" if name == "out" else target).read_text() == "half"


@pytest.mark.parametrize("name", ["out", "out.txt"])
@pytest.mark.parametrize("there", [False, True])
def test_what_a_killed_process_left_is_removed_by_the_next(name: str, there: bool, tmp_path: Path) -> None:
    target = tmp_path / name
    mine = [tmp_path / f".{name}.partial-mine", tmp_path / "out.partial"]
    for path in mine:
        path.write_text("mine")
    if there:
        write_folder(target, "old") if name == "out" else target.write_text("old")
    with other_process(target) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = names(target if there and name == "out" else tmp_path)
    assert {f".{name}.lock", f".{name}.partial"} <= set(left)
    if there:
        assert (target / "weights" if name == "out" else target).read_text() == "old"
    if name == "out":
        write_folder(target, force=there)
        assert names(target) == ["done", "weights"]
    else:
        with staged_file(target, force=there) as path:
            path.write_text("new")
    assert (target / "weights" if name == "out" else target).read_text() == "new"
    assert names(tmp_path) == sorted([name, *(path.name for path in mine)])


def test_what_lies_beside_a_folder_goes_away_too_unless_somebody_is_at_work_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    with other_process(target) as process:
        target.mkdir()
        with pytest.raises(UsageError, match="another process writes to"):
            write_folder(target)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert names(tmp_path) == [".out.lock", ".out.partial", "out"]
    write_folder(target)
    assert names(tmp_path) == ["out"]


def test_a_lock_belongs_to_a_process_and_not_to_its_number(tmp_path: Path) -> None:
    """A lock file with nobody behind it means nothing, whatever it says."""
    (tmp_path / ".out.lock").write_text(str(os.getppid()))
    write_folder(tmp_path / "out")
    assert names(tmp_path) == ["out"]


def test_a_lock_file_that_its_holder_removed_is_not_taken_for_one(tmp_path: Path, monkeypatch) -> None:
    """The second opens the file of the first, waits, and gets the lock of a file that has no name any more."""
    path, lock, stolen = tmp_path / "lock", locks._lock, []

    def late(handle: int) -> bool:
        if not stolen:
            stolen.append(path.rename(tmp_path / "gone"))
        return lock(handle)

    monkeypatch.setattr(locks, "_lock", late)
    with locks.lock_file(path, tmp_path / "out"):
        assert path.exists()
        monkeypatch.setattr(locks, "_lock", lock)
        with pytest.raises(UsageError), locks.lock_file(path, tmp_path / "out"):
            pass


def test_where_there_are_no_locks_the_file_is_the_lock(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(locks, "_lock", lambda handle: False)
    with locked(tmp_path / "out"):
        found = r"another process writes to .*out; .*if none does, remove .*\.out\.lock: this file system has no locks"
        with pytest.raises(UsageError, match=found):
            write_folder(tmp_path / "out")
    write_folder(tmp_path / "out")
    assert names(tmp_path) == ["out"]


class _Events:
    """What was done to the disk, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        for name in ("replace", "rename", "unlink"):
            monkeypatch.setattr(os, name, self._watched(name, getattr(os, name)))
        fsync = os.fsync
        monkeypatch.setattr(os, "fsync", lambda handle: (self._add("fsync", self._path(handle)), fsync(handle))[1])

    def seen(self) -> list[str]:
        """Without locks, and without the removal of what an earlier run may have left."""
        done = self.done[next(i for i, event in enumerate(self.done) if event in ("fsync weights", "fsync done")) :]
        return [event for event in done if not re.fullmatch(r"\w+ .*\.lock", event)]

    def _path(self, handle: int) -> str:
        return os.readlink(f"/proc/self/fd/{handle}")

    def _add(self, what: str, path: str) -> None:
        self.done.append(f"{what} {Path(path).name}")

    def _watched(self, name: str, function):
        def call(*paths, **options):
            self._add(name, os.fspath(paths[-1]))
            return function(*paths, **options)

        return call


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files")
def test_a_folder_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch) -> None:
    events = _Events(monkeypatch)
    write_folder(tmp_path / "out")
    done = events.seen()
    assert sorted(done[:2]) == ["fsync done", "fsync weights"]
    assert done[2:] == ["fsync .out.partial", "rename out", f"fsync {tmp_path.name}"]


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files")
def test_a_folder_that_is_replaced_has_its_marker_removed_first_and_written_last(tmp_path: Path, monkeypatch) -> None:
    write_folder(tmp_path / "out", "old")
    (tmp_path / "out" / "stale").write_text("old")
    events = _Events(monkeypatch)
    write_folder(tmp_path / "out", force=True, stale=("stale",))
    done = events.seen()
    assert sorted(done[:2]) == ["fsync done", "fsync weights"]
    assert done[2:8] == [
        *("fsync .plan.json", "fsync .out.partial", "rename .out.ready", "fsync out"),
        *("unlink done", "unlink stale"),
    ]
    assert done[8:12] == ["fsync out", "replace weights", "fsync out", "replace done"]
    assert [event for event in done[12:] if event.startswith("fsync")] == ["fsync out"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="names of open files")
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch) -> None:
    events = _Events(monkeypatch)
    with staged_file(tmp_path / "out.txt", force=False) as path:
        path.write_text("new")
    done = [event for event in events.done if not event.startswith("unlink")]
    assert done == ["fsync .out.txt.partial", "replace out.txt", f"fsync {tmp_path.name}"]
    events.done.clear()
    with appended_file(tmp_path / "out.txt") as file:
        file.write(b"more")
    assert "fsync out.txt" in events.done


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("there", [False, True])
def test_whenever_it_is_stopped_a_folder_is_whole_or_says_that_it_is_not(there: bool, tmp_path: Path) -> None:
    """A process that dies at any line of the writer: the output is old, new or without its marker, and can be made."""
    lines = 0
    while True:
        root = tmp_path / str(lines)
        target = root / "out"
        root.mkdir()
        if there:
            write_folder(target, "old")
            (target / "stale").write_text("old")
            (target / "mine").write_text("mine")
        stop = _dies_at_line(lines)
        try:
            with stop:
                write_folder(target, force=there, stale=("stale",))
        except _Stop:
            if (target / "done").exists():
                assert (target / "done").read_text() == (target / "weights").read_text()
                assert (target / "stale").exists() == ((target / "done").read_text() == "old")
            begun = there and not (target / "done").exists()
            write_folder(target, "again", force=target.exists(), stale=() if begun else ("stale",))
            assert names(target) == ["done", *["mine"] * there, "weights"]
            assert names(root) == ["out"]
            lines += 1
        else:
            break
    assert lines > 40


@contextmanager
def _dies_at_line(number: int) -> Iterator[None]:
    """Stop in front of a line of the writer, without any clean-up: what a killed process does."""
    count = -1

    def trace(frame, event, argument):
        nonlocal count
        if frame.f_code.co_filename not in (staging.__file__, replacing.__file__):
            return None
        if event == "line":
            count += 1
            if count >= number:
                # Every line after it too: nothing is cleaned up by a process that is dead.
                raise _Stop
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


def test_a_replacement_that_was_cut_short_can_be_made_again_and_is_nobody_elses(tmp_path: Path, monkeypatch) -> None:
    target = tmp_path / "out"
    write_folder(target, "old")
    monkeypatch.setattr(os, "replace", lambda *paths: os.kill(os.getpid(), signal.SIGKILL))
    pid = os.fork()
    if pid == 0:
        write_folder(target, force=True)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    assert "done" not in names(target)
    with pytest.raises(UsageError, match="add --force"):
        write_folder(target)
    with pytest.raises(RuntimeError), staged_folder(target, marker="done", required_bytes=0, force=True):
        raise RuntimeError
    write_folder(target, force=True)
    assert names(target) == ["done", "weights"]


@pytest.mark.parametrize("force", [False, True])
def test_somebody_elses_folder_is_never_mixed_into(force: bool, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.tex").write_text("mine")
    with pytest.raises((UsageError, OutputError), match=r"no done|exists already"):
        check_folder(target, marker="done", force=force)
    with pytest.raises((UsageError, OutputError), match=r"no done|exists already"):
        write_folder(target, force=force)
    assert names(tmp_path) == ["out"]
    assert names(target) == ["thesis.tex"]


def test_the_target_is_looked_at_again_when_nobody_else_can_change_it(tmp_path: Path, monkeypatch) -> None:
    """Another run finishes between the check before the work and the writing."""
    check_folder(tmp_path / "out", marker="done", force=False)
    write_folder(tmp_path / "out", "theirs")
    with pytest.raises(UsageError, match="exists already"):
        write_folder(tmp_path / "out", "mine")
    assert (tmp_path / "out" / "weights").read_text() == "theirs"


def test_the_source_is_not_replaced_under_whatever_name(tmp_path: Path) -> None:
    write_folder(tmp_path / "out")
    (tmp_path / "link").symlink_to(tmp_path / "out")
    for source in (tmp_path / "out", tmp_path / "link", tmp_path / "link" / "weights"):
        with pytest.raises(UsageError, match="both input and output"):
            check_folder(tmp_path / "out", marker="done", force=True, source=source)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_nothing_is_left_of_work_that_fails(error: type[BaseException], tmp_path: Path) -> None:
    folder = staged_folder(tmp_path / "a" / "b", marker="done", required_bytes=0, force=False)
    contexts = folder, staged_file(tmp_path / "c" / "d.txt", force=False), whole_file(tmp_path / "g")
    for context in contexts:
        with pytest.raises(error), context as path:
            _write_half(path, error)
    with pytest.raises(error), appended_file(tmp_path / "e" / "f.txt"):
        raise error
    assert names(tmp_path) == []


def test_what_was_appended_stays_when_a_run_is_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), appended_file(tmp_path / "out.jsonl") as file:
        _append_half(file)
    assert (tmp_path / "out.jsonl").read_bytes() == b"one answer"
    assert names(tmp_path) == ["out.jsonl"]


def _append_half(file: IO[bytes]) -> None:
    file.write(b"one answer")
    raise KeyboardInterrupt


def _write_half(path: Path, error: type[BaseException]) -> None:
    (path / "weights" if path.is_dir() else path).write_text("half")
    raise error


@pytest.mark.parametrize("call", ["fsync", "replace", "rename"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_at_the_end_leaves_nothing(call: str, code: int, tmp_path: Path, monkeypatch) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    found = "cannot write .*Input/output" if code == errno.EIO else "the disk is full: .* not written"
    if call != "replace":
        with pytest.raises(OutputError, match=found):
            write_folder(tmp_path / "out")
    if call != "rename":
        with pytest.raises(OutputError, match=found), staged_file(tmp_path / "out.txt", force=False) as path:
            path.write_text("new")
    assert names(tmp_path) == []


def test_the_disk_is_full_while_a_target_is_replaced(tmp_path: Path, monkeypatch) -> None:
    write_folder(tmp_path / "out", "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="the disk is full"):
        write_folder(tmp_path / "out", force=True)
    assert names(tmp_path / "out") == ["done", "weights"]
    assert (tmp_path / "out" / "done").read_text() == "old"


def test_places_that_cannot_be_written_are_found_before_the_work(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe")
    for check in (
        lambda: check_file(tmp_path / "file" / "x", force=True),
        lambda: check_folder(tmp_path / "file" / "x" / "y", marker="done", force=True),
        lambda: check_folder(tmp_path / "file", marker="done", force=True),
        lambda: check_file(tmp_path, force=True),
        lambda: check_file(tmp_path / "pipe", force=True),
        lambda: check_file(Path("/dev/null"), force=True),
        lambda: check_file(Path("/proc/retnet"), force=True),
        lambda: check_folder(Path("/proc/a/b"), marker="done", force=True),
    ):
        with pytest.raises(OutputError):
            check()
    check_file(tmp_path / "a" / "b" / "c", force=False)
    assert names(tmp_path) == ["file", "pipe"]


def test_a_folder_that_is_there_is_filled_though_nothing_can_be_written_beside_it(tmp_path: Path, monkeypatch) -> None:
    """As where it is a mount: another file system, in a folder of somebody else's."""
    target = tmp_path / "out"
    target.mkdir()
    rename, replace = os.rename, os.replace

    def inside(function):
        def call(a: object, b: object) -> None:
            if not all(target in Path(os.fspath(path)).parents for path in (a, b)):
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            function(a, b)

        return call

    monkeypatch.setattr(os, "rename", inside(rename))
    monkeypatch.setattr(os, "replace", inside(replace))
    write_folder(target)
    assert names(target) == ["done", "weights"]


def test_reading_errors_are_no_fault_of_the_output(tmp_path: Path) -> None:
    staged = staged_folder(tmp_path / "out", marker="done", required_bytes=0, force=False)
    with pytest.raises(InputError, match=r"cannot read .*model\.pt"), staged:
        (tmp_path / "model.pt").read_bytes()
    assert names(tmp_path) == []


def test_threads_of_one_process_exclude_each_other_too(tmp_path: Path) -> None:
    inside, go_on, found = threading.Event(), threading.Event(), []

    def hold() -> None:
        with staged_file(tmp_path / "x.txt", force=False) as path:
            path.write_text("one")
            inside.set()
            go_on.wait(30)

    thread = threading.Thread(target=hold)
    thread.start()
    assert inside.wait(30)
    try:
        with pytest.raises(RetNetToolsError) as stop, staged_file(tmp_path / "x.txt", force=False) as path:
            path.write_text("two")
        found.append(stop.value)
    finally:
        go_on.set()
        thread.join()
    assert "another process writes to" in str(found[0])
    assert (tmp_path / "x.txt").read_text() == "one"


def test_a_stop_between_two_files_is_put_off_until_all_are_in_place(tmp_path: Path, monkeypatch) -> None:
    write_folder(tmp_path / "out", "old")
    replace, stopped = os.replace, []

    def interrupted(*paths: object) -> None:
        if not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        replace(*paths)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", force=True)
    assert names(tmp_path / "out") == ["done", "weights"]
    assert (tmp_path / "out" / "weights").read_text() == (tmp_path / "out" / "done").read_text() == "new"


def test_a_failure_between_two_files_loses_neither_and_the_next_run_goes_on(tmp_path: Path, monkeypatch) -> None:
    """As where another program has a file open, on Windows."""
    target = tmp_path / "out"
    write_folder(target, "old")

    def busy(*paths: object) -> None:
        raise PermissionError(errno.EACCES, "in use", os.fspath(target / "weights"))

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(OutputError, match="in use"):
        write_folder(target, force=True)
    monkeypatch.undo()
    assert (target / ".out.ready" / "weights").read_text() == "new"
    with pytest.raises(UsageError, match="exists already"):
        write_folder(target, "third")
    assert names(target) == ["done", "weights"]
    assert (target / "weights").read_text() == (target / "done").read_text() == "new"


@pytest.mark.parametrize("name", ["../secret", "/etc/hosts", "..", "", "a/b"])
@pytest.mark.parametrize("where", ["stale", "marker", "not json"])
def test_a_plan_of_somebody_elses_leads_nowhere(name: str, where: str, tmp_path: Path) -> None:
    target = tmp_path / "out"
    (target / ".out.ready").mkdir(parents=True)
    (tmp_path / "secret").write_text("mine")
    plan = {"marker": name, "stale": []} if where == "marker" else {"marker": "done", "stale": [name]}
    text = name if where == "not json" else json.dumps(plan)
    (target / ".out.ready" / ".plan.json").write_text(text)
    (target / ".out.ready" / "done").write_text("theirs")
    with pytest.raises(OutputError):
        write_folder(target, force=True)
    assert (tmp_path / "secret").read_text() == "mine"


def test_a_folder_in_the_place_of_a_file_is_found_before_the_work_or_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write_folder(target, "old")
    (target / "stale").mkdir()
    with pytest.raises(OutputError, match="stale is not a file of"):
        write_folder(target, force=True, stale=("stale",))
    (target / "weights").unlink()
    (target / "weights").mkdir()
    with pytest.raises(OutputError, match="weights is not a file of"):
        write_folder(target, force=True)
    assert (target / "done").read_text() == "old"


def test_what_appears_meanwhile_is_not_replaced_without_force(tmp_path: Path) -> None:
    file = staged_file(tmp_path / "a.txt", force=False)
    with pytest.raises(UsageError, match="exists already"), file as path:
        _write_both(path, tmp_path / "a.txt")
    (tmp_path / "out").mkdir()
    folder = staged_folder(tmp_path / "out", marker="done", required_bytes=0, force=False)
    with pytest.raises(UsageError, match="exists already"), folder as path:
        _write_both(path / "done", tmp_path / "out" / "README.md")
    assert names(tmp_path / "out") == ["README.md"]


def _write_both(mine: Path, theirs: Path) -> None:
    mine.write_text("new")
    theirs.write_text("theirs")


def test_a_file_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o600)
    with staged_file(tmp_path / "a", force=True) as path:
        path.write_text("new")
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("length", [240, 248, 255])
@pytest.mark.parametrize("there", [False, True])
def test_long_names_work_as_others_do(length: int, there: bool, tmp_path: Path) -> None:
    target = tmp_path / ("x" * length)
    if there:
        target.mkdir()
    check_folder(target, marker="done", force=False)
    write_folder(target)
    write_folder(target, force=True)
    assert names(target) == ["done", "weights"]
    with staged_file(tmp_path / ("y" * length), force=False) as path:
        path.write_text("new")
    assert len(names(tmp_path)) == 2


def test_names_of_unfinished_work_are_no_outputs(tmp_path: Path) -> None:
    for kind in ("partial", "ready", "lock", "unfinished"):
        with pytest.raises(OutputError, match="a name for work that is not finished"):
            check_folder(tmp_path / f".x.{kind}", marker="done", force=True)
        with pytest.raises(OutputError, match="a name for work that is not finished"):
            write_folder(tmp_path / f".x.{kind}")


def test_links_that_lead_nowhere_are_one_line(tmp_path: Path) -> None:
    (tmp_path / ".out.lock").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError, match=r"cannot write .*out"):
        write_folder(tmp_path / "out")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for check in (
        lambda: check_file(tmp_path / "loop" / "a", force=True),
        lambda: write_folder(tmp_path / "loop" / "a"),
    ):
        with pytest.raises(OutputError, match=r"cannot write .*loop"):
            check()


def test_a_lock_that_another_user_left_can_be_taken(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / ".out.lock").write_text("")
    opened = os.open

    def refused(path: object, flags: int, *mode: int) -> int:
        if os.fspath(path).endswith(".lock") and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", path) if not flags & os.O_EXCL else FileExistsError
        return opened(path, flags, *mode)

    monkeypatch.setattr(os, "open", refused)
    write_folder(tmp_path / "out")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF, errno.EACCES])
def test_a_folder_that_cannot_be_synced_is_no_failure(code: int, tmp_path: Path, monkeypatch) -> None:
    fsync = os.fsync

    def refuse(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", refuse)
    write_folder(tmp_path / "out")
    write_folder(tmp_path / "out", force=True)
    assert names(tmp_path / "out") == ["done", "weights"]
