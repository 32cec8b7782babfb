"""`jaxft generate`: text from a run, a delta or a model."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from jaxft.errors import JaxftError


def generate(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL", help="Directory of a run or delta, a Hugging Face directory, a hub id, or nano."
        ),
    ],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", "-p", help="What to continue; several times for several.")
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            "-f",
            help="Prompts: a text file with one on each line, or .jsonl with prompt or messages; - for stdin.",
        ),
    ] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Write the prompt as a user's turn, as in training: by the run's or tokenizer's chat template, "
            "or plain (the prompt and a newline).",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-m", min=1, help="Longest answer, in tokens.")
    ] = 128,
    temperature: Annotated[
        float, typer.Option("--temperature", "-t", min=0.0, help="0 takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Draw from this many likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Draw from the likeliest tokens of this probability.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", help="End before this text; several times for several.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the draws.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts at once.")] = 16,
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or bfloat16: of computation and cache.")] = "float32",
    base: Annotated[
        str | None, typer.Option("--base", help="Where the base model of a run or delta is, if it moved.")
    ] = None,
    step: Annotated[
        str | None,
        typer.Option("--step", metavar="best|N", help="Which checkpoint of a run; default: the latest."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line: prompt, text, finish, tokens.")
    ] = False,
) -> None:
    """Continue prompts with a tuned or plain model.

    [bold]Examples[/bold]

        jaxft generate nano -p "The list is" -m 60

        jaxft generate outputs/quickstart/hft --chat -p "numpy.linalg.norm(x, ord=None)"

        jaxft generate outputs/run -f prompts.txt -t 0.8 --top-p 0.95 --json > answers.jsonl
    """
    conversations = _read(prompt or [], file, chat)
    if dtype not in ("float32", "bfloat16"):
        raise JaxftError(f"--dtype {dtype}: expected float32 or bfloat16")
    import jax.numpy as jnp

    from jaxft.decoding import generate as continue_prompts
    from jaxft.runs import chat_prompts, load
    from jaxft.training.compilation import enable_compilation_cache

    enable_compilation_cache()
    loaded = load(source, base=base, dtype=jnp.dtype(dtype), step=step)
    for first in range(0, len(conversations), batch_size):
        part = conversations[first : first + batch_size]
        prompts = [c if isinstance(c, str) else chat_prompts(loaded, [c])[0] for c in part]
        encoded = [loaded.tokenizer(p)["input_ids"] if isinstance(p, str) else p for p in prompts]
        found = continue_prompts(
            loaded.model,
            loaded.params,
            encoded,
            tokenizer=loaded.tokenizer,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop or [],
            seed=seed + first,
            dtype=jnp.dtype(dtype),
        )
        for conversation, tokens, result in zip(part, encoded, found, strict=True):
            text = _continuation(loaded.tokenizer, tokens, result)
            _print(conversation, text, result, as_json, alone=len(conversations) == 1)


def _read(prompts: list[str], file: Path | None, chat: bool) -> list[str | list[dict[str, Any]]]:
    """Prompts as texts, or as lists of messages where the model is to answer a chat."""
    found: list[str | list[dict[str, Any]]] = list(prompts)
    if file is not None:
        if str(file) == "-":
            text = sys.stdin.read()
        else:
            try:
                text = file.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise JaxftError(f"--file {file} cannot be read: {error}") from None
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                found.append(_prompt_of(line, f"{file}:{number}") if file.suffix == ".jsonl" else line)
    if not found:
        raise JaxftError("nothing to continue: give --prompt or --file")
    return [[{"role": "user", "content": p}] if chat and isinstance(p, str) else p for p in found]


def _prompt_of(line: str, place: str) -> str | list[dict[str, Any]]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise JaxftError(f"{place}: not JSON ({error})") from None
    value: Any = row.get("messages", row.get("prompt")) if isinstance(row, dict) else row
    turns = (
        isinstance(value, list) and value and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    )
    if not isinstance(value, str) and not turns:
        raise JaxftError(
            f"{place}: expected a text, or an object with prompt (text) or messages (role and content each)"
        )
    return value


def _continuation(tokenizer: Any, prompt: list[int], result: Any) -> str:
    """The generated text as it reads after the prompt: some tokenizers drop a space at the start of a text."""
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    whole = tokenizer.decode([*prompt, *result.tokens], skip_special_tokens=True)
    text = whole.removeprefix(before) if whole.startswith(before) else result.text
    at = text.find(result.text)
    return text[: at + len(result.text)] if at >= 0 else result.text  # without a stop string


def _print(conversation: str | list[dict[str, Any]], text: str, result: Any, as_json: bool, alone: bool) -> None:
    if as_json:
        record = {"prompt": conversation, "text": text, "finish": result.finish, "tokens": len(result.tokens)}
        typer.echo(json.dumps(record, ensure_ascii=False))
        return
    shown = conversation if isinstance(conversation, str) else conversation[-1]["content"]
    if alone:
        typer.echo(f"{shown}{text}" if isinstance(conversation, str) else text)
    else:
        typer.echo(f"> {shown}\n{text}\n")
