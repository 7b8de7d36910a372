"""Text in and out, from a checkpoint's files to `generate`: ends of texts, tokens past the embedding, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from retnet_tools.formats import writable_format
from retnet_tools.formats.conversion import plan_conversion, write_checkpoint
from tests.helpers import BASE, MemorySource, random_source

END, OTHER_END = 38, 7
IDS = {"bos_token_id": 1, "eos_token_id": [END, OTHER_END]}
WORDS = {f"w{i}": i for i in range(BASE.vocab_size)}


def ending(source: MemorySource) -> MemorySource:
    """A model whose likeliest token is always one of the ends: their logits are x and -x, all others 0."""
    head = np.zeros_like(source.tensors["lm_head.weight"])
    head[END] = np.random.default_rng(0).standard_normal(head.shape[1])
    head[OTHER_END] = -head[END]
    return MemorySource({**source.tensors, "lm_head.weight": head})


def write_model(folder: Path, target: str = "syncdoth", *, config: dict[str, Any] | None = None, **files: Any) -> Path:
    """A checkpoint; `config` goes into its config.json, `files` beside it."""
    plan = plan_conversion(BASE, ending(random_source(BASE, 1)), writable_format(target))
    write_checkpoint(folder, plan, force=False, progress=None)
    if config:
        document = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(document | config))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def words(**further: int) -> dict[str, Any]:
    """tokenizer.json of the words w0, w1, ..."""
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    document = json.loads(tokenizer.to_str())
    keys = ("single_word", "lstrip", "rstrip", "normalized", "special")
    document["added_tokens"] = [
        {"id": number, "content": word, **dict.fromkeys(keys, False)} for word, number in further.items()
    ]
    return document


ENDINGS: dict[str, dict[str, Any]] = {
    "generation config": {"generation_config": IDS, "config": IDS},
    "config alone": {"config": IDS},
    "tokenizer and generation config": {"tokenizer": words(), "generation_config": IDS, "config": IDS},
    "tokenizer and config": {"tokenizer": words(), "config": IDS},
    "tokenizer config": {"tokenizer": words(), "tokenizer_config": {"bos_token": "w1", "eos_token": ["w38", "w7"]}},
    "null": {"generation_config": {"bos_token_id": None, "eos_token_id": None}, "config": IDS},
}


@pytest.mark.parametrize("through", [None, "canonical", "torchscale"])
@pytest.mark.parametrize("name", ENDINGS)
def test_generation_stops_at_the_end_wherever_it_is_written(
    name: str, through: str | None, tmp_path: Path, cli
) -> None:
    folder = write_model(tmp_path / "model", **ENDINGS[name])
    if through is not None:
        assert cli("convert", folder, tmp_path / through, "--to", through).exit_code == 0
        folder = tmp_path / through
    out = tmp_path / "out"
    assert cli("export", folder, "-o", out).exit_code == 0
    assert json.loads((out / "generation_config.json").read_text()) == IDS
    prompts = [["-p", "1 2 3", "--token-ids"], *([["-p", "w1 w2 w3"]] if "tokenizer" in ENDINGS[name] else [])]
    for prompt in prompts:
        stopped = json.loads(cli("generate", out, *prompt, "-n", 6, "--json").out)
        assert (stopped["tokens"], stopped["stop_reason"]) == ([], "end-of-text")
        goes_on = json.loads(cli("generate", out, *prompt, "-n", 6, "--json", "--ignore-end").out)
        assert set(goes_on["tokens"]) <= {END, OTHER_END}
        assert len(goes_on["tokens"]) == 6
    assert cli("export", folder, "--to", "genai", "-o", tmp_path / "genai").exit_code == 0
    section = json.loads((tmp_path / "genai" / "genai_config.json").read_text())["model"]
    # Padding must be no token that a prompt can end with.
    assert {key: section[key] for key in section if key.endswith("token_id")} == IDS | {"pad_token_id": 61}


def test_quantized_exports_keep_the_end(tmp_path: Path, cli) -> None:
    folder = write_model(tmp_path / "model", config=IDS, tokenizer=words())
    cli("export", folder, "-o", tmp_path / "out")
    assert cli("quantize", tmp_path / "out", "--quantize", "fp16", "-o", tmp_path / "half").exit_code == 0
    document = json.loads(cli("generate", tmp_path / "half", "-p", "w1", "--json").out)
    assert document["stop_reason"] == "end-of-text"


def test_the_option_that_goes_on_past_the_end_is_in_the_help(cli) -> None:
    assert "--ignore-end" in cli("generate", "--help").out


def test_settings_that_do_nothing_here_are_noted_everywhere(tmp_path: Path, cli) -> None:
    folder = write_model(tmp_path / "model", generation_config={"temperature": 0.7, "eos_token_id": 99})
    notes = [
        "generation_config.json has eos_token_id 99, which is none of the model's 61 tokens",
        "generation_config.json says temperature = 0.7: give --temperature 0.7 to generate",
    ]
    out = tmp_path / "out"
    text = cli("export", folder, "-o", out).out
    assert all(f"note: {note}" in text for note in notes)
    assert json.loads((out / "retnet.json").read_text())["provenance"]["notes"][-2:] == notes
    assert json.loads(cli("export", folder, "-o", out, "--force", "--json").out)["notes"][-2:] == notes
    document = json.loads(cli("convert", folder, tmp_path / "canonical", "--json").out)
    assert document["notes"][-2:] == notes
    assert all(note in (tmp_path / "canonical" / "README.md").read_text() for note in notes)
    assert json.loads(cli("quantize", out, "--quantize", "int8", "-o", tmp_path / "q", "--json").out)["notes"].count(
        notes[1]
    )


LARGER = {
    "added": words(**{"[PAD]": BASE.vocab_size}),
    "hole": words() | {"model": words()["model"] | {"vocab": {**WORDS, "w60": BASE.vocab_size + 7}}},
}


@pytest.mark.parametrize(("name", "word", "number"), [("added", "[PAD]", 61), ("hole", "w60", 68)])
def test_a_token_past_the_embedding_refuses_only_what_has_it(
    name: str, word: str, number: int, tmp_path: Path, cli
) -> None:
    model = write_model(tmp_path / "model", "canonical", tokenizer=LARGER[name])
    out, refused = tmp_path / "out", f"token '{word}' (id {number}) in the text; expected 0 to 60"
    assert cli("export", model, "-o", out).exit_code == 0
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text("w1 w2 w3 " * 100)
    bad.write_text("w1 w2 w3 " * 100 + word)
    commands: list[list[Any]] = [
        ["generate", out, "-n", 2, "-f"],
        ["state", "save", out, "--force", "-o", tmp_path / "state", "-f"],
        ["perplexity", out, "--text"],
        ["perplexity", model, "--text"],
        ["verify", model, "--tokens", 310, "--tolerance", 1e4, "-f"],
        ["quantize", out, "--quantize", "int8", "-o", tmp_path / "q", "--force", "--text"],
        ["quantize", out, "--quantize", "int8", "-o", tmp_path / "q", "--force", "--method", "gptq", "--calibration"],
        ["export", model, "--quantize", "int8", "-o", tmp_path / "q", "--force", "--text"],
    ]
    for command in commands:
        assert cli(*command, good).exit_code == 0, command
        result = cli(*command, bad)
        code = 5 if "--text" in command else 2
        assert (result.exit_code, refused in result.err, result.err.count("\n")) == (code, True, 1), result.err
    rows = [{"prompt": "w1"}, {"prompt": f"w2 {word}"}, {"prompt": "w3"}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    cli("generate", out, "--prompts", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "-n", 2)
    answers = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [refused in answer.get("error", "") for answer in answers] == [False, True, False]
    assert cli("inspect", model).exit_code == 0


def test_a_chat_template_is_kept_with_the_tokenizer(tmp_path: Path, cli) -> None:
    template = {"chat_template": "{{ messages }}"}
    folder = write_model(
        tmp_path / "model", tokenizer=words(), tokenizer_config=template, chat_template={"chat_template": "x"}
    )
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    names = ["chat_template.jinja", "chat_template.json", "tokenizer_config.json"]
    for out, command in (
        (tmp_path / "converted", ["convert", folder, tmp_path / "converted"]),
        (tmp_path / "onnx", ["export", folder, "-o", tmp_path / "onnx"]),
        (tmp_path / "genai", ["export", folder, "-o", tmp_path / "genai", "--to", "genai"]),
    ):
        assert cli(*command).exit_code == 0
        for name in names:
            assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_a_tokenizer_of_another_library_is_carried_as_tokenizer_json(tmp_path: Path, cli) -> None:
    pieces = pytest.importorskip("tests.tokenizing.pieces")
    folder = write_model(tmp_path / "model")
    model = pieces.train("char", 60)
    (folder / "spiece.model").write_bytes(model)
    out, expected = tmp_path / "out", pieces.processor(model).encode("to be")
    document = json.loads(cli("export", folder, "-o", out, "--json").out)
    assert document["tokenizer_files"] == ["tokenizer.json"]
    assert Tokenizer.from_file(str(out / "tokenizer.json")).encode("to be").ids == expected
    assert json.loads(cli("generate", out, "-p", "to be", "-n", 1, "--json").out)["prompt_tokens"] == len(expected)
    assert cli("verify", folder, "-p", "to be").exit_code == 0
    cli("convert", folder, tmp_path / "canonical")
    assert Tokenizer.from_file(str(tmp_path / "canonical" / "tokenizer.json")).encode("to be").ids == expected
    assert (tmp_path / "canonical" / "spiece.model").read_bytes() == model


def test_a_tokenizer_that_cannot_be_used_is_said_everywhere(tmp_path: Path, cli) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "dict.txt").write_text("the 1\n")
    out, wanted = tmp_path / "out", "encoder.json and vocab.bpe, beside it"
    text = cli("export", folder, "-o", out).out
    assert wanted in text
    assert "  tokenizer  " not in text
    document = json.loads(cli("export", folder, "-o", out, "--force", "--json").out)
    assert document["tokenizer_files"] == []
    assert wanted in document["notes"][-1]
    record = json.loads((out / "retnet.json").read_text())
    assert (record["tokenizer_files"], wanted in record["provenance"]["notes"][-1]) == ([], True)
    assert not (out / "dict.txt").exists()
    result = cli("verify", folder, "-p", "the")
    assert (result.exit_code, wanted in result.err) == (5, True)


def test_another_export_leaves_nothing_of_the_tokenizer_before(tmp_path: Path, cli) -> None:
    out = tmp_path / "out"
    cli("export", write_model(tmp_path / "one", config=IDS, tokenizer=words()), "-o", out)
    cli("export", write_model(tmp_path / "two"), "-o", out, "--force")
    assert not (out / "tokenizer.json").exists()
    assert not (out / "generation_config.json").exists()
