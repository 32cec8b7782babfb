"""What of the documentation is generated: `python -m jaxft.config_docs` (or `make docs-generated`).

docs/configuration.md from the schema, docs/methods.md from the registry, and a short configuration a method.
"""

import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from jaxft.config import RunConfig
from jaxft.config_source import models_in
from jaxft.methods.registry import MethodEntry, methods

HEADER = """\
# Configuration

<!-- Generated from the schema by `python -m jaxft.config_docs`. Do not edit. -->

A run is one YAML file. `jaxft train CONFIG --check` checks it whole, before anything is compiled, and prints it with
every default filled in: an unknown key, a wrong type or an impossible combination is an error that names the file and
line, the key, its value, what is allowed and the nearest name.

```yaml
model: {path: nano}
method: {name: hft}
data:
  sources: [{path: data/*.jsonl}]
  seq_len: 512
  batch_size: 16
evaluation:
  sets:
    mine: {path: held-out.jsonl, kind: target}
    general: {path: general.txt, kind: retained}
training: {steps: 300, learning_rate: {name: warmup_cosine_decay, peak: 1e-4, warmup: 0.1}}
output: outputs/run
```

- **Overrides.** Any key can be set on the command line: `jaxft train run.yaml training.steps=50
  data.sources.0.weight=2`. Values are YAML (`data.packing=false`, `'method={name: lora, rank: 8}'`), a list element
  is named by its index, which may be left out in a list of one, and the index one past the end appends.
- **YAML** is read by the rules of YAML 1.2: `on`, `off`, `yes` and `no` are text, `1e-3` is a number; a key written
  twice is an error.
- **Paths.** A relative `path` in `model`, `data` and `evaluation` is looked for beside the configuration file first,
  then in the current directory. `output` is relative to the current directory.
- **Resuming.** The same command goes on with an interrupted run. A key that changes the numbers of the run may not
  differ then; `output`, `logging`, `checkpoint`, `mesh`, `training.offload` and `training.profile` may.
"""


def document() -> str:
    """The whole page."""
    parts = [HEADER, "\n## Top level\n", _table(RunConfig, "")]
    seen: set[type[BaseModel]] = set()
    for name, field in RunConfig.model_fields.items():
        for path, model in _sections(name, field.annotation):
            if model not in seen:
                seen.add(model)
                parts += [f"\n## `{path}`\n", _about(model), _table(model, path)]
    parts += ["\n## Methods\n", _methods()]
    return "\n".join(part for part in parts if part).rstrip() + "\n"


def _sections(path: str, annotation: Any) -> Iterator[tuple[str, type[BaseModel]]]:
    """Every model inside an annotation, with the key path of its fields."""
    for model in models_in(annotation):
        inside = path + {list: "[]", dict: ".<name>"}.get(_container(annotation), "")
        yield inside, model
        for name, field in model.model_fields.items():
            yield from _sections(f"{inside}.{name}", field.annotation)


def _container(annotation: Any) -> Any:
    origin = typing.get_origin(annotation)
    if origin in (list, dict):
        return origin
    for argument in typing.get_args(annotation):
        if (found := _container(argument)) is not None:
            return found
    return None


def _about(model: type[BaseModel]) -> str:
    return " ".join((model.__doc__ or "").split()) + "\n"


def _table(model: type[BaseModel], path: str) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in model.model_fields.items():
        cells = (f"`{name}`", _type(field), _default(field), field.description or "")
        lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
    return "\n".join(lines)


def _type(field: FieldInfo) -> str:
    text = _type_name(field.annotation)
    bounds = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
    limits = [f"{sign} {getattr(m, key)}" for m in field.metadata for key, sign in bounds.items() if hasattr(m, key)]
    return text + (f" ({', '.join(limits)})" if limits else "")


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(a) for a in arguments)
    if origin is list:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"mapping of names to {_type_name(arguments[1])}"
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return "section"
    plain = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null", Any: "any value"}
    return plain.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    if field.default is PydanticUndefined:
        return ""
    return f"`{json.dumps(field.default)}`" if not isinstance(field.default, BaseModel) else ""


