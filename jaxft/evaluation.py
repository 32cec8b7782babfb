"""Evaluation on named sets, and what a run learned and forgot against its base model.

Two kinds of measure: *perplexity* (the mean loss over all target tokens of a set) and *multiple choice* (which of the
offered answers the model finds likeliest). Both are sums over examples before they are means, so that neither the
batch size nor the number of devices nor a last, partial batch (filled with rows of zero weight) changes them.

A set is a *target* (what the run is meant to learn) or *retained* (what it should not forget). `learned` is the fall of
the loss of a target set below the base model's, `forgot` the rise of the loss of a retained set above it, in nats a
token.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float
from pydantic import BaseModel, ConfigDict, Field

from jaxft.data import DataConfig, EvaluationSetConfig, check_vocabulary, evaluation_batches
from jaxft.distributed import row_shards
from jaxft.distributed.sharding import batch_spec, fit_spec
from jaxft.errors import JaxftError
from jaxft.models.language_model import head_of

Batch = Mapping[str, np.ndarray]
Params = Any
RowSums = Callable[[Params, Batch], tuple[np.ndarray, np.ndarray]]
Results = dict[str, dict[str, float]]


class EvaluationConfig(BaseModel):
    """Section `evaluation`: named sets, each scored by itself, never mixed into one number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every: int | None = Field(
        None, ge=1, description="Evaluate every so many steps; null: before and after training only."
    )
    batch_size: int | None = Field(
        None, ge=1, description="Rows evaluated at once; null: data.batch_size. Changes no result."
    )
    sets: dict[str, EvaluationSetConfig] = Field(
        default_factory=dict, description="Name -> where its rows come from, and whether it is a target or retained."
    )
    baseline: str | None = Field(
        None,
        description="A baseline.json of the same base model and sets, to use instead of evaluating the base again.",
    )


