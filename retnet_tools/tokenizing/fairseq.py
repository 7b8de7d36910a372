"""fairseq's dict.txt: the ids of words that a SentencePiece model or GPT-2's BPE beside it makes of a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError
from retnet_tools.tokenizing.byte_level import byte_level_tokenizer, read_byte_level
from retnet_tools.tokenizing.sentence_piece import SentencePieceModel, sentence_piece_tokenizer

SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
SPECIAL_IDS = {"bos": 0, "pad": 1, "eos": 2}


def read_dictionary(file: Path) -> dict[str, int]:
    """Ids by word: four of fairseq's own, then a line each, `word count [#fairseq:overwrite]`.

    Raises:
        InputError: a line of another kind, or a word that comes twice.
    """
    ids, count = dict(SPECIAL), len(SPECIAL)
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                word, _, last = line.rstrip().rpartition(" ")
                if overwrite := last == "#fairseq:overwrite":
                    word, _, last = word.rpartition(" ")
                if not word or not _is_number(last):
                    raise InputError(f"{file} has {line.strip()!r} in line {number}", "a word and its count")
                if word in ids and not overwrite:
                    raise InputError(f"{file} has {word!r} twice (line {number})", "every word once")
                ids[word] = count
                count += 1
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 ({error.reason})", "fairseq's dictionary") from error
    return ids


def fairseq_sentence_piece(
    words: Mapping[str, int], model: SentencePieceModel, beyond: int
) -> tuple[Any, tuple[str, ...]]:
    """A tokenizer of a SentencePiece model with the dictionary's ids, and what the user should know.

    Args:
        words: of `read_dictionary`.
        beyond: first id for pieces that are no words, which a text should not become in silence.
    """
    ids = dict(words)
    ids[model.unknown] = ids.pop("<unk>")
    ids, notes = _complete(ids, model.normal, beyond, model.file.name)
    ids, _ = _complete(ids, model.control, beyond, model.file.name)
    special = [*model.control, *(token for token in SPECIAL if token in ids)]
    return sentence_piece_tokenizer(model, ids, special), (*notes, *model.notes)


def fairseq_byte_level(words: Mapping[str, int], vocab: Path, merges: Path, beyond: int) -> tuple[Any, tuple[str, ...]]:
    """A tokenizer of GPT-2's BPE with the dictionary's ids, whose words are GPT-2's ids in decimal.

    Raises:
        InputError: as `read_byte_level`, or a dictionary of other words.
    """
    numbers, pairs = read_byte_level(vocab, merges)
    tokens = {str(number): token for token, number in numbers.items()}
    ids = {tokens.get(word, word): number for word, number in words.items()}
    if not any(word in tokens for word in words):
        raise InputError("dict.txt holds no number", f"the ids of {vocab.name} as its words")
    ids, notes = _complete(ids, numbers, beyond, vocab.name)
    tokenizer, _ = byte_level_tokenizer(ids, pairs, SPECIAL, beyond=beyond)
    return tokenizer, notes


def _complete(
    ids: Mapping[str, int], pieces: Iterable[str], beyond: int, name: str
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Ids for the pieces that have none."""
    missing = [piece for piece in pieces if piece not in ids]
    beyond = max(beyond, 1 + max(ids.values()))
    notes: tuple[str, ...] = ()
    if missing:
        count = len(missing)
        notes = (f"dict.txt lacks {count} pieces of {name}, such as {missing[0]!r}: a prompt that has one is refused",)
    return {**ids, **{piece: beyond + i for i, piece in enumerate(missing)}}, notes


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
