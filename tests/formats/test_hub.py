"""Checkpoints by their name, from a hub served on localhost."""

from __future__ import annotations

import builtins
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from retnet_tools.errors import InputError, UsageError
from retnet_tools.formats import open_checkpoint
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.formats.hub import HubOrigin, hub_origin, local_checkpoint
from retnet_tools.weights import WeightSource
from tests.bench.inline import measure_inline
from tests.formats.cases import TEXT_FILES
from tests.formats.hub_server import Hub, Repository, serve
from tests.helpers import BASE, random_source

COMMIT, OLDER, NAME = "c" * 40, "0" * 40, "someone/tiny-retnet"
JUNK = {
    "optimizer.pt": b"-",
    "pytorch_model.bin": b"-",
    "training_args.bin": b"-",
    "trainer_state.json": b"{}",
    "model.onnx": b"-",
    "flax_model.msgpack": b"-",
    "tf_model.h5": b"-",
    "model.gguf": b"-",
    "curve.png": b"-",
    ".gitattributes": b"-",
    "checkpoint-10/model.safetensors": b"-",
}


def checkpoint_files(folder: Path, seed: int) -> dict[str, bytes]:
    write_canonical(folder, BASE, random_source(BASE, seed))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    (folder / "LICENSE").write_text("MIT")
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    newer, older = (checkpoint_files(tmp_path / f"files{seed}", seed) for seed in (1, 2))
    repository = Repository({COMMIT: newer | JUNK, OLDER: older}, {"main": COMMIT, "v0": OLDER})
    with serve({NAME: repository}) as running:
        yield running


