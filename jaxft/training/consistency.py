"""What every process of a run must have alike, as flat dicts for `jaxft.distributed.agree`."""

import functools
import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxft.data.sources import locate
from jaxft.hub import resolve
from jaxft.training.output import flat_config, versions

WHOLE = 64 * 2**20  # bytes; larger files are sampled
PIECES, PIECE = 256, 64 * 2**10


def start_facts(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, the library's own source, devices, and the resolved configuration, key by key."""
    code = {name: version for name, version in versions().items() if name != "device"}
    device = jax.local_devices()[0]
    return {
        **code,
        "jaxft source": source_hash(),
        "devices of a process": f"{jax.local_device_count()} x {device.device_kind} ({device.platform})",
        **{f"config {key}": value for key, value in flat_config(resolved).items()},
    }


@functools.cache
def source_hash() -> str:
    """A hash (16 hex digits) of the library's Python files: two checkouts may have the same version number."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.blake2b(digest_size=8)
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    return digest.hexdigest()


def file_facts(config: Any) -> dict[str, str]:
    """Size and hash of every file a run reads: model, tokenizer, training data, evaluation sets.

    Files of more than 64 MiB are hashed in 256 pieces spread evenly over them. That tells models apart, and data files
    but for a changed row between the pieces, which the fingerprint of the tokens finds later.

    Raises:
      JaxftError: a file of the configuration is not on this machine.
    """
    files: list[str] = []
    for source in [*config.data.sources, *config.evaluation.sets.values()]:
        files += locate(source) or []
    model = resolve(config.model.path, weights=config.model.init == "pretrained")
    suffixes = (".json", ".safetensors", ".model", ".jinja")
    names = sorted(str(f) for f in model.iterdir() if f.suffix in suffixes)
    shown = {name: f"model {Path(name).name}" for name in names}
    return {shown.get(name, name): file_fingerprint(name) for name in unique([*names, *files])}


def unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def file_fingerprint(path: str | Path) -> str:
    """`<bytes> bytes, <16 hex digits>`."""
    size = os.path.getsize(path)
    digest = hashlib.blake2b(digest_size=8)
    with open(path, "rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
        else:
            for piece in range(PIECES):
                file.seek(piece * (size - PIECE) // (PIECES - 1))
                digest.update(file.read(PIECE))
    return f"{size} bytes, {digest.hexdigest()}"
