"""genai_config.json and what goes with it: special tokens, refusals, notes, and folders that change their target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from retnet_tools.errors import UsageError
from retnet_tools.formats import Checkpoint, open_checkpoint
from retnet_tools.formats.canonical import write_canonical
from retnet_tools.graph import contract
from retnet_tools.graph.export import plan_export, write_export
from retnet_tools.graph.manifest import read_manifest
from tests.exports import checkpoint, export
from tests.fake_gpu import FakeGpu, needs_fake_gpu
from tests.helpers import ABLATIONS, BASE, random_source

END = "<|endoftext|>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer has 40 tokens of 61, the last of which is special."""
    path = tmp_path / "ckpt"
    write_canonical(path, BASE, random_source(BASE, 1))
    letters = {symbol: i for i, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:39])}
    tokenizer = Tokenizer(models.BPE(letters, []))
    tokenizer.add_special_tokens([END])
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def plan(path: Path, dtype: str = "float32") -> Any:
    return plan_export(open_checkpoint(path), dtype=dtype, ops="fused", target="genai")


def model_section(path: Path) -> dict[str, Any]:
    section: dict[str, Any] = json.loads(plan(path).files[contract.GENAI_CONFIG_FILE])["model"]
    return section


def test_the_padding_token_is_none_of_the_vocabulary(folder: Path) -> None:
    model = model_section(folder)
    assert model["type"] == "decoder"
    assert model["pad_token_id"] == BASE.vocab_size
    assert model["vocab_size"] == BASE.vocab_size + 1
    assert model["context_length"] == contract.MAX_POSITION + 1


def test_names_are_those_of_the_graph(folder: Path) -> None:
    decoder = model_section(folder)["decoder"]
    inputs = {spec.name for spec in contract.genai_inputs(BASE, "float32")}
    outputs = {spec.name for spec in contract.genai_outputs(BASE, "float32")}

    def names(section: dict[str, str]) -> set[str]:
        return {template.replace("%d", str(i)) for template in section.values() for i in range(BASE.num_layers)}

    assert names(decoder["inputs"]) == inputs
    assert names(decoder["outputs"]) == outputs
    assert list(plan(folder).graphs) == [decoder["filename"]]


def test_search_is_greedy_without_beams_and_shares_no_buffer(folder: Path) -> None:
    search = json.loads(plan(folder).files[contract.GENAI_CONFIG_FILE])["search"]
    assert search == {"do_sample": False, "num_beams": 1, "max_length": 4096, "past_present_share_buffer": False}


def test_special_tokens_come_from_the_first_file_that_names_them(folder: Path) -> None:
    assert model_section(folder)["eos_token_id"] == BASE.vocab_size
    assert "bos_token_id" not in model_section(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END, "bos_token": {"content": END}}))
    assert [model_section(folder)[name] for name in ("eos_token_id", "bos_token_id")] == [39, 39]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 7, 5], "bos_token_id": 1}))
    assert [model_section(folder)[name] for name in ("eos_token_id", "bos_token_id")] == [[5, 7], 1]


def test_ids_of_generation_config_count_without_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    assert model_section(folder)["eos_token_id"] == BASE.vocab_size
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    assert model_section(folder)["eos_token_id"] == 5


def test_a_lone_tokenizer_gets_the_configuration_without_which_it_is_not_read(folder: Path, tmp_path: Path) -> None:
    write_export(plan(folder), tmp_path / "out", force=False, progress=lambda count: None)
    assert json.loads((tmp_path / "out" / "tokenizer_config.json").read_text()) == {}
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    assert list(plan(folder).files) == [contract.GENAI_CONFIG_FILE]


def without_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


