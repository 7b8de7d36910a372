"""Faults planted in exported folders, by editing graphs and files as onnx has them, apart from what wrote them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from tokenizers import Tokenizer, models

from retnet_tools.config import RetNetConfig
from retnet_tools.weights import Array

STEP, PREFILL, DECODER, GENAI = "step.onnx", "prefill.onnx", "decoder.onnx", "model.onnx"
Edit = Callable[[onnx.GraphProto, RetNetConfig], bool]
"""Plants a fault in a graph; False where it has nothing of the kind."""


def subgraphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and all within it."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from subgraphs(attribute.g)


def rewire(graph: onnx.GraphProto, old: str, new: str, *, but: str = "") -> None:
    """Let all that reads a value read another, but for the node of this name."""
    for inner in subgraphs(graph):
        for node in inner.node:
            for i, name in enumerate(node.input):
                if name == old and node.name != but:
                    node.input[i] = new


def find(graph: onnx.GraphProto, name: str) -> onnx.NodeProto | None:
    return next((node for node in graph.node if node.name == name), None)


def maker(graph: onnx.GraphProto, value: str) -> onnx.NodeProto | None:
    return next((node for node in graph.node if value in node.output), None)


def constant(graph: onnx.GraphProto, name: str) -> onnx.TensorProto | None:
    return next((tensor for tensor in graph.initializer if tensor.name == name), None)


def put_first(graph: onnx.GraphProto, *nodes: onnx.NodeProto) -> None:
    for node in reversed(nodes):
        graph.node.insert(0, node)


def swapped_q_and_k(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    node = find(graph, f"layers.{config.num_layers - 1}/retention/Split")
    if node is None or config.num_kv_groups > 1:
        return False
    node.output[0], node.output[1] = node.output[1], node.output[0]
    return True


def dropped_norm(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    """The norm that a block's weight names; it may be part of a sum."""
    for node in graph.node:
        if "Norm" in node.op_type and len(node.input) > 1 and any("ffn_norm.weight" in name for name in node.input):
            if node.op_type.startswith("Skip"):
                rewire(graph, node.output[0], node.output[3])
            else:
                rewire(graph, node.output[0], node.input[0])
            return True
    return False


