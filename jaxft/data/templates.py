"""Conversations -> text with the spans that train, and text -> tokens with their mask.

The mask needs no `{% generation %}` marks in the template. Where an answer starts and ends is found by rendering the
conversation up to the answer (what the model is given when it has to answer: the generation prompt included), and,
where the template writes earlier turns differently once more turns follow (thinking that is stripped, for example), by
rendering it with other words in the answer's place and seeing what stays the same around them.

One conversation is one sequence, exactly the text the tokenizer's template gives for it. So where a template strips the
thinking of earlier turns, those turns train without it, as they will stand in the context when the model is used; with
`loss_on: last` only the last turn trains.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from jaxft.data.columns import Conversation, Message, RowError
from jaxft.data.config import FormatConfig
from jaxft.errors import JaxftError

if TYPE_CHECKING:  # a second to import
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
# Two answers that differ in their first and in their last character, and that no template rewrites.
PROBES = ("0probe0", "1probe1")


@dataclass(frozen=True)
class Rendered:
    """Text of one example and the half-open character spans that train."""

    text: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Template:
    """How a run writes conversations and documents: resolved once from the config and the tokenizer."""

    tokenizer: "PreTrainedTokenizerBase"
    chat_template: str | None  # None: the tokenizer's own
    plain: bool  # the plain format instead of a chat template
    plain_messages: bool  # whether it was asked for, and so holds for messages too
    options: dict[str, Any]
    system: str | None
    loss_on: str
    add_eos: bool
    prefix: tuple[int, ...]  # what the tokenizer puts before a plain text: bos, or nothing
    control: re.Pattern[str]  # any added token of the tokenizer
    special: re.Pattern[str]  # any special one

    @property
    def eos(self) -> str:
        return str(self.tokenizer.eos_token) if self.add_eos else ""


def read_template(given: str | None) -> str | None:
    """The Jinja text that `chat_template` names: a file's, or itself; None for the tokenizer's own and for `plain`.

    Raises:
        JaxftError: it is neither a template nor a file that can be read.
    """
    if given is None or given == "plain" or "{" in given:
        return None if given == "plain" else given
    try:
        with open(given, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = "is no file here" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise JaxftError(f"chat_template={given!r} {reason}; expected a path, a Jinja template or plain") from None


def resolve_template(config: FormatConfig, tokenizer: "PreTrainedTokenizerBase") -> Template:
    """The template that `config` names, checked before any row is read.

    Raises:
        JaxftError: the tokenizer has no offsets or no eos token, or the template file is missing or not valid Jinja.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise JaxftError(
            f"tokenizer {type(tokenizer).__name__} gives no character offsets; a fast one (tokenizer.json) is needed"
        )
    if config.add_eos and tokenizer.eos_token is None:
        raise JaxftError("data.add_eos is true but the tokenizer has no eos token; set data.add_eos: false")
    chat_template, plain_messages = read_template(config.chat_template), config.chat_template == "plain"
    plain = chat_template is None and (plain_messages or not tokenizer.chat_template)
    added = tokenizer.added_tokens_decoder.values()
    template = Template(
        tokenizer=tokenizer,
        chat_template=chat_template,
        plain=plain,
        plain_messages=plain_messages,
        options=config.chat_template_options,
        system=config.system,
        loss_on=config.loss_on,
        add_eos=config.add_eos,
        prefix=tuple(_text_prefix(tokenizer)),
        control=_any_of([str(token) for token in added]),
        special=_any_of([str(token) for token in added if token.special]),
    )
    if not plain:
        try:
            _render(template, [{"role": "user", "content": "?"}], None)
        except jinja2.TemplateSyntaxError as error:
            raise JaxftError(f"data.chat_template: line {error.lineno}: {error.message}") from error
        except RowError:
            pass  # the template objects to this probe; it may well accept the rows
    return template


def _any_of(tokens: list[str]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)")


