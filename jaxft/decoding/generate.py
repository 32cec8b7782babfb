"""Batched generation with a key/value cache.

Prompts are padded on the left to a bucket of lengths, so prompts of other lengths run the compiled program of their
bucket. The device generates in chunks; between chunks the host looks for stop strings.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxft.decoding.sampling import sample
from jaxft.errors import JaxftError
from jaxft.hub.save import to_host
from jaxft.models.language_model import LanguageModel
from jaxft.weights import Tree

CHUNK = 32  # tokens generated between two looks at the host
_MAX_EOS = 16


@dataclasses.dataclass(frozen=True)
class Generation:
    """What was generated after one prompt.

    `tokens` includes the end-of-sequence token where one was generated. `text` is None without a tokenizer, leaves out
    special tokens and ends before a stop string. `finish` is "eos", "stop" or "length".
    """

    tokens: list[int]
    text: str | None
    finish: str


def generate(
    model: LanguageModel,
    params: Tree,
    prompts: Sequence[str | Sequence[int]],
    *,
    tokenizer: Any = None,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    stop: Sequence[str] = (),
    eos_token_ids: Sequence[int] | None = None,
    seed: int = 0,
    dtype: Any = jnp.float32,
) -> list[Generation]:
    """Continue every prompt (a string, or its token ids) by up to `max_new_tokens` tokens.

    Args:
      params: a params tree, weight nodes and soft prompts included.
      tokenizer: encodes string prompts, decodes results, finds `stop` strings. Needed for strings only.
      temperature: 0 takes the most likely token (greedy); otherwise `jaxft.decoding.sample` with `top_k` and `top_p`.
      eos_token_ids: tokens that end a row; by default those of the model's generation config, then its config.
      seed: makes sampling repeatable. Row i draws the same numbers whatever the other prompts are.
      dtype: of the computation and the cache.

    Raises JaxftError for an empty prompt, token ids outside of the vocabulary, more tokens than the model has positions
    for, and settings outside of their range.
    """
    _check(model, max_new_tokens, temperature, top_k, top_p, stop, tokenizer)
    rows = [_encode(i, prompt, tokenizer, model.config.vocab_size) for i, prompt in enumerate(prompts)]
    if not rows:
        return []
    eos = _eos(model) if eos_token_ids is None else tuple(eos_token_ids)
    if len(eos) > _MAX_EOS:
        raise JaxftError(f"eos_token_ids: {len(eos)} tokens end a row, expected at most {_MAX_EOS}")

    if model.config.rope.type != "dynamic":  # which stretches to any length
        _check_positions(rows, max_new_tokens, model.config.max_position_embeddings)

    width = bucket(max(len(row) for row in rows))
    tokens, segment_ids = np.zeros((2, len(rows), width), np.int32)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], segment_ids[i, width - len(row) :] = row, 1
    state = _prefill(model, params, tokens, segment_ids, capacity=bucket(width + max_new_tokens), dtype=dtype)
    settings = {
        "eos": np.array(eos + (-1,) * (_MAX_EOS - len(eos)), np.int32),
        "key": jax.random.key(seed),
        "temperature": np.float32(temperature or 1.0),
        "top_k": np.int32(model.config.vocab_size if top_k is None else top_k),
        "top_p": np.float32(1.0 if top_p is None else top_p),
    }

    new: list[list[int]] = [[] for _ in rows]
    results: list[Generation | None] = [None] * len(rows)
    done = np.zeros(len(rows), bool)
    for start in range(0, max_new_tokens, CHUNK):
        count = np.int32(min(CHUNK, max_new_tokens - start))
        generated, state = _generate_chunk(
            model,
            params,
            state,
            np.asarray(done),
            np.int32(start),
            count,
            settings,
            greedy=temperature == 0,
            dtype=dtype,
        )
        for i, row in enumerate(to_host(generated)):
            if results[i] is None:
                new[i] += row[:count].tolist()
                results[i] = _finished(new[i], eos, stop, tokenizer)
        done = np.array([result is not None for result in results])
        if done.all():
            break
    return [
        result or Generation(row, _decode(tokenizer, row), "length") for result, row in zip(results, new, strict=True)
    ]


def bucket(length: int) -> int:
    """`length` rounded up to a power of two from 16 to 256, then to a multiple of 256."""
    return max(16, 1 << (length - 1).bit_length()) if length <= 256 else -(-length // 256) * 256


# --- on the device ----------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("model", "capacity", "dtype"))
def _prefill(
    model: LanguageModel,
    params: Tree,
    tokens: Int[Array, "batch seq"],
    segment_ids: Int[Array, "batch seq"],
    *,
    capacity: int,
    dtype: Any,
) -> dict:
    """The state after the prompts: the cache, the scores of the first new token, and each row's next position."""
    cache = model.init_cache(params, tokens.shape[0], capacity, dtype=dtype)
    positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)
    hidden, cache = model.hidden(params, tokens, positions, segment_ids, dtype=dtype, remat="none", cache=cache)
    return {"cache": cache, "logits": model.logits(params, hidden[:, -1]), "position": positions[:, -1] + 1}