def _methods() -> str:
    parts = [
        "`method: {name: ..., options}`; a list of those is a chain, each working on what the ones before "
        "left frozen.\n"
    ]
    for entry in methods().values():
        parts.append(f"### `{entry.id}`\n\n{entry.summary} ({entry.family}; {_paper(entry)})\n")
        if entry.options:
            lines = ["| option | type | default | meaning |", "|---|---|---|---|"]
            for o in entry.options:
                cells = (f"`{o.name}`", o.type, f"`{json.dumps(o.default, default=str)}`", o.help)
                lines.append("| " + " | ".join(_cell(c) for c in cells) + " |")
            parts.append("\n".join(lines) + "\n")
        if entry.learning_rate is not None:
            parts.append(f"Learning rate to start from: {entry.learning_rate:g}.\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    # A bar ends a table cell even inside code.
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


METHODS_HEADER = """\
# Methods

<!-- Generated from the registry by `python -m jaxft.config_docs`. Do not edit. -->

In a configuration a method is `method: {name: lora, rank: 8}`, or a list of those: a chain, in which each works on what
the ones before left frozen. In Python it is a function: `jaxft.lora(rank=8)`, `jaxft.chain(jaxft.lora(), jaxft.hft())`.
`jaxft methods lora` prints what follows for one method; [Configuration](configuration.md#methods) says what its options
mean, [Adding a method](add-a-method.md) how to write another. `configs/methods` has a run of each.

The learning rate is a starting point for AdamW; where there is none, take that of your full fine-tuning.
"""


def methods_document() -> str:
    """The methods by family: what each does, its paper, a learning rate to start from, its options."""
    entries = list(methods().values())
    parts = [METHODS_HEADER]
    for family in sorted({entry.family for entry in entries}):
        lines = ["| method | what it does | paper | learning rate | options |", "|---|---|---|---|---|"]
        for entry in (e for e in entries if e.family == family):
            options = ", ".join(f"`{o.name}: {json.dumps(o.default, default=str)}`" for o in entry.options)
            rate = f"{entry.learning_rate:g}" if entry.learning_rate is not None else ""
            link = f"[`{entry.id}`](configuration.md#{entry.id})"
            lines.append("| " + " | ".join(map(_cell, (link, entry.summary, _paper(entry), rate, options))) + " |")
        parts.append(f"## {family.capitalize()}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _paper(entry: MethodEntry) -> str:
    return f"[{entry.title}]({entry.url})" if entry.url else entry.title


METHOD_CONFIG = """\
# {title}{url}
#
#   jaxft train configs/methods/{id}.yaml
#   jaxft train configs/methods/{id}.yaml {override} output=outputs/{id}-2
#   jaxft methods {id}        (its options)

model: {{path: nano, remat: none}}
method: {{name: {id}}}

data:
  sources: [{{path: "builtin:api-docs", holdout: 0.1, part: train}}]
  seq_len: 128
  batch_size: 16
  chat_template: plain

evaluation:
  sets:
    api-docs: {{path: "builtin:api-docs", holdout: 0.1, part: holdout, kind: target}}
    python-docs: {{path: "builtin:python-docs", holdout: 0.05, part: holdout, kind: retained}}

training:
  steps: 240
  optimizer: {{name: adamw, weight_decay: 0.01}}
  learning_rate: {{name: cosine, peak: {rate}, warmup: 0.1}}

output: outputs/{id}
"""


def method_config(entry: MethodEntry) -> str:
    """A short configuration of a method with its defaults, on the embedded model and data."""
    rate = entry.learning_rate or 1e-3
    numbers = [o for o in entry.options if isinstance(o.default, int | float) and not isinstance(o.default, bool)]
    override = (
        f"method.{numbers[0].name}={numbers[0].default}" if numbers else f"training.learning_rate.peak={rate / 2:g}"
    )
    url = f" ({entry.url})" if entry.url else ""
    return METHOD_CONFIG.format(title=entry.title, url=url, id=entry.id, override=override, rate=f"{rate:g}")


def main() -> None:
    """Write the two pages, and a configuration for every method that has none, below the current directory."""
    for page, text in (("configuration", document()), ("methods", methods_document())):
        Path(f"docs/{page}.md").write_text(text, encoding="utf-8")
    for entry in methods().values():
        path = Path("configs/methods") / f"{entry.id}.yaml"
        if not path.exists():
            path.write_text(method_config(entry), encoding="utf-8")
            print(f"wrote {path}")


if __name__ == "__main__":
    main()