def _text_prefix(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """What the tokenizer adds before a text (bos), as opposed to after it."""
    ids = tokenizer("")["input_ids"]
    return ids[: ids.index(tokenizer.bos_token_id) + 1] if tokenizer.bos_token_id in ids else []


# ---- rendering -------------------------------------------------------------------------------------------------------


def _render(template: Template, messages: Sequence[Message], tools: Any, *, prompt: bool = False) -> str:
    try:
        return template.tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) if tools else None,
            chat_template=template.chat_template,
            add_generation_prompt=prompt,
            tokenize=False,
            **template.options,
        )
    except jinja2.TemplateSyntaxError:
        raise
    except Exception as error:  # templates are programs: they raise their own objections and any Python error
        raise RowError(f"the chat template refuses this conversation: {str(error)[:300]}") from error


def render(template: Template, conversation: Conversation) -> Rendered:
    """The text of a conversation and the spans of the answers that train, each with its end-of-turn token.

    Raises:
        RowError: the template refuses the messages, or an answer cannot be found in what it wrote.
    """
    messages = list(conversation.messages)
    if template.system is not None:
        first = 1 if messages[0]["role"] == "system" else 0
        messages[:first] = [{"role": "system", "content": template.system}]
        context = conversation.context + (1 - first if conversation.context else 0)
    else:
        context = conversation.context
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= context]
    if template.loss_on == "last":
        answers = answers[-1:]
    if template.plain:
        return _render_plain(template, messages, conversation.tools, answers)
    text = _render(template, messages, conversation.tools)
    _check_tools(messages, conversation.tools, text)
    if template.loss_on == "all":
        return Rendered(text, ((0, len(text)),))
    return Rendered(text, tuple(_find_answer(template, messages, conversation.tools, text, i) for i in answers))


def _check_tools(messages: list[Message], tools: Any, text: str) -> None:
    """Raises RowError where a template leaves out tools or calls: many know nothing of them and say nothing."""
    offered = [
        tool.get("function", tool).get("name") for tool in tools or () if isinstance(tool.get("function", tool), dict)
    ]
    called = [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]
    for what, names in (("tools", offered), ("tool calls", called)):
        if lost := next((name for name in names if isinstance(name, str) and name not in text), None):
            raise RowError(f"the chat template does not write {what} (such as {lost[:60]!r}); use one that does")


def _render_plain(template: Template, messages: list[Message], tools: Any, answers: list[int]) -> Rendered:
    """Contents joined by newlines, every answer ended by eos: `prompt`, newline, `completion`, eos."""
    if tools or any("tool_calls" in message or message["role"] == "tool" for message in messages):
        raise RowError("tools need a chat template; the plain format has no way to write them")
    text, spans = "", []
    for i, message in enumerate(messages):
        start = len(text)
        text += message["content"] + (template.eos if message["role"] == "assistant" else "")
        if i in answers:
            spans.append((start, len(text)))
        text += "\n" if i + 1 < len(messages) else ""
    return Rendered(text, ((0, len(text)),) if template.loss_on == "all" else tuple(spans))


def _common_prefix(a: str, b: str) -> int:
    return len(os.path.commonprefix([a, b]))


def _find_answer(template: Template, messages: list[Message], tools: Any, text: str, index: int) -> Span:
    """The span of answer `index` in `text`, the rendering of all messages: from where the model starts to write (after
    the generation prompt) to the end of its end-of-turn token."""
    bare = _render(template, messages[:index], tools)
    prompt = _render(template, messages[:index], tools, prompt=True)
    last = index == len(messages) - 1
    until = text if last else _render(template, messages[: index + 1], tools)
    start = len(prompt) if prompt != bare and text.startswith(prompt) else None
    turn = (
        _turn_end(template, messages[index], until, start) if start is not None and until.startswith(prompt) else None
    )
    end = turn if turn is not None and text.startswith(until[:turn]) else None
    if start is None or end is None:
        start, end = _find_by_probe(template, messages, tools, text, index, start, end)
    answer = messages[index]["content"].rsplit("</think>", 1)[-1].strip()
    if answer not in text[start:end]:
        raise RowError(f"answer of message {index} is not where the chat template should have written it")
    return start, end


