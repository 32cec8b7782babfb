"""A small byte-level BPE tokenizer trained here, under the chat templates of several model families."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

CORPUS = [
    "The quick brown fox jumps over the lazy dog. What is the capital of France? Paris is the capital of France.",
    "user assistant system tool answer question hello world think the number of words in the answer is five",
]

# Written for these tests after the published formats; each keeps the trait that is hard for a mask.
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_WITHOUT_GENERATION_PROMPT = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n'"
    " + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if loop.index0 > 0 and messages[loop.index0 - 1].role == 'user' %}{{ raise_exception('roles must alternate') }}"
    "{% endif %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
# Phi-3: the end of the whole conversation is written after every last turn, even in the middle of a conversation.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Qwen3: thinking is kept only after the last question, the last turn gets an empty one if it has none; tools.
QWEN3 = """{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}\
{%- for t in tools %}{{- t | tojson + '\\n' }}{%- endfor %}\
{{- '<|im_end|>\\n' }}{%- endif %}\
{%- set ns = namespace(last=-1) %}\
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}\
{%- for m in messages %}\
{%- if m.role == 'assistant' %}\
{%- set content = m.content %}{%- set thought = '' %}\
{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}\
{%- elif '</think>' in content %}\
{%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}\
{{- '<|im_start|>assistant\\n' }}\
{%- if loop.index0 > ns.last and (loop.last or thought) %}\
{{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}\
{{- content.lstrip('\\n') }}\
{%- for call in m.tool_calls or [] %}\
{{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}{%- endfor %}\
{{- '<|im_end|>\\n' }}\
{%- elif m.role == 'tool' %}\
{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n' }}\
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}\
{%- endfor %}\
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}\
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}\
{%- endif %}"""

# One trait each: a role renamed, thinking in the generation prompt only, an end of the last turn of its own, a blank
# before the end, several lines of template, an answer after a blank, an end that is no control token.
OTHERS = {
    "gemma": "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "{{ '<start_of_turn>' + role + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "deepseek": "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '<|User|>' + m.content }}"
    "{% else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}",
    "gpt-oss": "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|start|>user<|message|>' + m.content + '<|end|>' }}"
    "{% else %}{{ '<|start|>assistant<|channel|>final<|message|>' + m.content }}"
    "{{ '<|return|>' if loop.last else '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}",
    "llama2": "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}",
    "zephyr": "{% for m in messages %}\n{% if m.role == 'user' %}\n{{ '<|user|>\\n' + m.content + eos_token }}\n"
    "{% else %}\n{{ '<|assistant|>\\n' + m.content + eos_token }}\n{% endif %}\n"
    "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
    "vicuna": "{% for m in messages %}{% if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}",
    "headings": "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}",
}

CONTROL = {
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama3": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "mistral": [],
    "phi": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"],
    "qwen3": ["<|im_start|>", "<|im_end|>"],
}
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "phi": PHI, "qwen3": QWEN3}


def build_tokenizer(
    template: str | None = None,
    *,
    control: tuple[str, ...] = (),
    ordinary: tuple[str, ...] = (),
    bos: bool = False,
    eos: str = "<eos>",
    trim_offsets: bool = False,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE of about 350 tokens. `control` are special tokens, `ordinary` added ones that are not special;
    with `bos` it puts <bos> before plain text, as Llama's do. pad is eos, as in most base models."""
    special = list(dict.fromkeys([*(["<bos>"] if bos else []), eos, *control]))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=350,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    level = processors.ByteLevel(trim_offsets=trim_offsets)
    if bos:
        prefix = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", core.token_to_id("<bos>"))])
        core.post_processor = processors.Sequence([level, prefix])
    else:
        core.post_processor = level
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=eos, pad_token=eos, bos_token="<bos>" if bos else None
    )
    tokenizer.add_tokens(list(ordinary))
    tokenizer.chat_template = template
    return tokenizer


def family(name: str) -> PreTrainedTokenizerFast:
    ordinary = ("<think>", "</think>", "<tool_call>", "</tool_call>") if name == "qwen3" else ()
    eos = {"llama3": "<|eot_id|>", "chatml": "<|im_end|>", "qwen3": "<|im_end|>"}.get(name, "<eos>")
    return build_tokenizer(
        TEMPLATES[name],
        control=tuple(CONTROL[name]),
        ordinary=ordinary,
        bos=name in ("llama3", "mistral"),
        eos=eos,
        trim_offsets=name == "llama3",
    )


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """By family; `base` has no chat template and no bos, `base_bos` a bos."""
    built = {name: family(name) for name in TEMPLATES}
    return built | {"base": build_tokenizer(), "base_bos": build_tokenizer(bos=True)}


@pytest.fixture
def write_jsonl(tmp_path: Path) -> Callable[..., str]:
    def write(rows: list[dict], name: str = "data.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.fixture(scope="session")
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return build_tokenizer


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    return TEMPLATES | OTHERS | {"chatml_without_generation_prompt": CHATML_WITHOUT_GENERATION_PROMPT}
