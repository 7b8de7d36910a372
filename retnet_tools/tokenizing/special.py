"""Tokens that start, end and pad a text, and the other settings of generation_config.json."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet_tools.errors import InputError
from retnet_tools.inputs import load_json

GENERATION_FILE = "generation_config.json"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
NAMES = ("bos", "eos", "pad")

_OPTIONS = {
    "do_sample": "--temperature above 0",
    "temperature": "--temperature {}",
    "top_k": "--top-k {}",
    "top_p": "--top-p {}",
    "min_p": "--min-p {}",
    "repetition_penalty": "--repetition-penalty {}",
    "max_new_tokens": "-n {}",
    "stop_strings": "--stop for each",
}
"""What gives a setting to `generate`; it has no option for any other."""
_ONES = ("temperature", "top_p", "typical_p", "repetition_penalty", "encoder_repetition_penalty", "length_penalty")
_NEUTRAL = {
    **dict.fromkeys((*_ONES, "guidance_scale", "num_beams", "num_beam_groups", "num_return_sequences"), 1),
    "max_length": 20,
    "use_cache": True,
}
"""Values that change nothing; None, False, 0 and what is empty change nothing anywhere."""
_NO_SETTINGS = ("_from_model_config", "transformers_version", *(f"{name}_token_id" for name in NAMES))


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of special tokens, those alone that the model has.

    Attributes:
        ids: of `bos`, `eos` and `pad`, where any are known.
        said: the same as they were found, with ids that the model does not have.
        notes: what the user should know.
    """

    ids: Mapping[str, tuple[int, ...]]
    said: Mapping[str, tuple[int, ...]]
    notes: tuple[str, ...]


def special_tokens(
    folders: Iterable[Path],
    vocab_size: int,
    tokenizer: Any = None,
    *,
    settings: Mapping[str, Any] | None = None,
    own: Mapping[str, int] | None = None,
) -> SpecialTokens:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`, each a number or a list, from the first that names it:
    generation_config.json, the model's configuration, tokenizer_config.json, special_tokens_map.json, the tokenizer.

    Args:
        folders: where these files lie.
        vocab_size: of the model.
        tokenizer: knows ids of tokens; None where there is none, and only ids count.
        settings: the model's configuration, config.json.
        own: ids that the tokenizer itself has.

    Raises:
        InputError: a file that is not a JSON object, or an id that is no number.
    """
    folders = list(dict.fromkeys(folders))
    known: dict[str, int] = {}
    sources: list[tuple[str, Mapping[str, Any], bool]] = [("config.json", settings or {}, False)]
    for name in (GENERATION_FILE, TOKENIZER_CONFIG_FILE, SPECIAL_TOKENS_FILE):
        for folder in folders:
            document: Mapping[str, Any] = read_json(folder / name)
            known |= decoder_ids(document)
            sources.insert(0 if name == GENERATION_FILE else len(sources), (name, document, name != GENERATION_FILE))
    said: dict[str, tuple[int, ...]] = {}
    notes = []
    for name in NAMES:
        for place, document, has_tokens in sources:
            ids = _ids(place, f"{name}_token_id", document)
            if not ids and has_tokens:
                ids = tuple(dict.fromkeys(_resolved(document.get(f"{name}_token"), tokenizer, known)))
            if ids:
                said[name] = ids
                notes += [
                    f"{place} has {name}_token_id {i}, which is none of the model's {vocab_size} tokens"
                    for i in ids
                    if not 0 <= i < vocab_size
                ]
                break
        else:
            if own and name in own:
                said[name] = (own[name],)
    had = {name: tuple(i for i in found if 0 <= i < vocab_size) for name, found in said.items()}
    return SpecialTokens({name: found for name, found in had.items() if found}, said, tuple(notes))


def generation_settings(folders: Iterable[Path], special: SpecialTokens) -> dict[str, Any]:
    """What generation_config.json of another folder is to say: as here, with all special tokens."""
    found: dict[str, Any] = {}
    for folder in dict.fromkeys(folders):
        found |= read_json(folder / GENERATION_FILE)
    named = {f"{name}_token_id": ids[0] if len(ids) == 1 else list(ids) for name, ids in special.said.items()}
    return found | named


def generation_notes(document: Mapping[str, Any]) -> list[str]:
    """Each setting of generation_config.json that would change what is generated, and how to give it to `generate`."""
    notes = []
    for key, value in document.items():
        if key in _NO_SETTINGS or not value or value == _NEUTRAL.get(key):
            continue
        option = _OPTIONS.get(key)
        how = "generate has no such option" if option is None else f"give {option.format(value)} to generate"
        notes.append(f"{GENERATION_FILE} says {key} = {_short(value)}: {how}")
    return notes


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object of a file, empty where there is no file.

    Raises:
        InputError: anything else.
    """
    if not path.is_file():
        return {}
    data = load_json(path, "a JSON object", "correct it")
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {type(data).__name__}", "a JSON object")
    return data


def token_text(token: Any) -> str | None:
    """The token of a tokenizer's setting, which is a text or an object with a `content`."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else None


def _ids(place: str, key: str, document: Mapping[str, Any]) -> tuple[int, ...]:
    value = document.get(key)
    if value is None:
        return ()
    ids: Sequence[Any] = value if isinstance(value, list) else [value]
    if not all(type(number) is int for number in ids):
        raise InputError(f"{place} has {key} {_short(value)}", "a token id or a list of them")
    return tuple(dict.fromkeys(ids))


def _resolved(words: Any, tokenizer: Any, known: Mapping[str, int]) -> Iterator[int]:
    for word in words if isinstance(words, list) else [words]:
        if type(word) is int:
            yield word
            continue
        text = token_text(word)
        number = None if text is None or tokenizer is None else tokenizer.token_to_id(text)
        number = known.get(text) if number is None and text is not None else number
        if number is not None:
            yield number


def decoder_ids(document: Mapping[str, Any]) -> dict[str, int]:
    """Ids by token of `added_tokens_decoder`.

    Raises:
        InputError: one that is no number.
    """
    table = document.get("added_tokens_decoder") or {}
    if not isinstance(table, dict) or not all(key.isascii() and key.isdecimal() and len(key) < 20 for key in table):
        raise InputError(f"added_tokens_decoder is {_short(table)}", "an object from ids to tokens")
    return {text: int(key) for key, token in table.items() if (text := token_text(token)) is not None}


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, bool | str) else reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