def adding_a_start(path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 39)])
    tokenizer.save(str(path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("change", "dtype", "expected"),
    [
        (lambda path: None, "float32", ()),
        (lambda path: None, "float16", ()),
        (lambda path: None, "bfloat16", ("bfloat16 needs CUDA",)),
        (without_tokenizer, "float32", ("no tokenizer.json",)),
        (adding_a_start, "float32", ("the tokenizer adds special tokens",)),
        (without_tokenizer, "bfloat16", ("no tokenizer.json", "bfloat16 needs CUDA")),
    ],
)
def test_notes_say_what_will_not_run(
    change: Callable[[Path], None], dtype: str, expected: tuple[str, ...], folder: Path
) -> None:
    change(folder)
    notes = plan(folder, dtype).notes
    assert len(notes) == len(expected)
    for note, beginning in zip(notes, expected, strict=True):
        assert note.startswith(beginning)


def test_notes_of_one_target_are_not_part_of_the_provenance(folder: Path, tmp_path: Path) -> None:
    without_tokenizer(folder)
    manifest = write_export(plan(folder), tmp_path / "out", force=False, progress=lambda count: None)
    assert not any("onnxruntime-genai" in note for note in manifest.provenance["notes"])


def test_a_stack_without_vocabulary_is_refused_by_name() -> None:
    config = ABLATIONS["stack"]
    stack: Checkpoint = checkpoint(config, random_source(config, 1))
    with pytest.raises(UsageError, match=r"--to genai of a stack without embedding.*use --to onnx"):
        plan_export(stack, dtype="float32", ops="fused", target="genai")


def test_a_token_past_the_embedding_is_never_the_padding_token(folder: Path) -> None:
    """onnxruntime-genai would take it for padding: another id is refused by the model's embedding."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([f"word{i}" for i in range(BASE.vocab_size - 40)])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == BASE.vocab_size
    assert "tokenizer.json" not in plan(folder).files
    tokenizer.add_special_tokens(["[PAD]", "[X]"])
    tokenizer.save(str(folder / "tokenizer.json"))
    moved = Tokenizer.from_str(plan(folder).files["tokenizer.json"])
    assert moved.id_to_token(BASE.vocab_size) is None
    assert moved.token_to_id("[PAD]") > BASE.vocab_size
    assert moved.token_to_id("[X]") > BASE.vocab_size
    text = "".join(sorted(pre_tokenizers.ByteLevel.alphabet())[:39]) + END + "word3"
    assert moved.encode(text).ids == tokenizer.encode(text).ids
    assert moved.encode("[PAD]").tokens == ["[PAD]"]


@pytest.mark.parametrize("name", ["eos", "bos"])
def test_special_tokens_outside_the_vocabulary_are_noted_and_left_out(name: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(json.dumps({f"{name}_token_id": [61, 5]}))
    assert model_section(folder)[f"{name}_token_id"] == 5
    (note,) = plan(folder).notes
    assert note == f"generation_config.json has {name}_token_id 61, which is none of the model's 61 tokens"


def test_an_unknown_target_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--to 'genei'; expected one of onnx, genai; did you mean 'genai'\?"):
        plan_export(checkpoint(BASE, random_source(BASE, 1)), dtype="float32", ops="fused", target="genei")


@pytest.mark.parametrize(("first", "second"), [("onnx", "genai"), ("genai", "onnx")])
def test_another_target_in_the_same_folder_leaves_no_graph_of_the_first(
    first: str, second: str, tmp_path: Path
) -> None:
    source = random_source(BASE, 1)
    out = export(BASE, source, tmp_path / "out", target=first)
    again = plan_export(checkpoint(BASE, source), dtype="float16", ops="fused", target=second)
    write_export(again, out, force=True, progress=lambda count: None)
    expected = {*again.graphs, *again.files, contract.WEIGHTS_FILE, contract.MANIFEST_FILE}
    assert {path.name for path in out.iterdir()} == expected
    assert set(read_manifest(out).graphs) == set(again.graphs)


OPEN_ON_CUDA = """
import json, sys
import onnxruntime
onnxruntime.preload_dlls()
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
params = og.GeneratorParams(model)
params.set_search_options(batch_size=2, max_length=12)
generator = og.Generator(model, params)
generator.append_tokens([[1, 2, 3, 4], [5, 6, 61, 61]])
print(json.dumps([model.device_type, list(generator.get_logits().shape)]))
"""


@needs_fake_gpu
@pytest.mark.parametrize("ops", ["fused", "standard"])
def test_onnxruntime_genai_opens_an_export_for_cuda_there(ops: str, tmp_path: Path) -> None:
    """Nothing is computed, but a ragged prompt runs through every node to logits."""
    pytest.importorskip("onnxruntime_genai")
    out = export(BASE, random_source(BASE, 1), tmp_path / "out", ops=ops, target="genai", device="cuda")
    device, shape = FakeGpu().evaluate(OPEN_ON_CUDA, out)
    assert (device, shape[0], shape[-1]) == ("CUDA", 2, 62)
