"""What another folder of a model carries for text: an export, or the checkpoint in another format."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retnet_tools.tokenizing.files import COMPANIONS, TOKENIZER_FILE, find_tokenizer
from retnet_tools.tokenizing.special import (
    GENERATION_FILE,
    SpecialTokens,
    generation_notes,
    generation_settings,
    special_tokens,
)


@dataclass(frozen=True)
class CarriedText:
    """A model's tokenizer and special tokens, on their way into another folder.

    Attributes:
        tokenizer: a `tokenizers.Tokenizer`, or None.
        copies: files of the tokenizer that are copied.
        made: files that are written: tokenizer.json where it is made of others, generation_config.json.
        special: ids of special tokens.
        notes: what cannot be used and how to change that; settings that `generate` does not apply.
    """

    tokenizer: Any
    copies: tuple[Path, ...]
    made: Mapping[str, str]
    special: SpecialTokens
    notes: tuple[str, ...]

    @property
    def tokenizer_files(self) -> tuple[str, ...]:
        """Names of the files that make the tokenizer there."""
        names = (*(file.name for file in self.copies), *self.made)
        return tuple(sorted(name for name in names if name != GENERATION_FILE))


def carried_text(files: Sequence[Path], settings: Mapping[str, Any], vocab_size: int) -> CarriedText:
    """What to carry of a model.

    Args:
        files: its tokenizer and generation files.
        settings: its configuration, config.json, as far as it has one.
        vocab_size: 0 for a stack without a vocabulary, which carries nothing.

    Raises:
        InputError: a file of settings that is not a JSON object, or a special token's id that is no number.
    """
    if vocab_size == 0:
        return CarriedText(None, (), {}, SpecialTokens({}, {}, ()), ())
    search, folders = find_tokenizer(files, vocab_size), [file.parent for file in files]
    found, made, copies = search.found, dict[str, str](), tuple[Path, ...]()
    tokenizer = own = None
    if found is not None:
        tokenizer, own = found.tokenizer, found.special_ids
        copies = (*(() if found.made else found.files), *(file for file in files if file.name in COMPANIONS))
        if found.made:
            made[TOKENIZER_FILE] = tokenizer.to_str()
    special = special_tokens(folders, vocab_size, tokenizer, settings=settings, own=own)
    document = generation_settings(folders, special)
    if document:
        made[GENERATION_FILE] = json.dumps(document, indent=2) + "\n"
    notes = (*search.notes, *special.notes, *generation_notes(document))
    return CarriedText(tokenizer, copies, made, special, notes)
