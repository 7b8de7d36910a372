"""SentencePiece models (`.model`) as tokenizers: the same pieces for the same text.

What the `tokenizers` library cannot do as SentencePiece does, and so is not exact: several combining marks on one
letter, marks on a letter that is itself replaced, decomposed Hangul and half-width katakana with a voicing mark, all of
them only where the model has a normalization map; and of two cuts whose unigram scores differ by less than rounding,
SentencePiece's float32 may prefer another than float64 does, in texts of tens of thousands of characters. Control
tokens such as `</s>` are recognised in a text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError, UsageError
from retnet_tools.inputs import read_input

INSTALL = "pip install sentencepiece, then run this again"
SPACE = "▁"
MAX_PIECE = 1 << 10
_UNIGRAM, _BPE, _CHAR = 1, 2, 4
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_OWN_IDS = ("bos", "eos", "pad")


@dataclass(frozen=True)
class SentencePieceModel:
    """A parsed model.

    Attributes:
        pieces: its pieces in the order of their ids: what each is, its score and its kind.
        normalizer: its `NormalizerSpec`.
        trainer: its `TrainerSpec`.
        special_ids: of the tokens that start (`bos`), end (`eos`) and pad a text, where it has them.
    """

    file: Path
    pieces: tuple[tuple[str, float, int], ...]
    normalizer: Any
    trainer: Any
    special_ids: Mapping[str, int]

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        if not self.normalizer.precompiled_charsmap:
            return ()
        return (f"{self.file.name} is exact for text in NFC: decomposed letters may become other tokens",)

    @property
    def normal(self) -> list[str]:
        """The pieces that a text can become."""
        return [piece for piece, _, kind in self.pieces if kind in (_NORMAL, _USER_DEFINED, _BYTE)]

    @property
    def control(self) -> list[str]:
        """Tokens that no text becomes by itself, the unknown one included."""
        return [piece for piece, _, kind in self.pieces if kind in (_UNKNOWN, _CONTROL)]

    @property
    def unknown(self) -> str:
        """The token of what has no piece."""
        return next(piece for piece, _, kind in self.pieces if kind == _UNKNOWN)


def read_sentence_piece(file: Path) -> SentencePieceModel:
    """Parse a model.

    Raises:
        UsageError: the sentencepiece library is not installed.
        InputError: no such model, or one of a kind that the tokenizers library cannot express.
    """
    try:
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
    except ImportError as error:
        raise UsageError(f"{file.name} without the sentencepiece library", "it, to read the file", INSTALL) from error
    try:
        data = read_input(file)
        model = sentencepiece_model_pb2.ModelProto.FromString(data)
        if max((len(piece.piece) for piece in model.pieces), default=0) > MAX_PIECE:
            raise InputError(f"{file} has a piece of more than {MAX_PIECE} characters", "pieces of words")
        processor = SentencePieceProcessor(model_proto=data)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{file} cannot be read ({error})", "a SentencePiece model") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    for found, expected in (
        (trainer.model_type not in (_UNIGRAM, _BPE, _CHAR), "model_type unigram, bpe or char"),
        (trainer.treat_whitespace_as_suffix, "treat_whitespace_as_suffix off"),
        (not normalizer.escape_whitespaces, "escape_whitespaces on"),
        (any(piece.type == _UNUSED for piece in model.pieces), "no unused pieces"),
    ):
        if found:
            raise InputError(f"{file.name} is of a kind that tokenizer.json cannot express", expected)
    own = ((name, getattr(processor, f"{name}_id")()) for name in _OWN_IDS)
    return SentencePieceModel(
        file,
        tuple((piece.piece, piece.score, piece.type) for piece in model.pieces),
        normalizer,
        trainer,
        {name: number for name, number in own if number >= 0},
    )


def sentence_piece_tokenizer(
    model: SentencePieceModel, ids: Mapping[str, int], special: Sequence[str], *, dummy_prefix: bool | None = None
) -> Any:
    """A tokenizer that cuts a text as the model does.

    Args:
        model: gives the pieces, their scores and the normalization.
        ids: of every token: all pieces of the model, and any others, which no text becomes by itself.
        special: tokens that are recognised in a text, and that are not shown.
        dummy_prefix: a space before every text; None does as the model says.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    unigram = model.trainer.model_type == _UNIGRAM
    parts = _unigram(model, ids, special) if unigram else _bpe(model, ids)
    fallback = model.trainer.byte_fallback
    tokenizer = Tokenizer(
        models.Unigram(**parts, byte_fallback=fallback)
        if unigram
        else models.BPE(**parts, unk_token=model.unknown, fuse_unk=True, byte_fallback=fallback)
    )
    prefix = model.normalizer.add_dummy_prefix if dummy_prefix is None else dummy_prefix
    tokenizer.normalizer = _normalizer(model, prefix)
    if not unigram:
        tokenizer.pre_tokenizer = _whole_pieces(model)
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in special])
    return tokenizer


