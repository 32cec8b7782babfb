"""ESFT: relevance, the experts that a threshold buys, what trains, and the published scores and choices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.errors import JaxftError
from jaxft.methods import Probe, count_trainable, select
from jaxft.methods.selection.esft import esft
from jaxft.methods.selection.scores import routing_shares
from jaxft.methods.selection.units import covering
from jaxft.partition import combine, weights_by_path
from jaxft.weights import RowSplit
from tests.methods.tiny import LOSS, MIXTURE, MIXTURE_LOSS, batches, mixture_trial, params

MATRICES = [f"layers.mlp.experts.{name}.kernel" for name in ("gate", "up", "down")]
LAYERS = np.arange(4)


def probe(loss=MIXTURE_LOSS, count=2) -> Probe:
    return Probe(loss_fn=loss, batches=lambda: iter(batches()[:count]))


def forced(*experts: int) -> dict:
    """Weights whose router, by a bias, sends every token of layer l to `experts[l]` first, and to expert 3 next."""
    made = params(model=MIXTURE)
    bias = np.zeros((4, 4), np.float32)
    bias[:, 3] = 1
    bias[LAYERS, experts] = 2
    mlp = {**made["layers"]["mlp"], "router": {"kernel": jnp.zeros((4, 32, 4)), "bias": jnp.asarray(bias)}}
    return {**made, "layers": {**made["layers"], "mlp": mlp}}


def test_forced_routing_selects_the_known_experts():
    given = forced(2, 0, 1, 0)
    shares = routing_shares(given, probe(), "token", 2)
    expected = np.zeros((4, 4))
    expected[:, 3] = expected[LAYERS, [2, 0, 1, 0]] = 0.5
    np.testing.assert_allclose(shares, expected, atol=1e-6)
    gates = routing_shares(given, probe(), "gate", 2)
    first = np.exp(2) / (np.exp(2) + np.exp(1))
    np.testing.assert_allclose(gates[LAYERS, [2, 0, 1, 0]], first, rtol=1e-5)
    tuned = esft(p=0.5, score="gate", batches=2).init(jax.random.key(0), given, probe())
    weights = weights_by_path(combine(tuned))
    for path in MATRICES:
        assert isinstance(weights[path], RowSplit) and weights[path].index.tolist() == [[2], [0], [1], [0]]
    assert {p for p in weights_by_path(tuned.trainable)} == set(MATRICES)
    assert count_trainable(tuned) == 3 * 4 * 32 * 24
    everything = esft(p=1.0, batches=2).init(jax.random.key(0), given, probe())
    assert weights_by_path(combine(everything))[MATRICES[0]].index.tolist() == [[2, 3], [0, 3], [1, 3], [0, 3]]


def test_relevance_is_that_of_the_router_and_leaves_padding_out():
    given = params(model=MIXTURE)
    for kind in ("token", "gate"):
        np.testing.assert_allclose(jnp.sum(routing_shares(given, probe(), kind, 2), -1), 1, rtol=1e-5)
    batch = batches()[0]
    _, routing = MIXTURE.hidden(
        given, batch["tokens"], batch["positions"], batch["segment_ids"], routing=True, remat="none"
    )
    assert int(routing.count[0]) == (batch["segment_ids"] > 0).sum()
    mass, count = probe().gates(given, 1)
    np.testing.assert_array_equal(count, routing.tokens)
    np.testing.assert_allclose(jnp.sum(mass, -1), routing.count, rtol=1e-5)  # gates of a token sum up to 1 here


# Of https://github.com/deepseek-ai/ESFT, results/expert_scores/intent/summary.json (token_scores, layer: expert: share,
# those above 0.03) and results/expert_configs/intent.json.
PUBLISHED = {
    1: ({6: 0.0423, 8: 0.0653, 20: 0.0399, 26: 0.0463, 32: 0.0321, 43: 0.0347, 55: 0.0435, 60: 0.0309, 62: 0.0342},
        [8, 26, 55, 6, 20]),
    12: ({8: 0.0217, 18: 0.0356, 28: 0.0362, 41: 0.0499, 44: 0.0462, 57: 0.0426, 58: 0.0336, 61: 0.0441},
         [41, 44, 61, 57, 28]),
    16: ({10: 0.0595, 17: 0.0291, 20: 0.0729, 24: 0.0587, 15: 0.0328, 28: 0.03}, [20, 10, 24, 15]),
}  # fmt: skip


@pytest.mark.parametrize("layer", PUBLISHED)
def test_the_published_choice(layer):
    given, chosen = PUBLISHED[layer]
    shares = np.zeros((1, 64))
    shares[0, list(given)] = list(given.values())
    rest = np.flatnonzero(shares[0] == 0)
    shares[0, rest] = (1 - shares.sum()) / rest.size  # none of them reaches 0.03
    assert np.flatnonzero(covering(shares, 0.2)[0]).tolist() == sorted(chosen)


def test_covering():
    shares = np.array([[0.5, 0.3, 0.2, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 1.0, 0.0]])
    assert covering(shares, 0.5).astype(int).tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]]
    assert covering(shares, 0.51).astype(int).tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 1, 0]]
    assert covering(shares, 1.0).sum(-1).tolist() == [3, 4, 1]


def test_a_run_is_planned_with_the_most_experts_there_can_be():
    def rows(p):
        tuned = jax.eval_shape(
            lambda w: esft(p=p, batches=2).init(jax.random.key(0), w, probe()), params(model=MIXTURE)
        )
        return weights_by_path(combine(tuned))[MATRICES[0]].rows.shape

    assert rows(0.5) == (4, 2, 32, 24) and rows(0.51) == (4, 3, 32, 24)


def test_layers_with_fewer_experts_are_padded_and_padding_is_not_counted():
    given = params(model=MIXTURE)
    tuned = esft(p=0.4, batches=2).init(jax.random.key(0), given, probe())
    index = weights_by_path(combine(tuned))[MATRICES[0]].index
    chosen = covering(routing_shares(given, probe(), "token", 2), 0.4)
    assert (np.asarray(index) < 4).sum() == chosen.sum() and index.shape == (4, chosen.sum(-1).max())
    assert count_trainable(tuned) == 3 * 32 * 24 * chosen.sum()


def test_the_vocabulary_draws_experts_again_without_compiling():
    method = select({"name": "gate", "batches": 2}, "expert", budget=2, on="@experts", period=2)
    trial = mixture_trial(method)
    index = {e.step: e.after.frozen["layers"]["mlp"]["experts"]["up"]["kernel"].index for e in trial.events}
    assert index[6].shape == (4, 2) and any(e.kind == "update" for e in trial.events)
    assert not [e.step for e in trial.events[1:] if e.kind == "step" and e.programs]
    shares = routing_shares(trial.params, trial.probe, "token", 2)
    best = np.sort(np.argsort(-np.asarray(shares), -1, kind="stable")[:, :2])
    np.testing.assert_array_equal(index[1], best)


def test_refusals():
    with pytest.raises(JaxftError, match="p=0 is not a share"):
        esft(p=0)
    with pytest.raises(JaxftError, match='score="gates" is unknown: expected one of token, gate'):
        esft(score="gates")
    with pytest.raises(JaxftError, match='"@experts" matches no weight'):
        esft().init(jax.random.key(0), params(), probe(LOSS))
    with pytest.raises(JaxftError, match="has no experts to choose from"):
        select("magnitude", "expert", budget=1).init(jax.random.key(0), params(), Probe())
    with pytest.raises(JaxftError, match="use granularity expert"):
        select({"name": "gate", "batches": 2}, "element", budget=1, on="@experts").init(
            jax.random.key(0), params(model=MIXTURE), probe()
        )
