"""Tokenizers, through transformers."""

import json
from pathlib import Path
from typing import Any

from jaxft.errors import JaxftError
from jaxft.hub.load import resolve

# The class that knows nothing beyond tokenizer.json, by both of its names.
_GENERIC = ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_tokenizer(path_or_id: str | Path) -> Any:
    """The tokenizer of a directory, hub id or embedded model: a transformers `PreTrainedTokenizerBase`.

    Raises JaxftError if there is none, or transformers cannot read it.
    """
    directory = resolve(path_or_id, weights=False)
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise JaxftError(f"{directory} holds no tokenizer: expected tokenizer.json, tokenizer.model or vocab.json")
    try:
        return _loader(directory).from_pretrained(str(directory))
    except Exception as error:  # a file that is not as it should be raises whatever the code that meets it raises
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise JaxftError(f"{directory}: transformers cannot load its tokenizer ({reason})") from error


def _loader(directory: Path) -> Any:
    """What of transformers reads the tokenizer. Imported here, and not before: it is slow.

    `AutoTokenizer` first imports the model's configuration, and with it torch where that is installed: half of the time
    in which a run starts. A Llama that names the generic class gets that one from it; with other types of models it has
    a mind of its own.
    """
    files = {name: directory / name for name in ("tokenizer.json", "tokenizer_config.json", "config.json")}
    if all(file.is_file() for file in files.values()):
        declared, model = (
            json.loads(files[name].read_text(encoding="utf-8")) for name in ("tokenizer_config.json", "config.json")
        )
        named = declared.get("tokenizer_class") in _GENERIC and "auto_map" not in declared
        if named and model.get("model_type") == "llama":
            from transformers import PreTrainedTokenizerFast

            return PreTrainedTokenizerFast
    from transformers import AutoTokenizer

    return AutoTokenizer
