"""Which of a model's files is its tokenizer, and what of them another folder of the model carries."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError, RetNetToolsError, UsageError
from retnet_tools.inputs import open_input, read_input
from retnet_tools.tokenizing.fairseq import (
    END_OF_TEXT,
    SPECIAL_IDS,
    byte_level_tokenizer,
    fairseq_byte_level,
    fairseq_sentence_piece,
    read_byte_level,
    read_dictionary,
)
from retnet_tools.tokenizing.sentence_piece import read_sentence_piece, sentence_piece_tokenizer
from retnet_tools.tokenizing.special import (
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    decoder_ids,
    read_json,
    token_text,
)
from retnet_tools.tokenizing.tokenizers_library import MAX_TOKEN_ID, library_errors

TOKENIZER_FILE = "tokenizer.json"
MAX_TOKENIZER = 1 << 26
COMPANIONS = (TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE, "chat_template.jinja", "chat_template.json")
"""What belongs to a tokenizer.json: settings, and how a conversation is written."""
_ADDED_FILE = "added_tokens.json"
_ALONE = ("vocab.txt", "vocab.json", "merges.txt", "encoder.json", "vocab.bpe")
_TIKTOKEN = ".tiktoken"
_LFS = b"version https://git-lfs"
_TRANSFORMERS = (
    'pip install transformers sentencepiece; python -c "from transformers import AutoTokenizer as T; '
    "T.from_pretrained('FOLDER').save_pretrained('FOLDER')\" writes a tokenizer.json"
)
# Classes of transformers that take the ids of the files as they are, and the tokens that each puts around a text.
_PIECE_CLASSES = {
    "LlamaTokenizer": ("bos",),
    "CodeLlamaTokenizer": ("bos",),
    "GemmaTokenizer": ("bos",),
    "T5Tokenizer": ("eos",),
    "PreTrainedTokenizer": (),
}
_BYTE_CLASSES: dict[str, tuple[str, ...]] = dict.fromkeys(
    ("GPT2Tokenizer", "GPTNeoXTokenizer", "CodeGenTokenizer", "PreTrainedTokenizer"), ()
)


@dataclass(frozen=True)
class FoundTokenizer:
    """A model's tokenizer.

    Attributes:
        tokenizer: a `tokenizers.Tokenizer`.
        files: what it was read from, or made of.
        special_ids: that it has itself, by `bos`, `eos` and `pad`.
        notes: what the user should know.
    """

    tokenizer: Any
    files: tuple[Path, ...]
    special_ids: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def made(self) -> bool:
        """Whether it has no tokenizer.json yet."""
        return self.files[0].name != TOKENIZER_FILE


@dataclass(frozen=True)
class TokenizerSearch:
    """What was found among a model's files.

    Attributes:
        found: the tokenizer, or None.
        problems: why files that might have been one are not.
    """

    found: FoundTokenizer | None
    problems: tuple[RetNetToolsError, ...]

    def require(self, purpose: str, action: str = "add one") -> FoundTokenizer:
        """The tokenizer that something (`purpose`) needs, or what to do (`action`).

        Raises:
            UsageError: there is none.
            InputError: there is one that cannot be read.
        """
        if self.found is not None:
            return self.found
        if self.problems:
            raise self.problems[0]
        raise UsageError(f"{purpose}, but no {TOKENIZER_FILE} with the model", "a tokenizer", action)

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        unusable = (f"no tokenizer: {error}" for error in self.problems)
        return (*unusable, *(() if self.found is None else self.found.notes))


def load_tokenizer(file: Path) -> Any:
    """The `tokenizers.Tokenizer` of a file, without the truncation and padding that it may ask for.

    Raises:
        InputError: a file that is missing or not a tokenizer.
    """
    from tokenizers import Tokenizer

    data = read_input(file, MAX_TOKENIZER)
    with library_errors(file):
        tokenizer = Tokenizer.from_buffer(data)
    # Settings of its training: they would cut a long text without a word.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def find_tokenizer(files: Iterable[Path], vocab_size: int) -> TokenizerSearch:
    """The tokenizer among a model's files: tokenizer.json, or one made of fairseq's dictionary, of a SentencePiece
    model or of a byte-level BPE, the first of these that can be used. Pieces that a dictionary lacks get ids from
    `vocab_size` on.
    """
    by_name = {file.name: file for file in files}
    problems: list[RetNetToolsError] = []
    for name in [name for name, file in by_name.items() if _is_lfs_pointer(file)]:
        del by_name[name]
        problems.append(InputError(f"{name} is a Git-LFS pointer", "the file itself", "run git lfs pull in its folder"))
    for make in (_own, _fairseq, _sentence_piece, _byte_level, _other):
        try:
            with library_errors(", ".join(by_name)):
                found = make(by_name, vocab_size)
        except RetNetToolsError as error:
            problems.append(error)
            continue
        if found is not None:
            return TokenizerSearch(found, tuple(problems))
    return TokenizerSearch(None, tuple(problems))


def _is_lfs_pointer(file: Path) -> bool:
    with open_input(file) as stream:
        return stream.read(len(_LFS)) == _LFS


def _own(files: Mapping[str, Path], vocab_size: int) -> FoundTokenizer | None:
    file = files.get(TOKENIZER_FILE)
    return None if file is None else FoundTokenizer(load_tokenizer(file), (file,))


def _fairseq(files: Mapping[str, Path], vocab_size: int) -> FoundTokenizer | None:
    dictionary = files.get("dict.txt")
    if dictionary is None:
        return None
    words = read_dictionary(dictionary)
    pair, pieces = _pair(files), _piece_file(files)
    if pair is not None and (pieces is None or any(word.isdecimal() for word in list(words)[4:8])):
        tokenizer, notes = fairseq_byte_level(words, *pair, vocab_size)
        return FoundTokenizer(tokenizer, (dictionary, *pair), SPECIAL_IDS, notes)
    if pieces is not None:
        tokenizer, notes = fairseq_sentence_piece(words, read_sentence_piece(pieces), vocab_size)
        return FoundTokenizer(tokenizer, (dictionary, pieces), SPECIAL_IDS, notes)
    raise InputError(
        "dict.txt: it says ids of words, not how a text is cut into them",
        "its SentencePiece model, or GPT-2's encoder.json and vocab.bpe, beside it",
        "put them there and run this again",
    )


def _sentence_piece(files: Mapping[str, Path], vocab_size: int) -> FoundTokenizer | None:
    file = _piece_file(files)
    if file is None or "dict.txt" in files:
        return None
    settings, model = _settings(files), read_sentence_piece(file)
    around = _around(settings, _PIECE_CLASSES, file)
    ids = {piece: number for number, (piece, _, _) in enumerate(model.pieces)}
    added = {token: number for token, number in _added(files, settings).items() if token not in ids}
    if clash := set(added.values()) & set(ids.values()):
        raise InputError(f"{file.name} and added tokens share the id {min(clash)}", "an id for each", _TRANSFORMERS)
    prefix = False if settings.get("add_prefix_space") is False else None
    tokenizer = sentence_piece_tokenizer(model, ids | added, [*model.control, *added], dummy_prefix=prefix)
    _put_around(tokenizer, around, settings, model.special_ids)
    return FoundTokenizer(tokenizer, (file,), model.special_ids, model.notes)


def _byte_level(files: Mapping[str, Path], vocab_size: int) -> FoundTokenizer | None:
    pair = _pair(files)
    if pair is None or "dict.txt" in files:
        return None
    settings, (ids, merges) = _settings(files), read_byte_level(*pair)
    around = _around(settings, _BYTE_CLASSES, pair[0])
    ids |= _added(files, settings)
    tokens = (token_text(settings.get(f"{key}_token")) for key in ("bos", "eos", "unk", "pad"))
    special = {END_OF_TEXT, *filter(None, tokens)}
    prefix = settings.get("add_prefix_space") is True
    tokenizer, missing = byte_level_tokenizer(
        ids, merges, sorted(special & ids.keys()), beyond=vocab_size, prefix_space=prefix
    )
    own = {"bos": ids[END_OF_TEXT], "eos": ids[END_OF_TEXT]} if END_OF_TEXT in ids else {}
    _put_around(tokenizer, around, settings, own)
    notes = (f"{pair[0].name} has no token for {missing} bytes: a prompt with one is refused",) if missing else ()
    return FoundTokenizer(tokenizer, pair, own, notes)


def _other(files: Mapping[str, Path], vocab_size: int) -> FoundTokenizer | None:
    if not {TOKENIZER_FILE, "dict.txt"} & files.keys() and _pair(files) is None and _piece_file(files) is None:
        for name in files:
            if name in _ALONE or name.endswith(_TIKTOKEN):
                raise InputError(f"{name} alone, which is no kind that is read here", TOKENIZER_FILE, _TRANSFORMERS)
    return None


def _pair(files: Mapping[str, Path]) -> tuple[Path, Path] | None:
    for vocab, merges in (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt")):
        if vocab in files and merges in files:
            return files[vocab], files[merges]
    return None


def _piece_file(files: Mapping[str, Path]) -> Path | None:
    return next((files[name] for name in sorted(files) if name.endswith(".model")), None)


def _settings(files: Mapping[str, Path]) -> dict[str, Any]:
    """tokenizer_config.json, and special_tokens_map.json where it says nothing."""
    found: dict[str, Any] = {}
    for name in (SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE):
        if name in files:
            found |= {key: value for key, value in read_json(files[name]).items() if value is not None}
    return found


def _added(files: Mapping[str, Path], settings: Mapping[str, Any]) -> dict[str, int]:
    """Ids of tokens that came after the tokenizer's training."""
    found = read_json(files[_ADDED_FILE]) if _ADDED_FILE in files else {}
    found |= decoder_ids(settings)
    if wrong := [token for token, id in found.items() if type(id) is not int or not 0 <= id <= MAX_TOKEN_ID]:
        raise InputError(f"the added token {wrong[0]!r} has the id {found[wrong[0]]}", f"0 to {MAX_TOKEN_ID}")
    return found


