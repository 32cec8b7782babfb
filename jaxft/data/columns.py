"""Rows of columns -> documents, conversations and multiple-choice questions.

A layout is a set of column names. The first layout of `LAYOUTS` whose required columns are all there is the row's; a
source has one layout, so that a row that lacks a column is an error of that row and not silently something else.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxft.errors import JaxftError, nearest

Message = dict[str, Any]


class RowError(JaxftError):
    """Why one row cannot be used. The reader adds file and line."""


@dataclass(frozen=True)
class Document:
    """Plain text; every token trains."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages in transformers' form (`role`, `content`, `tool_calls`, ...).

    `context` messages at the start are given: their answers do not train (the prompt of a prompt/completion pair).
    """

    messages: tuple[Message, ...]
    tools: tuple[dict, ...] | None = None
    context: int = 0
    from_messages: bool = False


@dataclass(frozen=True)
class Question:
    """A multiple-choice question; `answer` indexes `choices`."""

    question: str
    choices: tuple[str, ...]
    answer: int


Example = Document | Conversation | Question


class Layout(NamedTuple):
    required: tuple[str, ...]
    optional: tuple[str, ...]
    convert: Callable[[dict[str, Any]], Example]


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = f"{type(value).__name__}, nested too deep to show"
    return text if len(text) <= 60 else text[:57] + "..."


def _listed(names: Iterable[object]) -> str:
    """Column names for a message, safe to print whatever a broken file has for names."""
    shown = [
        name if isinstance(name, str) and name.isprintable() and len(name) <= 60 else _shown(name) for name in names
    ]
    return ", ".join(shown[:40]) + (f", ... ({len(shown)} in all)" if len(shown) > 40 else "") or "(none)"


def _text(row: dict[str, Any], name: str, *, allow_empty: bool = False) -> str:
    value = row[name]
    if value is None:
        raise RowError(f"{name!r} is null, expected text")
    if not isinstance(value, str):
        raise RowError(f"{name!r} is {type(value).__name__} {_shown(value)}, expected text")
    _check_unicode(name, value)
    if not allow_empty and not value.strip():
        raise RowError(f"{name!r} is empty")
    return value


def _optional_text(row: dict[str, Any], name: str) -> str:
    return "" if row.get(name) is None else _text(row, name, allow_empty=True)


def _check_unicode(name: str, value: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(f"{name!r} holds bytes that are not UTF-8 (character {error.start})") from None


# ---- documents -------------------------------------------------------------------------------------------------------


def _document(row: dict[str, Any]) -> Document:
    return Document(_text(row, "text"))


# ---- conversations ---------------------------------------------------------------------------------------------------

ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
# Which roles may come right before each role; None is the start of the conversation.
MAY_FOLLOW = {
    "system": (None,),
    "user": (None, "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{where} is text but not JSON: {error}") from None


def _content(value: Any, where: str) -> str:
    """Message content: text, or a list of text parts (`{"type": "text", "text": ...}`)."""
    if isinstance(value, list):
        parts = []
        for part in value:
            if not (
                isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)
            ):
                raise RowError(f"{where} has a part {_shown(part)}; only text parts are supported")
            parts.append(part["text"])
        value = "".join(parts)
    if not isinstance(value, str):
        raise RowError(f"{where} is {'null' if value is None else type(value).__name__}, expected text")
    _check_unicode(where, value)
    return value


def _tool_calls(calls: Any, where: str) -> list[dict]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise RowError(f"{where}.tool_calls is {_shown(calls)}, expected a list of objects")
    converted = []
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{where}.tool_calls has {_shown(call)}, expected function.name and function.arguments")
        # The OpenAI form keeps arguments as JSON text, while the templates of transformers expect the object.
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            arguments = _parse_json(arguments, f"{where}.tool_calls.arguments")
        converted.append({"type": "function", **call, "function": {**function, "arguments": arguments}})
        if "function" not in call:
            converted[-1] = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return converted


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise RowError(f"{where} is {type(value).__name__} {_shown(value)}, expected an object with role and content")
    given = value.get("role", value.get("from"))
    if given is None:
        raise RowError(f"{where} has no role")
    if not isinstance(given, str) or given.lower() not in ROLE_NAMES:
        raise RowError(f"{where} has role {_shown(given)}; {nearest(str(given), ROLE_NAMES)}")
    role = ROLE_NAMES[given.lower()]
    content = value["content"] if "content" in value else value.get("value")
    rest = {k: v for k, v in value.items() if k not in ("role", "from", "content", "value") and v is not None}
    if given.lower() == "function_call":  # ShareGPT: the value is the call itself, as JSON
        call = _parse_json(_content(content, f"{where}.value"), f"{where}.value")
        return {
            "role": role,
            "content": "",
            "tool_calls": _tool_calls(call if isinstance(call, list) else [call], where),
        }
    if rest.get("tool_calls"):
        rest["tool_calls"] = _tool_calls(rest["tool_calls"], where)
        content = "" if content is None else content
    else:
        rest.pop("tool_calls", None)
    content = _content(content, f"{where}.content")
    if role in ("user", "assistant") and not content.strip() and "tool_calls" not in rest:
        raise RowError(f"{where}: the {role} message is empty")
    return {"role": role, "content": content, **rest}


def _messages(value: Any, name: str) -> list[Message]:
    if isinstance(value, str):
        value = _parse_json(value, repr(name))
    if not isinstance(value, list):
        raise RowError(f"{name!r} is {'null' if value is None else type(value).__name__}, expected a list of messages")
    if not value:
        raise RowError(f"{name!r} is an empty list")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _check_order(messages: list[Message]) -> None:
    before = None
    for i, message in enumerate(messages):
        role = message["role"]
        if before not in MAY_FOLLOW[role]:
            place = "at the start" if before is None else f"after {before}"
            raise RowError(f"message {i}: {role} {place}; expected system first, then user and assistant in turn")
        before = role
    if before != "assistant":
        raise RowError(f"the last message is from {before}, expected an answer from assistant")


def _tools(value: Any) -> tuple[dict, ...] | None:
    if isinstance(value, str):
        value = _parse_json(value, "'tools'") if value.strip() else None
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowError(f"'tools' is {_shown(value)}, expected a list of objects (JSON schemas)")
    return tuple(value)


def _with_system(messages: list[Message], system: str) -> list[Message]:
    return [{"role": "system", "content": system}, *messages] if system.strip() else messages


def _conversation(row: dict[str, Any]) -> Conversation:
    name = "messages" if "messages" in row else "conversations"
    messages = _messages(row[name], name)
    if messages[0]["role"] != "system":
        messages = _with_system(messages, _optional_text(row, "system"))
    _check_order(messages)
    return Conversation(tuple(messages), _tools(row.get("tools")), from_messages=True)


def _prompt_completion(row: dict[str, Any]) -> Conversation:
    prompt, completion = row["prompt"], row["completion"]
    is_list = isinstance(prompt, list), isinstance(completion, list)
    prompt = _messages(prompt, "prompt") if is_list[0] else [{"role": "user", "content": _text(row, "prompt")}]
    completion = (
        _messages(completion, "completion")
        if is_list[1]
        else [{"role": "assistant", "content": _text(row, "completion")}]
    )
    if prompt[0]["role"] != "system":
        prompt = _with_system(prompt, _optional_text(row, "system"))
    messages = prompt + completion
    _check_order(messages)
    return Conversation(tuple(messages), _tools(row.get("tools")), context=len(prompt), from_messages=any(is_list))


def _instruction(row: dict[str, Any]) -> Conversation:
    extra = _optional_text(row, "input")
    instruction = _text(row, "instruction")
    messages: list[Message] = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError(f"'history' is {type(history).__name__}, expected a list of [question, answer] pairs")
    for i, pair in enumerate(history):
        if (
            not isinstance(pair, list | tuple)
            or len(pair) != 2
            or not all(isinstance(x, str) and x.strip() for x in pair)
        ):
            raise RowError(f"history[{i}] is {_shown(pair)}, expected [question, answer]")
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    messages.append({"role": "user", "content": f"{instruction}\n{extra}" if extra.strip() else instruction})
    messages.append({"role": "assistant", "content": _text(row, "output")})
    return Conversation(tuple(_with_system(messages, _optional_text(row, "system"))))


# ---- multiple choice -------------------------------------------------------------------------------------------------


def _question(row: dict[str, Any]) -> Question:
    question, choices, answer = _text(row, "question"), row["choices"], row["answer"]
    labels: list[Any] = []
    if isinstance(choices, dict):  # the ARC form: {"text": [...], "label": [...]}
        labels = list(choices.get("label") or [])
        choices = choices.get("text")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise RowError(f"'choices' is {_shown(choices)}, expected a list of at least two texts")
    labels = labels or [chr(ord("A") + i) for i in range(len(choices))]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        index = answer
    elif answer in choices:
        index = choices.index(answer)
    elif answer in labels:
        index = labels.index(answer)
    elif isinstance(answer, str) and answer.isdigit() and int(answer) < len(choices):
        index = int(answer)
    else:
        raise RowError(f"'answer' is {_shown(answer)}, expected an index below {len(choices)}, a letter or a choice")
    return Question(question, tuple(choices), index)


# ---- layouts ---------------------------------------------------------------------------------------------------------

LAYOUTS = (
    Layout(("messages",), ("tools", "system"), _conversation),
    Layout(("conversations",), ("tools", "system"), _conversation),
    Layout(("prompt", "completion"), ("system", "tools"), _prompt_completion),
    Layout(("instruction", "output"), ("input", "system", "history"), _instruction),
    Layout(("question", "choices", "answer"), (), _question),
    Layout(("text",), (), _document),
)
COLUMN_NAMES = tuple(dict.fromkeys(name for layout in LAYOUTS for name in layout.required + layout.optional))


def renamed(row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row under our names: mapped columns first, the others as they are."""
    if not columns:
        return row
    for ours, theirs in columns.items():
        if theirs not in row:
            raise RowError(
                f"no column {theirs!r} (mapped to {ours}); {nearest(theirs, (_listed([name]) for name in row))}"
            )
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken and name not in columns}
    return kept | {ours: row[theirs] for ours, theirs in columns.items()}