@functools.partial(jax.jit, static_argnames=("model", "greedy", "dtype"), donate_argnames="state")
def _generate_chunk(
    model: LanguageModel,
    params: Tree,
    state: dict,
    done: Bool[Array, " batch"],
    start: Int[Array, ""],
    count: Int[Array, ""],
    settings: dict,
    *,
    greedy: bool,
    dtype: Any,
) -> tuple[Int[Array, "batch chunk"], dict]:
    """Up to `count` tokens a row (fewer if all rows are done); what a row gets after its last token means nothing."""
    batch = done.shape[0]

    def next_token(logits: Float[Array, "batch vocab"], step: Int[Array, ""]) -> Int[Array, " batch"]:
        if greedy:
            return jnp.argmax(logits, axis=-1)
        return sample(
            logits,
            _row_keys(settings["key"], step, batch),
            settings["temperature"],
            settings["top_k"],
            settings["top_p"],
        )

    def body(carry: tuple) -> tuple:
        index, done, tokens, state = carry
        token = next_token(state["logits"], start + index).astype(jnp.int32)
        tokens = jax.lax.dynamic_update_slice(tokens, token[:, None], (0, index))
        done = done | jnp.isin(token, settings["eos"])
        hidden, cache = model.hidden(
            params,
            token[:, None],
            state["position"][:, None],
            jnp.ones((batch, 1), jnp.int32),
            dtype=dtype,
            remat="none",
            cache=state["cache"],
        )
        logits = model.logits(params, hidden[:, -1])
        return index + 1, done, tokens, {"cache": cache, "logits": logits, "position": state["position"] + 1}

    def going(carry: tuple) -> Bool[Array, ""]:
        return (carry[0] < count) & ~jnp.all(carry[1])

    begin = (jnp.int32(0), done, jnp.zeros((batch, CHUNK), jnp.int32), state)
    _, _, tokens, state = jax.lax.while_loop(going, body, begin)
    return tokens, state


def _row_keys(key: Key[Array, ""], step: Int[Array, ""], batch: int) -> Key[Array, " batch"]:
    return jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(jnp.arange(batch))


# --- on the host ------------------------------------------------------------------------------------------------------


def _check(
    model: LanguageModel,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop: Sequence[str],
    tokenizer: Any,
) -> None:
    if max_new_tokens < 1:
        raise JaxftError(f"max_new_tokens is {max_new_tokens}: expected at least 1")
    if not temperature >= 0:
        raise JaxftError(f"temperature is {temperature}: expected 0 (greedy) or more")
    if top_k is not None and not 1 <= top_k:
        raise JaxftError(f"top_k is {top_k}: expected at least 1, or None to keep all {model.config.vocab_size} tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise JaxftError(f"top_p is {top_p}: expected more than 0 and at most 1")
    if isinstance(stop, str):
        raise JaxftError(f'stop is the string "{stop}": expected a list of strings')
    if stop and tokenizer is None:
        raise JaxftError("stop strings need a tokenizer to be found")
    if any(not text for text in stop):
        raise JaxftError("a stop string is empty: it would stop everything at once")


def _check_positions(rows: list[list[int]], max_new_tokens: int, positions: int) -> None:
    index, longest = max(enumerate(map(len, rows)), key=lambda item: item[1])
    if longest + max_new_tokens > positions:
        hint = f"lower max_new_tokens to {positions - longest}" if longest < positions else "shorten it"
        raise JaxftError(
            f"prompt {index} has {longest} tokens and max_new_tokens is {max_new_tokens}: together more than the "
            f"{positions} positions of this model; {hint}"
        )


def _encode(index: int, prompt: str | Sequence[int], tokenizer: Any, vocab_size: int) -> list[int]:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise JaxftError(f"prompt {index} is a string: a tokenizer is needed to encode it")
        prompt = tokenizer(prompt)["input_ids"]
    row = [int(token) for token in prompt]
    if not row:
        raise JaxftError(f"prompt {index} has no tokens: there is nothing to continue")
    if not 0 <= min(row) <= max(row) < vocab_size:
        raise JaxftError(f"prompt {index} holds token ids {min(row)} to {max(row)}: expected 0 to {vocab_size - 1}")
    return row


def _eos(model: LanguageModel) -> tuple[int, ...]:
    entry = (model.generation_config or {}).get("eos_token_id")
    if entry is None:
        return model.config.eos_token_ids
    return tuple(entry) if isinstance(entry, (list, tuple)) else (entry,)


def _decode(tokenizer: Any, tokens: list[int]) -> str | None:
    return None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=True)


def _finished(tokens: list[int], eos: tuple[int, ...], stop: Sequence[str], tokenizer: Any) -> Generation | None:
    """The result of a row that has met its end within `tokens`, or None if it goes on."""
    end = next((i for i, token in enumerate(tokens) if token in eos), None)
    kept = tokens if end is None else tokens[: end + 1]
    if stop:
        text = tokenizer.decode(kept, skip_special_tokens=True)
        cuts = [at for at in (text.find(string) for string in stop) if at >= 0]
        if cuts:
            while any(string in tokenizer.decode(kept[:-1], skip_special_tokens=True) for string in stop):
                kept = kept[:-1]  # the fewest tokens whose text holds the stop string
            return Generation(kept, text[: min(cuts)], "stop")
    return None if end is None else Generation(kept, _decode(tokenizer, kept), "eos")
