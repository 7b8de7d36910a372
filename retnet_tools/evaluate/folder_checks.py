"""What an exported folder says besides weights and graphs, against the checkpoint, and against its own record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from retnet_tools.config import RetNetConfig
from retnet_tools.errors import RetNetToolsError
from retnet_tools.evaluate.checks import Check
from retnet_tools.formats.integrity import check_records
from retnet_tools.graph.contract import GENAI_CONFIG_FILE, WEIGHTS_FILE
from retnet_tools.graph.export import ExportPlan
from retnet_tools.graph.folder import load_graph
from retnet_tools.graph.manifest import Manifest
from retnet_tools.inputs import parse_json, read_input
from retnet_tools.progress import ByteProgress
from retnet_tools.tokenizing.files import COMPANIONS, MAX_TOKENIZER, TOKENIZER_FILE, load_tokenizer
from retnet_tools.tokenizing.special import GENERATION_FILE

_TEXT_FILES = (TOKENIZER_FILE, *COMPANIONS, GENERATION_FILE)


def check_config(found: RetNetConfig, expected: RetNetConfig) -> Check:
    """The configuration of the manifest; the clamp of the scores, which no graph has, does not count."""
    scores = replace(found.score_normalization, clamp=expected.score_normalization.clamp)
    theirs, ours = replace(found, score_normalization=scores).to_dict(), expected.to_dict()
    differing = [name for name in ours if theirs[name] != ours[name]]
    return Check("text", "configuration", len(differing), 0, "fields differ", ", ".join(differing), len(ours))


def check_files(folder: Path, manifest: Manifest, progress: ByteProgress) -> list[Check]:
    """Files that are not what was written, by the sizes and hashes of the manifest, where it has them; not those that a
    user may change, the card and settings.
    """
    names = (*manifest.graphs, WEIGHTS_FILE, *manifest.tokenizer_files)
    records = {name: manifest.files[name] for name in names if name in manifest.files}
    wrong = [check.file.name for check in check_records(folder, records, (), progress) if check.problem]
    where = ", ".join(wrong)
    return [Check("files", "sizes and sha256", len(wrong), 0, "files differ", where, len(records))] if records else []


def check_constants(folder: Path, names: Iterable[str], plan: ExportPlan) -> Check:
    """Constants inside the graphs, such as decays: each that an export of the checkpoint has has to be there, bit for
    bit. What noise hides, a gamma of a neighbour head in a half type, is found here.
    """
    lost, count = [], 0
    for name in names:
        expected = Counter(_constants(plan.graphs[name].graph))
        missing = expected - Counter(_constants(load_graph(folder / name)))
        lost += [f"{name}, {words}" for words, _ in missing.elements()]
        count += expected.total()
    return Check("graphs", "constants", len(lost), 0, "constants are missing", ", ".join(lost[:3]), count)


def _constants(graph: ir.Graph) -> Iterator[tuple[str, bytes]]:
    """Type and shape in words, and bytes; without what lies in weights.data."""
    values = [value.const_value for value in graph.initializers.values()]
    attributes = [attribute for node in graph for attribute in node.attributes.values()]
    values += [attribute.as_tensor() for attribute in attributes if attribute.type == ir.AttributeType.TENSOR]
    for tensor in values:
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor):
            yield f"{tensor.dtype.name} of {list(tensor.shape.numpy())}", tensor.tobytes()


def check_text(folder: Path, plan: ExportPlan) -> list[Check]:
    """Tokenizer, special tokens and settings against what the checkpoint's export would carry.

    Args:
        plan: of the checkpoint.
    """
    expected: dict[str, bytes] = {file.name: read_input(file, MAX_TOKENIZER) for file in plan.text.copies}
    expected |= {name: text.encode() for name, text in {**plan.text.made, **plan.files}.items()}
    there = {name for name in (*_TEXT_FILES, *plan.text.tokenizer_files) if (folder / name).is_file()}
    checks = []
    for name in sorted(there | expected.keys()):
        if name not in expected:
            checks.append(Check("text", name, 1, 0, "differences", "the checkpoint has none"))
            continue
        wrong = list(_differences(folder / name, expected[name], plan))
        checks.append(Check("text", name, len(wrong), 0, "differences", ", ".join(wrong[:3])))
    return checks


def _differences(file: Path, expected: bytes, plan: ExportPlan) -> Iterator[str]:
    if not file.is_file():
        yield "missing"
        return
    data = read_input(file, MAX_TOKENIZER)
    if data == expected:
        return
    if file.name == TOKENIZER_FILE and TOKENIZER_FILE in plan.text.made:
        # Made anew, another release of the library may write the same tokenizer in other words.
        try:
            if load_tokenizer(file).to_str() == plan.text.tokenizer.to_str():
                return
        except RetNetToolsError as error:
            yield error.found
            return
    try:
        found, own = (_settled(file.name, parse_json(text)) for text in (data, expected))
    except (ValueError, LookupError, TypeError, AttributeError):
        yield "other bytes"
        return
    if isinstance(own, Mapping) and isinstance(found, Mapping):
        yield from (str(key) for key in sorted({*own, *found}) if own.get(key) != found.get(key))
    elif found != own:
        yield "other content"


def _settled(name: str, document: Any) -> Any:
    """A document without what a user may set: of genai_config.json how to search, and where to run."""
    if name != GENAI_CONFIG_FILE:
        return document
    model = {key: value for key, value in document["model"].items() if key != "decoder"}
    decoder = document["model"]["decoder"]
    return model | {f"decoder.{key}": value for key, value in decoder.items() if key != "session_options"}