def dropped_head_norm(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    for node in graph.node:
        if "Normalization" in node.op_type and node.input[1] == "head_norm.ones":
            rewire(graph, node.output[0], node.input[0])
            return True
    return False


def neighbours_gamma(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    if (
        len(set(config.decay)) < config.num_heads
        or config.num_heads == 1
        or (config.key_decay and len(config.key_decay) > config.head_k_dim // 2)
    ):
        return False
    found = False
    for name in ("gamma", "log_gamma", "log_gamma_heads"):
        if (tensor := constant(graph, name)) is not None:
            array = numpy_helper.to_array(tensor)
            turned = np.roll(array.reshape(config.num_heads, -1), 1, axis=0).reshape(array.shape)
            tensor.CopyFrom(numpy_helper.from_array(turned, name))
            found = True
    return found


def one_neighbours_gamma(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    """The last head, whose memory is the longest in published schedules, has that of the one before."""
    if (
        config.num_heads == 1
        or config.decay[-1] == config.decay[-2]
        or (config.key_decay and len(config.key_decay) > config.head_k_dim // 2)
    ):
        return False
    found = False
    for name in ("gamma", "log_gamma", "log_gamma_heads"):
        if (tensor := constant(graph, name)) is not None:
            array = numpy_helper.to_array(tensor).copy()
            heads = array.reshape(config.num_heads, -1)
            heads[-1] = heads[-2]
            tensor.CopyFrom(numpy_helper.from_array(array, name))
            found = True
    return found


def has_positions(config: RetNetConfig) -> bool:
    return any(config.rotary_frequencies)


def stale_positions(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    """All tokens of a run at the position of its first one; in steps, where that is right, all at 0."""
    if not has_positions(config):
        return False
    if graph.name == "retnet_step":
        nodes = [helper.make_node("Sub", ["position_ids", "position_ids"], ["stale"], "stale")]
    else:
        graph.initializer.append(numpy_helper.from_array(np.array([0]), "stale_first"))
        nodes = [
            helper.make_node("Gather", ["position_ids", "stale_first"], ["stale_one"], "stale_a", axis=1),
            helper.make_node("Sub", ["position_ids", "position_ids"], ["stale_none"], "stale_b"),
            helper.make_node("Add", ["stale_one", "stale_none"], ["stale"], "stale_c"),
        ]
    if graph.name == "retnet_genai":
        # Padding is told by positions there, and goes on to be.
        target = next((n for n in graph.node if n.op_type == "Mul" and n.name == "inputs/Mul"), None)
        if target is None:
            return False
        before = target.input[0]
        target.input[0] = "stale"
        at = list(graph.node).index(target)
        for node in reversed(nodes):
            graph.node.insert(at, node)
        return before != "stale"
    for node in nodes:
        assert node.name.startswith("stale")
    rewire(graph, "position_ids", "stale")
    put_first(graph, *nodes)
    return True


def late_positions(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    """One less than they are."""
    if not has_positions(config) or graph.name == "retnet_genai":
        return False
    for name, value in (("late_one", 1), ("late_zero", 0)):
        graph.initializer.append(numpy_helper.from_array(np.array(value), name))
    rewire(graph, "position_ids", "late")
    put_first(
        graph,
        helper.make_node("Sub", ["position_ids", "late_one"], ["late_less"], "late_a"),
        helper.make_node("Max", ["late_less", "late_zero"], ["late"], "late_b"),
    )
    return True


def transposed_state(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    """K and V of the last layer's state change places, its shape stays."""
    name = f"present.{config.num_layers - 1}.recurrent_state"
    if min(config.head_k_dim, config.head_v_dim) == 1:
        return False
    for node in graph.node:
        for i, output in enumerate(node.output):
            if output == name:
                node.output[i] = "upright"
    rewire(graph, name, "upright")
    graph.initializer.append(
        numpy_helper.from_array(np.array([0, 0, config.head_k_dim, config.head_v_dim]), "upright_shape")
    )
    graph.node.extend(
        [
            helper.make_node("Transpose", ["upright"], ["lying"], "lying_a", perm=[0, 1, 3, 2]),
            helper.make_node("Reshape", ["lying", "upright_shape"], [name], "lying_b"),
        ]
    )
    return True


def ignored_mask(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    if graph.name == "retnet_step":
        return False
    if graph.name in ("retnet_prefill", "retnet_decoder"):
        graph.initializer.append(numpy_helper.from_array(np.array(1), "all_one"))
        rewire(graph, "attention_mask", "all_real")
        put_first(
            graph,
            helper.make_node("Sub", ["attention_mask", "attention_mask"], ["all_none"], "all_a"),
            helper.make_node("Add", ["all_none", "all_one"], ["all_real"], "all_b"),
        )
        return True
    node = find(graph, "inputs/Or")
    if node is None:
        return False
    graph.node.insert(
        list(graph.node).index(node) + 1, helper.make_node("Or", [node.output[0], "every"], ["all_real"], "all_a")
    )
    graph.initializer.append(numpy_helper.from_array(np.array(True), "every"))
    rewire(graph, node.output[0], "all_real", but="all_a")
    return True


def no_key_scale(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    scale = config.score_normalization.key_scale
    tensor = constant(graph, f"scale_{scale!r}_float32")
    if tensor is None or scale in (config.embedding_scale, config.residual_alpha):
        return False
    tensor.CopyFrom(numpy_helper.from_array(np.array(1, np.float32), tensor.name))
    return True


def dropped_gate(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    name = f"layers.{config.num_layers - 1}/retention"
    split = find(graph, f"{name}/Split")
    if config.gate is None or split is None:
        return False
    reached = {split.output[-1]}
    for node in graph.node:
        if node.name.startswith(f"{name}/") and reached & set(node.input):
            others = [value for value in node.input if value not in reached]
            if node.op_type == "Mul" and others and "retention" in others[0]:
                rewire(graph, node.output[0], others[0])
                return True
            reached.update(node.output)
    return False


def other_embedding_scale(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    """What the embedding gives is scaled by the root of the width, or is not where it should be."""
    node = find(graph, "embedding/Reshape")
    if node is None or not config.has_vocabulary or config.embedding_norm:
        return False
    factor = config.hidden_size**0.5 if config.embedding_scale == 1 else 1 / config.embedding_scale
    weight = constant(graph, "embedding.weight") or constant(graph, "layers.0.retention_norm.weight")
    assert weight is not None
    kind = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}.get(weight.data_type, np.float32)
    graph.initializer.append(numpy_helper.from_array(np.array(factor, kind), "wrong_scale"))
    at = list(graph.node).index(node) + 1
    graph.node.insert(at, helper.make_node("Mul", [node.output[0], "wrong_scale"], ["wrongly_scaled"], "wrong"))
    rewire(graph, node.output[0], "wrongly_scaled", but="wrong")
    return True


def other_layers_weights(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    """The last layer reads the feed-forward weights of the first."""
    if config.num_layers == 1:
        return False
    last, found = f"layers.{config.num_layers - 1}.ffn.down_proj.weight", False
    for tensor in graph.initializer:
        if tensor.name.startswith(last):
            theirs = constant(graph, tensor.name.replace(last, "layers.0.ffn.down_proj.weight"))
            if theirs is not None and theirs.external_data:
                del tensor.external_data[:]
                tensor.external_data.extend(theirs.external_data)
                found = True
    return found


def lost_state(graph: onnx.GraphProto, config: RetNetConfig) -> bool:
    """A layer starts every run from nothing."""
    name = f"past_key_values.{config.num_layers - 1}.recurrent_state"
    rewire(graph, name, "lost")
    put_first(graph, helper.make_node("Sub", [name, name], ["lost"], "lost"))
    return True


EDITS: dict[str, Edit] = {
    edit.__name__: edit
    for edit in (
        swapped_q_and_k,
        dropped_norm,
        dropped_head_norm,
        neighbours_gamma,
        one_neighbours_gamma,
        stale_positions,
        late_positions,
        transposed_state,
        ignored_mask,
        no_key_scale,
        dropped_gate,
        other_embedding_scale,
        other_layers_weights,
        lost_state,
    )
}


def plant(
    folder: Path, edit: Edit, config: RetNetConfig, graphs: tuple[str, ...] = (STEP, PREFILL, DECODER, GENAI)
) -> bool:
    """Plant a fault in the graphs of a folder; False where none has the like."""
    planted = False
    for name in graphs:
        if (folder / name).is_file():
            model = onnx.load(folder / name, load_external_data=False)
            if edit(model.graph, config):
                onnx.save(model, folder / name)
                planted = True
    record_again(folder)
    return planted


def record_again(folder: Path) -> None:
    """Let retnet.json say of the files what they are, as of an exporter that wrote the fault itself."""
    file = folder / "retnet.json"
    document = json.loads(file.read_text())
    for name in document["files"]:
        if (path := folder / name).is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            document["files"][name] = {"bytes": path.stat().st_size, "sha256": digest}
    file.write_text(json.dumps(document))


def stored_places(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Offset, bytes and bytes of an element of each tensor of weights.data."""
    places = {}
    for name in (STEP, PREFILL, DECODER, GENAI):
        if (folder / name).is_file():
            for tensor in onnx.load(folder / name, load_external_data=False).graph.initializer:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                if entries:
                    size = max(1, helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
                    places[tensor.name] = int(entries["offset"]), int(entries["length"]), size
    return places


def changed_byte(folder: Path, place: int, flip: int) -> None:
    """Change bits of one byte of weights.data."""
    with (folder / "weights.data").open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ flip]))
    record_again(folder)


def byte_places(folder: Path, rng: np.random.Generator) -> dict[str, tuple[int, int]]:
    """Bytes to change, and which bits: of each kind of tensor one, at random."""
    kinds: dict[str, list[tuple[int, int]]] = {}
    for name, (offset, size, itemsize) in stored_places(folder).items():
        element = offset + itemsize * int(rng.integers(size // itemsize))
        if name.startswith("positions."):
            kinds.setdefault("table", []).append((element, 1))
        elif name.endswith((".codes", ".zero_points")):
            kinds.setdefault(name.rsplit(".", 1)[1], []).append(
                (offset + int(rng.integers(size)), 1 << int(rng.integers(8)))
            )
        else:
            kind = "scale" if name.endswith(".scales") else "float"
            kinds.setdefault(f"{kind}, exponent", []).append((element + itemsize - 1, 0x40))
            kinds.setdefault(f"{kind}, sign", []).append((element + itemsize - 1, 0x80))
            kinds.setdefault(f"{kind}, last bit", []).append((element, 1))
    ends = sorted((offset + size, offset + size) for offset, size, _ in stored_places(folder).values())
    gap = next((end for end, _ in ends if end % 4096), None)
    chosen = {kind: places[int(rng.integers(len(places)))] for kind, places in kinds.items()}
    total = (folder / "weights.data").stat().st_size
    return chosen | ({"gap": (gap, 1)} if gap is not None and gap < total else {})


def other_tokenizer(folder: Path) -> bool:
    """Another model's tokenizer in the place of this one's."""
    if not (folder / "tokenizer.json").is_file():
        return False
    size = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    words = {f"w{number}": number for number in range(size)}
    Tokenizer(models.WordLevel(words, unk_token="w0")).save(str(folder / "tokenizer.json"))
    record_again(folder)
    return True


def array_of(folder: Path, name: str) -> Array:
    offset, size, _ = stored_places(folder)[name]
    return np.fromfile(folder / "weights.data", np.uint8, size, offset=offset)