def _unigram(model: SentencePieceModel, ids: Mapping[str, int], special: Sequence[str]) -> dict[str, Any]:
    """Scores by id. User-defined pieces get the score that SentencePiece gives them, so that they are always chosen."""
    normal = [score for _, score, kind in model.pieces if kind == _NORMAL]
    lowest, highest = min(normal, default=0.0), max(normal, default=0.0)
    # A space is no part of a normalized text: what begins with one is never found in it.
    table = [(f" {number}", lowest) for number in range(1 + max(ids.values()))]
    for word, number in ids.items():
        table[number] = (word if word in special else f" {word}", lowest)
    for piece, score, kind in model.pieces:
        if kind == _USER_DEFINED:
            score = len(piece.encode()) * highest - 0.1
        table[ids[piece]] = (piece, score if kind in (_NORMAL, _USER_DEFINED) else lowest)
    return {"vocab": table, "unk_id": ids[model.unknown]}


def _bpe(model: SentencePieceModel, ids: Mapping[str, int]) -> dict[str, Any]:
    """SentencePiece joins the neighbours whose piece has the highest score: every way to join two pieces is a merge."""
    if model.trainer.model_type == _CHAR:
        return {"vocab": dict(ids), "merges": []}
    normal = {piece for piece, _, kind in model.pieces if kind == _NORMAL}
    ranked = sorted(
        (-score, number, cut)
        for number, (piece, score, kind) in enumerate(model.pieces)
        if kind == _NORMAL
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    )
    merges = [(model.pieces[number][0][:cut], model.pieces[number][0][cut:]) for _, number, cut in ranked]
    # A user-defined piece stands alone after `_whole_pieces`, and is found without merges.
    whole = any(kind == _USER_DEFINED for _, _, kind in model.pieces)
    return {"vocab": dict(ids), "merges": merges, "ignore_merges": whole}


def _whole_pieces(model: SentencePieceModel) -> Any:
    """User-defined pieces are cut out of a text first, the longest that fits."""
    import re

    from tokenizers import Regex, pre_tokenizers

    pieces = sorted((piece for piece, _, kind in model.pieces if kind == _USER_DEFINED), key=len, reverse=True)
    if not pieces:
        return None
    return pre_tokenizers.Split(Regex("|".join(map(re.escape, pieces))), behavior="isolated")


def _normalizer(model: SentencePieceModel, prefix: bool) -> Any:
    """The model's map, then spaces: fewer of them, one in front, and visible."""
    from tokenizers import Regex, normalizers

    spec, steps = model.normalizer, []
    if spec.precompiled_charsmap:
        mapped = normalizers.Precompiled(spec.precompiled_charsmap)
        # The library maps CR LF as one character and loses the second.
        lines = "".join(map(mapped.normalize_str, "\r\n"))
        steps += [*([normalizers.Replace("\r\n", lines)] if lines != "\r\n" else []), mapped]
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps.append(normalizers.Replace(" ", SPACE))
    if prefix:
        steps.append(normalizers.Prepend(SPACE))
    if spec.remove_extra_whitespaces:
        steps.append(normalizers.Replace(Regex(rf"{SPACE}+\z"), ""))
    return normalizers.Sequence(steps)
