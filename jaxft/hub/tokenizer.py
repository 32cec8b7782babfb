"""Tokenizers, through transformers."""

from pathlib import Path
from typing import Any

from jaxft.errors import JaxftError
from jaxft.hub.load import resolve


def load_tokenizer(path_or_id: str | Path) -> Any:
    """The tokenizer of a directory, hub id or embedded model: a transformers `PreTrainedTokenizerBase`.

    Raises JaxftError if there is none, or transformers cannot read it.
    """
    from transformers import AutoTokenizer  # slow to import, and needed here only

    directory = resolve(path_or_id, weights=False)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise JaxftError(f"{directory} holds no tokenizer: expected tokenizer.json, tokenizer.model or vocab.json")
    try:
        return AutoTokenizer.from_pretrained(str(directory))
    except Exception as error:  # a file that is not as it should be raises whatever the code that meets it raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise JaxftError(f"{directory}: transformers cannot load its tokenizer ({reason})") from error