def against_base(results: Results, base: Results, kinds: Mapping[str, str]) -> dict[str, Any]:
    """What was learned and forgot, from the losses of the same sets before and after.

    Args:
      results: set -> metrics of the tuned model; each has `loss`.
      base: the same of the base model.
      kinds: set -> "target" or "retained".

    Returns:
      `learned`: the mean fall of the loss over the target sets, in nats a token (positive is good); `forgot`: the
      mean rise over the retained sets (negative: it got better there too); None where there is no such set. `sets`:
      for each set its
      `kind`, `base_loss`, `loss`, `change` (loss - base_loss) and, for multiple choice, `base_accuracy` and `accuracy`.
    """
    sets: dict[str, dict[str, Any]] = {}
    for name, found in results.items():
        before = base[name]
        sets[name] = {
            "kind": kinds[name],
            "base_loss": before["loss"],
            "loss": found["loss"],
            "change": found["loss"] - before["loss"],
        }
        if "accuracy" in found:
            sets[name] |= {"base_accuracy": before["accuracy"], "accuracy": found["accuracy"]}
    learned = [-s["change"] for s in sets.values() if s["kind"] == "target"]
    forgot = [s["change"] for s in sets.values() if s["kind"] == "retained"]
    return {"learned": _mean(learned), "forgot": _mean(forgot), "sets": sets}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def token_losses(
    model: Any,
    params: Params,
    batch: Mapping[str, Array],
    *,
    dtype: Any = jnp.float32,
    attention: str = "auto",
    chunk_tokens: int = 4096,
) -> Float[Array, "batch seq"]:
    """Negative log-likelihood of every target, in fp32 nats, whatever its weight.

    The logits are formed `chunk_tokens` positions at a time, so `[batch, seq, vocab]` never exists in full.

    Args:
      model: a `LanguageModel` (`hidden`, `logits`).
      params: its parameters, with or without weight nodes.
      batch: `tokens`, `targets`, `positions`, `segment_ids`, each int32 [batch, seq].
      dtype: compute dtype.
      attention: attention implementation, see `jaxft.models.attention`.
      chunk_tokens: positions (of all rows together) whose logits are held at once.
    """
    hidden = model.hidden(
        params,
        batch["tokens"],
        batch.get("positions"),
        batch.get("segment_ids"),
        dtype=dtype,
        remat="none",
        attention=attention,
    )
    rows, length, width = hidden.shape
    size = min(length, max(1, chunk_tokens // rows))
    chunks = -(-length // size)
    pad = chunks * size - length
    hidden = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0))).reshape(rows, chunks, size, width)
    targets = jnp.pad(batch["targets"], ((0, 0), (0, pad))).reshape(rows, chunks, size)

    head = head_of(model, params)

    def one(part: tuple[Array, Array]) -> Array:
        logits = model.logits(head, part[0]).astype(jnp.float32)
        picked = jnp.take_along_axis(logits, part[1][..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    losses = jax.lax.map(one, (hidden.swapaxes(0, 1), targets.swapaxes(0, 1)))
    return losses.swapaxes(0, 1).reshape(rows, chunks * size)[:, :length]


def make_row_sums(
    model: Any, mesh: Mesh | None = None, *, dtype: Any = jnp.float32, attention: str = "auto"
) -> RowSums:
    """A function `(params, batch) -> (loss sums [batch], weight sums [batch])`, compiled once for a shape of batch.

    The batch is global: every process passes all of its rows, and gets all of the sums.
    """

    def sums(params: Params, batch: Mapping[str, Array]) -> tuple[Array, Array]:
        weights = batch["weights"]
        # models state the layout of activations on the ambient mesh
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh) if mesh is not None else contextlib.nullcontext():
            losses = token_losses(model, params, batch, dtype=dtype, attention=attention)
        # where, not a product: a padded row may hold anything, even a NaN, without touching the sum
        return jnp.where(weights > 0, losses * weights, 0.0).sum(-1), weights.sum(-1)

    everywhere = NamedSharding(mesh, P()) if mesh is not None else None
    compiled = jax.jit(sums, out_shardings=everywhere)

    def call(params: Params, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        rows = len(batch["tokens"])
        loss, weight = jax.device_get(compiled(params, _place(batch, mesh)))
        return np.asarray(loss[:rows], np.float64), np.asarray(weight[:rows], np.float64)

    return call


def _place(batch: Batch, mesh: Mesh | None) -> dict[str, Array]:
    """The global batch on the mesh, filled up with rows of zero weight to what the mesh divides."""
    if mesh is None:
        return {name: jnp.asarray(x) for name, x in batch.items()}
    unit = row_shards(mesh)
    rows = len(batch["tokens"])
    filled = {name: _fill(np.asarray(x), -(-rows // unit) * unit) for name, x in batch.items()}
    return {
        name: jax.device_put(x, NamedSharding(mesh, fit_spec(name, x.shape, batch_spec(x.ndim), mesh)))
        for name, x in filled.items()
    }


def _fill(x: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([x, np.zeros((rows - len(x), *x.shape[1:]), x.dtype)]) if len(x) < rows else x


def perplexity(row_sums: RowSums, params: Params, batches: Iterable[Batch]) -> dict[str, float]:
    """The mean loss over all target tokens: `{"loss": nats a token, "perplexity": exp(loss), "tokens": count}`.

    Raises JaxftError if no token of the set carries a loss.
    """
    total = weight = 0.0
    size = None
    for batch in batches:
        size = size or len(batch["tokens"])  # a shorter last batch is filled up, so that one shape is compiled
        loss, weights = row_sums(params, {name: _fill(np.asarray(x), size) for name, x in batch.items()})
        total, weight = total + loss.sum(), weight + weights.sum()
    if not weight:
        raise JaxftError("the evaluation set has no token that carries a loss; see `jaxft data`")
    mean = float(total / weight)
    return {"loss": mean, "perplexity": math.exp(min(mean, 700.0)), "tokens": float(weight)}


def multiple_choice(row_sums: RowSums, params: Params, batches: Iterable[Batch]) -> dict[str, float]:
    """The share of questions whose right choice is the likeliest, by two rules, and the loss of the right choices.

    `accuracy` goes by the log-likelihood of the whole choice, `accuracy_per_token` by that divided by the choice's
    number of tokens, so that long choices are not at a disadvantage. Of equal choices the first counts. `loss` is the
    mean loss a token of the right choices, `tokens` their number.

    Args:
      batches: rows as `jaxft.data.evaluation_batches` makes them for `task: multiple_choice`, with `question` (-1 for
        filling), `choice` and `correct`.
    """
    found: dict[int, list[tuple[int, float, float]]] = {}
    right: dict[int, int] = {}
    for batch in batches:
        loss, tokens = row_sums(params, {k: v for k, v in batch.items() if k not in ("question", "choice", "correct")})
        for row, question in enumerate(batch["question"]):
            if question >= 0:
                found.setdefault(int(question), []).append((int(batch["choice"][row]), loss[row], tokens[row]))
                right[int(question)] = int(batch["correct"][row])
    if not found:
        raise JaxftError("the evaluation set has no question; see `jaxft data`")
    raw = normalised = 0
    right_loss = right_tokens = 0.0
    for question, rows in found.items():
        rows.sort()
        losses, lengths = np.array([r[1] for r in rows]), np.array([max(r[2], 1) for r in rows])
        raw += int(np.argmin(losses)) == right[question]
        normalised += int(np.argmin(losses / lengths)) == right[question]
        right_loss += losses[right[question]]
        right_tokens += lengths[right[question]]
    mean = float(right_loss / right_tokens)
    return {
        "loss": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "tokens": float(right_tokens),
        "accuracy": raw / len(found),
        "accuracy_per_token": normalised / len(found),
        "questions": float(len(found)),
    }


def make_evaluation(
    config: EvaluationConfig,
    data: DataConfig,
    tokenizer: Any,
    model: Any,
    mesh: Mesh | None = None,
    *,
    dtype: Any = jnp.float32,
    attention: str = "auto",
) -> Callable[[Params], Results]:
    """A function `params -> {set name: metrics}` over the sets of `config`, which are read here, once.

    Every process reads the sets whole and feeds the devices it has, so that no two can disagree on their number.

    Args:
      config: the `evaluation` section.
      data: the `data` section: format options, `seq_len` and `batch_size` that hold where a set has none of its own.
      tokenizer: as `jaxft.hub.load_tokenizer` gives it.
      model: a `LanguageModel`.
      mesh: the device mesh; None: one device.
      dtype: compute dtype.
      attention: attention implementation.

    Raises:
      JaxftError: a set cannot be read, or nothing in it carries a loss; the message starts with the key of the set.
    """
    sets: dict[str, list[Batch]] = {}
    for name, one in config.sets.items():
        try:
            batches = evaluation_batches(
                one, tokenizer, seq_len=data.seq_len, batch_size=config.batch_size or data.batch_size, data=data
            )
            check_vocabulary(batches.report, model.config.vocab_size)
        except JaxftError as error:
            raise JaxftError(f"evaluation.sets.{name}: {error}") from error
        if not any(batch["weights"].any() for batch in batches):
            raise JaxftError(f"evaluation.sets.{name}: no token of it carries a loss; see `jaxft data`")
        sets[name] = list(batches)
    row_sums = make_row_sums(model, mesh, dtype=dtype, attention=attention)
    measures = {"perplexity": perplexity, "multiple_choice": multiple_choice}

    def evaluate(params: Params) -> Results:
        return {name: measures[config.sets[name].task](row_sums, params, batches) for name, batches in sets.items()}

    return evaluate
