"""Where logits of a text come from: an exported folder here, a checkpoint in `retnet_tools.model.streaming`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from retnet_tools.dtypes import FloatName
from retnet_tools.errors import UsageError
from retnet_tools.formats import CheckpointSource
from retnet_tools.graph.contract import MANIFEST_FILE
from retnet_tools.runtime.providers import CPU, Device
from retnet_tools.runtime.session import DecoderSession
from retnet_tools.tokenizing.files import TOKENIZER_FILE
from retnet_tools.weights import Array


class TokenReader(Protocol):
    """A model as far as texts become its tokens.

    Attributes:
        name: its path, for people.
        tokenizer_files: files beside it, its tokenizer among them if it has one.
    """

    name: str
    vocab_size: int
    tokenizer_files: tuple[Path, ...]


class LogitsSource(TokenReader, Protocol):
    """A model that is shown token rows and says what it expected next (teacher forcing).

    Attributes:
        description: kind and number type, for people.
        notes: what the user should know about how it was read.
    """

    description: str
    notes: tuple[str, ...]

    def stream(self, rows: Array, block: int) -> Iterator[Array]:
        """Logits after every token of rows `[B, T]` int64, from zero states and position 0.

        Yields:
            `[B, block, vocab]` float32 or float64, in order; the last block may be shorter. Memory: one block.
        """
        ...


class ExportLogits:
    """An exported folder: decoder.onnx reads rows by chunks (Eq. 7) and gives the logits of every token.

    Args:
        folder: what `retnet-tools export` wrote.
        device: where to run; None is the CPU.
        threads: of the CPU provider; None chooses by the size of the work.
        cuda_graph: as `DecoderSession`.

    Raises:
        UsageError: a stack without a vocabulary.
        InputError, ProviderError: as `DecoderSession`.
    """

    def __init__(
        self,
        folder: Path,
        device: Device | None = None,
        threads: int | None = None,
        *,
        cuda_graph: bool | None = None,
    ) -> None:
        self._session = DecoderSession(folder, device, threads, cuda_graph=cuda_graph, prompts=True)
        manifest = self._session.manifest
        if not manifest.config.has_vocabulary:
            raise UsageError(f"{folder} is a stack without embedding and head", "a model with a vocabulary")
        scheme = "" if manifest.quantization is None else ", quantized"
        self.name = str(folder)
        self.description = f"export, {manifest.dtype}{scheme}, {manifest.ops} operators, {self._session.device.kind}"
        self.vocab_size = manifest.config.vocab_size
        self.tokenizer_files = tuple(file for file in (folder / TOKENIZER_FILE,) if file.is_file())
        self.notes: tuple[str, ...] = ()

    def stream(self, rows: Array, block: int) -> Iterator[Array]:
        """Logits `[B, block, vocab]` float32 of rows `[B, T]`; see `LogitsSource.stream`.

        Raises:
            UsageError: ids outside the vocabulary, or rows longer than the graph can place.
        """
        state = self._session.new_state(len(rows))
        yield from self._session.score(rows, state, chunk_size=block)


def is_export(path: Path) -> bool:
    """Whether a path is an exported folder."""
    return (path / MANIFEST_FILE).is_file()


def open_logits(
    source: CheckpointSource,
    device: Device | None = None,
    threads: int | None = None,
    dtype: FloatName = "float32",
    *,
    cuda_graph: bool | None = None,
) -> LogitsSource:
    """A model that scores text: an exported folder on a device, or a checkpoint, which torch runs on the CPU.

    Raises:
        UsageError: a checkpoint for another device, or a stack without a vocabulary.
        InputError, ProviderError: as the exported folder and the checkpoint.
    """
    path = source.path
    if not source.says_how and is_export(path):
        return ExportLogits(path, device, threads, cuda_graph=cuda_graph)
    if device is not None and device.provider is not CPU:
        raise UsageError(
            f"--device {device.kind} for {path}, which is no export", "--device cpu", "export the checkpoint"
        )
    # torch is not to be loaded where an export is scored.
    from retnet_tools.model.streaming import CheckpointLogits

    return CheckpointLogits(source.open(), dtype, threads)