@pytest.fixture
def fetch(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run Python in a process whose hub is this one, with an empty cache of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, offline: bool = False, token: str | None = None, **variables: str):
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": str(int(offline))}
        environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "NO_PROXY": "*", **variables}
        if token is not None:
            environment["HF_TOKEN"] = token
        command = [sys.executable, "-m", "retnet_tools.cli.app", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    return run


@pytest.fixture
def nearby(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process's hub is this one; gives its cache."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    return tmp_path / "cache"


def same_weights(a: WeightSource, b: WeightSource) -> bool:
    return all((a.read(name) == b.read(name)).all() for name in a.names())


def one_line(result: subprocess.CompletedProcess[str], *parts: str) -> None:
    assert result.returncode == 5, result.stderr
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    for part in ("error: ", *parts):
        assert part in line


def test_an_export_from_the_hub_lies_here_and_knows_its_commit(fetch, hub: Hub, tmp_path: Path) -> None:
    result = fetch("export", NAME)
    assert (result.returncode, result.stderr) == (0, "")
    out = tmp_path / "tiny-retnet-onnx"
    provenance = json.loads((out / "retnet.json").read_text())["provenance"]
    assert provenance["hub"] == {"repository": NAME, "commit": COMMIT}
    assert {file["name"] for file in provenance["source_files"]} == {"config.json", "model.safetensors"}
    assert hub.fetched() == {"config.json", "model.safetensors", "README.md", "LICENSE"}
    asked = len(hub.requests)
    again = fetch("export", NAME, "-o", "again", offline=True)
    assert (again.returncode, len(hub.requests)) == (0, asked)
    assert (tmp_path / "again" / "weights.data").read_bytes() == (out / "weights.data").read_bytes()


@pytest.mark.usefixtures("nearby")
def test_every_command_that_takes_a_checkpoint_takes_a_name(
    tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure_inline(monkeypatch)
    (tmp_path / "text").write_text("1 2 3 4 5 6 7 8")
    commands = (
        ("inspect", NAME, "--quick", "--json"),
        ("verify", NAME, "--tokens", 4, "--json"),
        ("convert", NAME, "converted", "--to", "torchscale", "--json"),
        ("perplexity", NAME, "--text", "text", "--token-ids", "-c", 4, "--against", NAME, "--json"),
        ("bench", NAME, "-p", 4, "-n", 1, "-r", 1, "-t", 1, "--quick", "--json"),
    )
    for command in commands:
        result = cli(*command)
        assert result.exit_code == 0, result.err
        json.loads(result.out)
    card = (tmp_path / "converted" / "README.md").read_text()
    assert f"({NAME} on the hub, commit {COMMIT})" in card


def test_the_data_are_those_of_the_revision(nearby: Path, hub: Hub, tmp_path: Path) -> None:
    newer, older, by_commit = (local_checkpoint(NAME, revision) for revision in (None, "v0", OLDER))
    assert older == by_commit
    assert same_weights(open_checkpoint(newer).weights, random_source(BASE, 1))
    assert same_weights(open_checkpoint(older).weights, random_source(BASE, 2))
    assert [hub_origin(path / "config.json") for path in (newer, older)] == [
        HubOrigin(NAME, COMMIT),
        HubOrigin(NAME, OLDER),
    ]
    assert newer.is_relative_to(nearby)


def test_torch_files_are_fetched_where_there_are_no_safetensors(nearby: Path, hub: Hub) -> None:
    files = {"config.json": b"{}", "tokenizer.model": b"-", "rng_state_0.pth": b"-", **JUNK}
    files |= {"pytorch_model.bin.index.json": b"{}", "adapter/model.bin": b"-"}
    hub.repositories["org/single"] = Repository({COMMIT: files}, {"main": COMMIT})
    folder = local_checkpoint("org/single")
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "tokenizer.model",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    }
    assert hub_origin(folder) == HubOrigin("org/single", COMMIT)


@pytest.mark.parametrize("weights", ["model.safetensors", "model.pt", "last.ckpt", "best.pth.tar", "model.pth"])
def test_what_belongs_to_text_and_licence_is_fetched_with_any_weights(weights: str, nearby: Path, hub: Hub) -> None:
    wanted = {weights, "config.json", "README.md", "LICENSE.txt", "LICENCE", "NOTICE", *TEXT_FILES}
    states = ("rng_state.pth", "random_states_0.pt", "scaler.pt", "scheduler.pt", "optimizer.bin", "adam_optimizer.pt")
    states += ("mp_rank_00_optim_states.pt", "trainer_state.json", "training_args.bin", "global_step9/model.pt")
    hub.repositories["org/text"] = Repository({COMMIT: dict.fromkeys((*wanted, *states), b"{}")}, {"main": COMMIT})
    assert {file.name for file in local_checkpoint("org/text").iterdir()} == wanted


def test_torch_files_are_those_of_the_revision(nearby: Path, hub: Hub) -> None:
    revisions = {COMMIT: {"config.json": b"{}", "model.pt": b"new"}, OLDER: {"config.json": b"{}", "model.pt": b"old"}}
    hub.repositories["org/torch"] = Repository(revisions, {"main": COMMIT, "v0": OLDER})
    assert [(local_checkpoint("org/torch", name) / "model.pt").read_bytes() for name in (None, "v0")] == [
        b"new",
        b"old",
    ]


def test_the_index_of_torch_shards_is_not_fetched_with_safetensors(nearby: Path, hub: Hub) -> None:
    files = dict.fromkeys(("weights.safetensors", "pytorch_model.bin.index.json", "pytorch_model-1.bin"), b"{}")
    hub.repositories["org/both"] = Repository({COMMIT: files}, {"main": COMMIT})
    assert [file.name for file in local_checkpoint("org/both").iterdir()] == ["weights.safetensors"]


def test_a_distributed_checkpoint_is_fetched_whole(nearby: Path, hub: Hub) -> None:
    files = dict.fromkeys((".metadata", "__0_0.distcp", "__1_0.distcp", "README.md"), b"-")
    hub.repositories["org/dcp"] = Repository({COMMIT: files}, {"main": COMMIT})
    assert {file.name for file in local_checkpoint("org/dcp").iterdir()} == set(files)


def test_a_repository_without_weights_is_refused(nearby: Path, hub: Hub) -> None:
    files = {"README.md": b"-", "step-100/model.safetensors": b"-"}
    hub.repositories["org/empty"] = Repository({COMMIT: files}, {"main": COMMIT})
    with pytest.raises(InputError, match="org/empty on the hub has no weights in its top folder"):
        local_checkpoint("org/empty")


def test_an_existing_path_wins(nearby: Path, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    assert local_checkpoint(NAME) == Path(NAME)
    assert hub_origin(Path(NAME)) is None
    assert hub.requests == []


@pytest.mark.parametrize(
    "name",
    ["./a/b", "../b", "/a/b", "~/b", "a/", "a/b/", "a/b/c", "a/model.safetensors", "model.pt", "a/x.onnx", "a--b", ""],
)
def test_what_looks_like_a_path_is_never_sent(name: str, nearby: Path, hub: Hub) -> None:
    assert local_checkpoint(name) == Path(name)
    assert hub.requests == []


def test_the_token_is_sent(fetch, hub: Hub) -> None:
    hub.repositories[NAME].token = "hf_secret"
    one_line(fetch("inspect", NAME, "--quick", token="hf_wrong"), NAME, "HF_TOKEN")
    assert fetch("inspect", NAME, "--quick", token="hf_secret").returncode == 0
    assert hub.tokens == {"Bearer hf_wrong", "Bearer hf_secret"}


def test_a_cache_that_is_named_is_used(fetch, tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    assert fetch("inspect", NAME, "--quick", HF_HUB_CACHE=str(cache)).returncode == 0
    assert [path.name for path in cache.glob("models--*")] == ["models--someone--tiny-retnet"]


def test_offline_without_a_copy_is_one_line(fetch, hub: Hub) -> None:
    one_line(fetch("inspect", NAME, offline=True), f"no file or folder {NAME}", "HF_HUB_OFFLINE", "unset it")
    assert hub.requests == []


def test_a_missing_repository_is_one_line(fetch) -> None:
    one_line(fetch("export", "someone/else"), "no file or folder someone/else", "no repository", "check the name")


def test_a_gated_repository_is_one_line(fetch, hub: Hub) -> None:
    hub.repositories[NAME].gated = True
    one_line(fetch("verify", NAME), "is gated", "HF_TOKEN")


def test_an_unknown_revision_is_one_line(fetch) -> None:
    one_line(fetch("inspect", NAME, "--revision", "v9"), "no revision 'v9'", "branch, tag or commit")


def test_a_hub_that_fails_is_one_line(fetch, hub: Hub) -> None:
    hub.fails_with = 503
    one_line(fetch("inspect", NAME), "cannot be had: the hub answers 503", "by hand")


def test_no_network_is_one_line(fetch) -> None:
    result = fetch("inspect", NAME, HF_ENDPOINT="http://127.0.0.1:9")
    one_line(result, f"no file or folder {NAME}", "http://127.0.0.1:9 cannot be reached", "by hand")


def test_a_revision_of_a_path_is_refused(nearby: Path, tmp_path: Path, cli) -> None:
    with pytest.raises(UsageError, match="--revision v1 of the path"):
        local_checkpoint(str(tmp_path), "v1")
    assert cli("verify", "--revision", "v1").exit_code == 2


def test_without_the_library_it_says_what_to_install(nearby: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: object, **options: object) -> object:
        if name.partition(".")[0] == "huggingface_hub":
            raise ModuleNotFoundError(name)
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.example/")
    with pytest.raises(InputError) as caught:
        local_checkpoint(NAME)
    assert "no huggingface_hub" in str(caught.value)
    assert "pip install huggingface_hub" in str(caught.value)
    assert f"https://mirror.example/{NAME}" in str(caught.value)
    assert local_checkpoint("./a") == Path("./a")
    assert hub.requests == []


def test_the_library_is_imported_only_for_a_name(tmp_path: Path) -> None:
    code = (
        "import sys, retnet_tools.formats as f; f.CheckpointSource.of('.');sys.exit('huggingface_hub' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