# What other data sets call the columns that people train on, for the hint of how to map them.
_CALLED = {
    "prompt": ("question", "query", "instruction", "input", "problem", "context", "source"),
    "completion": ("response", "answer", "output", "chosen", "solution", "label", "target", "summary"),
    "instruction": ("question", "query", "prompt"),
    "input": ("context",),
    "output": ("response", "answer", "completion", "chosen"),
    "text": ("content", "document", "body", "article"),
    "messages": ("chat", "dialog", "dialogue", "conversation", "turns"),
}


def _suggested_mapping(seen: Iterable[str]) -> str:
    """A `columns` mapping that would fit columns of these names, else an example of one."""
    names = list(seen)
    for wanted in (("messages",), ("instruction", "input", "output"), ("prompt", "completion"), ("text",)):
        found: dict[str, str] = {}
        for ours in wanted:
            theirs = next((n for n in (ours, *_CALLED[ours]) if n in names and n not in found.values()), None)
            if theirs is not None:
                found[ours] = theirs
        if len(found) == len(wanted):
            return "columns: {" + ", ".join(f"{ours}: {theirs}" for ours, theirs in found.items()) + "}"
    return "columns: {prompt: question, completion: answer}"


def detect_layout(rows: Iterable[dict[str, Any]], columns: dict[str, str]) -> Layout:
    """The layout that most of `rows` have.

    Raises:
        JaxftError: no row has one; the message shows the columns, the layouts, and how to map one on the other.
    """
    counts = [0] * len(LAYOUTS)
    seen: dict[str, None] = {}
    for row in rows:
        seen.update(dict.fromkeys(map(str, row)))
        # A mapped name counts as there: a typo in the mapping is reported row by row, with the nearest column.
        names = {name for name, value in row.items() if value is not None} - set(columns.values()) | set(columns)
        for i, layout in enumerate(LAYOUTS):
            # Mapping a layout's columns chooses it, whatever else is in the row.
            if set(layout.required) <= names and set(columns) <= set(layout.required + layout.optional):
                counts[i] += 1
                break
    if any(counts):
        return LAYOUTS[counts.index(max(counts))]
    layouts = "; ".join("+".join(layout.required) for layout in LAYOUTS)
    mapped = f" with columns: {columns}" if columns else ""
    raise JaxftError(
        f"columns {_listed(seen)}{mapped} are in no layout jaxft knows. Layouts: {layouts}. "
        f"Map yours in the config, for example {_suggested_mapping(seen)}"
    )


def convert(row: dict[str, Any], layout: Layout, columns: dict[str, str]) -> Example:
    """One row in `layout` as an example.

    Raises:
        RowError: a column is missing, null, empty or of another type, or the roles are out of order.
    """
    row = renamed(row, columns)
    missing = [name for name in layout.required if name not in row]
    if missing:
        raise RowError(f"no column {', '.join(map(repr, missing))}; columns here: {_listed(row)}")
    return layout.convert(row)