def _around(settings: Mapping[str, Any], known: Mapping[str, tuple[str, ...]], file: Path) -> tuple[str, ...]:
    """Which special tokens stand before (`bos`) and after (`eos`) a text."""
    name = settings.get("tokenizer_class")
    base = "PreTrainedTokenizer" if name is None else str(name).removesuffix("Fast")
    if base not in known:
        raise InputError(f"{file.name} of a {name}, which may change its ids", f"{TOKENIZER_FILE}", _TRANSFORMERS)
    return tuple(key for key in ("bos", "eos") if settings.get(f"add_{key}_token", key in known[base]))


def _put_around(
    tokenizer: Any, around: Sequence[str], settings: Mapping[str, Any], special_ids: Mapping[str, int]
) -> None:
    from tokenizers import processors

    tokens: dict[str, tuple[str, int]] = {}
    for key in around:
        token = token_text(settings.get(f"{key}_token"))
        if token is None and key in special_ids:
            token = tokenizer.id_to_token(special_ids[key])
        number = None if token is None else tokenizer.token_to_id(token)
        if token is None or number is None:
            raise InputError(f"add_{key}_token without a {key}_token", "a token of the tokenizer", _TRANSFORMERS)
        tokens[key] = (token, number)
    if tokens:
        before, after = ([tokens[key][0]] if key in tokens else [] for key in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after], special_tokens=[*tokens.values()]
        )