def _turn_end(template: Template, message: Message, until: str, start: int) -> int:
    """Where a turn that starts at `start` and is the last of `until` ends: after the control token that follows the
    answer, without the newline or the closing of the whole conversation that some templates add."""
    content = message["content"].strip()
    if content and not message.get("tool_calls"):
        at = until.rfind(content, start)
        follows = re.compile(rf"\s*(?:{template.control.pattern})").match(until, at + len(content)) if at >= 0 else None
        if follows:
            return follows.end()
    tail = re.compile(rf"(?:{template.control.pattern})(?=\s*$)").search(until, start)
    return tail.end() if tail else len(until)


def _find_by_probe(
    template: Template, messages: list[Message], tools: Any, text: str, index: int, start: int | None, end: int | None
) -> Span:
    """Renders the conversation with two other answers at `index`; what both share is what surrounds the answer."""
    first, second = (
        _render(template, [*messages[:index], {"role": "assistant", "content": probe}, *messages[index + 1 :]], tools)
        for probe in PROBES
    )
    before = first[: _common_prefix(first, second)]
    after = first[len(first) - _common_prefix(first[::-1], second[::-1]) :]
    if start is None:
        if not text.startswith(before):
            raise RowError(f"cannot tell where the answer of message {index} starts in what the chat template wrote")
        start = len(before)
    if end is None:
        if not text.endswith(after) or len(text) - len(after) < start:
            raise RowError(f"cannot tell where the answer of message {index} ends in what the chat template wrote")
        closing = re.compile(rf"\s*(?:{template.control.pattern})").match(after)
        end = len(text) - len(after) + (closing.end() if closing else 0)
    return start, end


# ---- tokens ----------------------------------------------------------------------------------------------------------


def tokenize_rendered(template: Template, rendered: Sequence[Rendered]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens int32[n] and mask bool[n] of each text: True where a token holds a character of a span.

    No special tokens are added beyond those in the text, except that the plain format gets the tokenizer's own prefix
    (bos), as any plain text does.
    """
    if not rendered:
        return []
    encoded = template.tokenizer(
        [r.text for r in rendered], add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    out = []
    for r, ids, offsets in zip(rendered, encoded["input_ids"], encoded["offset_mapping"], strict=True):
        mask = np.zeros(len(ids), bool)
        if ids:
            begin, stop = np.asarray(offsets).T
            # Tokenizers that trim blanks off their offsets give a token of blanks no width, at the blanks' end.
            begin = np.where((begin == stop) & (begin > 0), begin - 1, begin)
            for start, end in r.spans:
                mask |= (begin < end) & (stop > start)
        tokens = np.asarray(ids, np.int32)
        out.append(_prefixed(template, tokens, mask) if template.plain else (tokens, mask))
    return out


def tokenize_documents(template: Template, texts: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens int32[n] and mask bool[n] (all True) of plain texts: bos if the tokenizer has one, the text, eos."""
    if not texts:
        return []
    encoded = template.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    eos = [template.tokenizer.eos_token_id] if template.add_eos else []
    all_tokens = (np.asarray(ids + eos, np.int32) for ids in encoded)
    return [_prefixed(template, tokens, np.ones(len(tokens), bool)) for tokens in all_tokens]


def _prefixed(template: Template, tokens: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prefix = np.asarray(template.prefix, np.int32)
    return np.concatenate([prefix, tokens]), np.concatenate([np.zeros(len(prefix), bool), mask])


def check_bos(template: Template, tokens: np.ndarray) -> None:
    """Raises RowError for a sequence that starts with two bos: one from template or tokenizer, one in the text."""
    bos = template.tokenizer.bos_token_id
    # A bos that is eos as well may follow itself at the end of an empty text.
    if bos is not None and bos != template.tokenizer.eos_token_id and len(tokens) > 1 and (tokens[:2] == bos).all():
        raise RowError(f"starts with two {template.tokenizer.bos_token!r} tokens; take it out of the text or template")
