"""Presets against their mechanism written out densely: torch computes the gradients, numpy the masks and Adam.

Each oracle keeps whole matrices, whole moments and a mask, as the reference implementations do; the library holds only
what trains. Masks have to be equal and weights to agree after every step. Where the library departs from a public
implementation, the test of the method says so.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.methods import (
    Probe,
    Signals,
    apet,
    cofitune,
    gmt,
    grafting,
    greentrainer,
    ist,
    lift_principal_weights,
    lisa,
    lt_sft,
    paca,
    s2ft,
    sara,
    smt,
    spiel,
    spt,
    wrap_optimizer,
)
from jaxft.methods.selection.greentrainer import flops
from jaxft.methods.selection.layers import generator
from jaxft.partition import DECODER_ROLES, combine, weights_by_path
from jaxft.weights import Gated, materialize, rounded

torch = pytest.importorskip("torch")

SHAPES = {"attn.q": (8, 6), "attn.o": (6, 8), "mlp.gate": (8, 10), "mlp.up": (8, 10), "mlp.down": (10, 8)}
L, STEPS, RATE = 3, 6, 1e-2
KEY = jax.random.key(5)


@functools.cache
def params() -> dict:
    rng, tree = np.random.default_rng(0), {"layers": {"attn": {}, "mlp": {}}}
    for name, shape in SHAPES.items():
        part, leaf = name.split(".")
        tree["layers"][part][leaf] = {"kernel": jnp.asarray(rng.normal(size=(L, *shape)), jnp.float32) / 3}
    return tree


@functools.cache
def batches() -> tuple[dict, ...]:
    rng = np.random.default_rng(1)
    return tuple({k: rng.normal(size=(12, 8)).astype(np.float32) for k in "xy"} for _ in range(STEPS))


def forward(w: dict, x, tanh):
    for layer in range(L):
        get = {name: w[f"layers.{name}.kernel"][layer] for name in SHAPES}
        hidden = tanh(x @ get["mlp.gate"]) * (x @ get["mlp.up"])
        x = x + tanh(x @ get["attn.q"]) @ get["attn.o"] + hidden @ get["mlp.down"]
    return x


def loss(tree, batch, rng):
    made = forward(weights_by_path(materialize(tree)), batch["x"], jnp.tanh)
    return jnp.sum((made - batch["y"]) ** 2), jnp.float32(made.size), {}


def gradient(w: dict, batch: dict) -> dict[str, np.ndarray]:
    """By torch, of the mean squared error, in float64."""
    leaves = {p: torch.tensor(np.asarray(x, np.float64), requires_grad=True) for p, x in w.items()}
    x, y = (torch.tensor(batch[k].astype(np.float64)) for k in "xy")
    ((forward(leaves, x, torch.tanh) - y) ** 2).mean().backward()
    return {p: np.zeros(t.shape) if t.grad is None else t.grad.numpy() for p, t in leaves.items()}


def mean_gradient(w: dict, count: int, transform=lambda g: g) -> dict[str, np.ndarray]:
    found = [gradient(w, batch) for batch in batches()[:count]]
    return {p: sum(transform(g[p]) for g in found) / count for p in w}


class Adam:
    """Adam over whole matrices; only masked entries move, and only they have moments."""

    def __init__(self, w: dict, rate: float = RATE):
        self.rate, self.count = rate, 0
        self.m, self.v = ({p: np.zeros(x.shape) for p, x in w.items()} for _ in "mv")

    def step(self, w: dict, g: dict, masks: dict) -> dict:
        self.count += 1
        new = {}
        for p, x in w.items():
            on = masks[p]
            self.m[p] = np.where(on, 0.9 * self.m[p] + 0.1 * g[p], 0)
            self.v[p] = np.where(on, 0.999 * self.v[p] + 0.001 * g[p] ** 2, 0)
            rise = self.m[p] / (1 - 0.9**self.count)
            new[p] = x - self.rate * on * rise / (np.sqrt(self.v[p] / (1 - 0.999**self.count)) + 1e-8)
        return new

    def keep(self, masks: dict) -> None:
        """What leaves a mask loses its moments; what enters starts at zero."""
        for moments in (self.m, self.v):
            moments |= {p: np.where(masks[p], x, 0) for p, x in moments.items()}


def probe(trainer=None) -> Probe:
    return Probe(loss_fn=loss, batches=lambda: iter(batches()), trainer=trainer, total_steps=STEPS)


def cuts(method, *, trainer=None, optimizer=None):
    """Trains with the library: yields the cut before each step, and at last."""
    optimizer = wrap_optimizer(method, optimizer or optax.adam(RATE))
    tuned = method.init(KEY, params(), probe(trainer))
    state = optimizer.init(tuned.trainable)

    @jax.jit
    def step(tuned, state, batch):
        def mean(trainable):
            total, weight, _ = loss(combine(tuned._replace(trainable=trainable)), batch, KEY)
            return total / weight

        updates, state = optimizer.update(jax.grad(mean)(tuned.trainable), state, tuned.trainable)
        return tuned._replace(trainable=optax.apply_updates(tuned.trainable, updates)), state

    for i, batch in enumerate(batches(), start=1):
        yield tuned
        tuned, state = step(tuned, state, batch)
        if method.due is not None and method.due(i, STEPS):
            signals = Signals(0.0, None, probe(trainer), optimizer=optimizer)
            tuned, state = method.update(jax.random.fold_in(KEY, i), tuned, state, signals, i)
    yield tuned


def follow(method, **how):
    """Trains with the library: yields (weights, entries that train) before each step, and at last the weights."""

    @jax.jit
    def look(tuned):
        def dense(trainable):
            return weights_by_path(materialize(combine(tuned._replace(trainable=trainable))))

        ones = jax.tree.map(jnp.ones_like, tuned.trainable)
        return jax.jvp(dense, (tuned.trainable,), (ones,))

    for tuned in cuts(method, **how):
        weights, moves = look(tuned)
        yield {p: np.asarray(x) for p, x in weights.items()}, {p: np.asarray(x) != 0 for p, x in moves.items()}


def agree(found: dict, wanted: dict, tolerance: float = 2e-5) -> None:
    for path, x in wanted.items():
        np.testing.assert_allclose(found[path], x, rtol=tolerance, atol=tolerance / 10, err_msg=path)


def same_masks(found: dict, wanted: dict) -> None:
    for path, mask in wanted.items():
        np.testing.assert_array_equal(found[path], mask, err_msg=path)


def start() -> dict[str, np.ndarray]:
    return {p: np.asarray(w, np.float64) for p, w in weights_by_path(params()).items()}


def none() -> dict[str, np.ndarray]:
    return {p: np.zeros(w.shape, bool) for p, w in start().items()}


def top_of_matrices(scores: dict, count) -> dict[str, np.ndarray]:
    masks = none()
    for p, s in scores.items():
        for layer in range(L):
            flat = s[layer].reshape(-1)
            masks[p][layer].reshape(-1)[np.argsort(-flat, kind="stable")[: count(s[layer])]] = True
    return masks


def top_of_all(scores: dict, count: int) -> dict[str, np.ndarray]:
    flat = np.concatenate([s.reshape(-1) for s in scores.values()])
    least = np.sort(flat)[-count]
    return {p: s >= least for p, s in scores.items()}


def follow_fixed_mask(method, masks: dict, **how) -> None:
    """Trains with a mask that stays, beside dense masked Adam."""
    w = start()
    adam = Adam(w)
    for i, (weights, moves) in enumerate(follow(method, **how)):
        same_masks(moves, masks)
        agree(weights, w)
        if i < STEPS:
            w = adam.step(w, gradient(w, batches()[i]), masks)


def test_lift():
    """zihanghliu/LIFT: SVD of every matrix, top-k of |W_r|, Adam on the mask only, moments carried over by mask.

    There k = rank' * (d_in + d_out) and weight decay acts on the mask; here k is given, and decay is the optimizer's.
    """

    def masks(w):
        low = {}
        for p, x in w.items():
            u, s, v = np.linalg.svd(x, full_matrices=False)
            low[p] = np.abs((u[..., :2] * s[..., None, :2]) @ v[..., :2, :])
        return top_of_matrices(low, lambda m: 7)

    w, on = start(), masks(start())
    adam, changed = Adam(w), 0
    for i, (weights, moves) in enumerate(follow(lift_principal_weights(rank=2, budget=7, period=2))):
        same_masks(moves, on)
        agree(weights, w)
        if i < STEPS:
            w = adam.step(w, gradient(w, batches()[i]), on)
            if (i + 1) % 2 == 0 and i + 1 < STEPS:
                before, on = on, masks(w)
                changed += sum(int((before[p] != on[p]).sum()) for p in on)
                adam.keep(on)
    assert changed > 0, "the mask never changed: the test does not test re-selection"


def test_spiel():
    """AlanAnsell/peft (rigl): smallest |delta| out, largest |gradient| in, linear decay; outgoing ones may come back.

    There candidates are the k largest of one batch, and new moments start at the gradients seen; here all positions are
    candidates and moments start at zero.
    """
    k, period, rate = 9, 2, 0.5
    base = start()
    w, on = start(), None
    adam, swapped = Adam(w), 0
    for i, (weights, moves) in enumerate(follow(spiel(budget=k, period=period, replaced=rate, batches=2))):
        on = moves if on is None else on  # the first positions are drawn at random
        assert all((m.reshape(L, -1).sum(1) == k).all() for m in moves.values())
        same_masks(moves, on)
        agree(weights, w)
        if i < STEPS:
            w = adam.step(w, gradient(w, batches()[i]), on)
            if (i + 1) % period == 0 and i + 1 < STEPS:
                g, drop, new = mean_gradient(w, 2), int(rate * (1 - (i + 1) / STEPS) * k), none()
                for p in w:
                    for layer in range(L):
                        active = np.flatnonzero(on[p][layer])
                        delta = np.abs((w[p] - base[p])[layer].reshape(-1))[active]
                        keep = active[np.argsort(delta, kind="stable")[drop:]]
                        score = np.abs(g[p][layer].reshape(-1))
                        score[keep] = np.inf
                        new[p][layer].reshape(-1)[np.argsort(-score)[:k]] = True
                swapped += sum(int((new[p] & ~on[p]).sum()) for p in new)
                on = new
                w = {p: np.where(on[p], w[p], base[p]) for p in w}
                adam.keep(on)
    assert swapped > 0


def test_smt():
    """yudaohai666/Sparse_Matrix_Tuning: mean |accumulated gradient| of every block, the m best of the model.

    There the gradients are those met in a warm-up of full tuning, here those of calibration batches at the start.
    """
    g = mean_gradient(start(), 3)
    scores = {}
    for p in ("layers.attn.q.kernel", "layers.attn.o.kernel"):
        _, d_in, d_out = g[p].shape
        scores[p] = np.abs(g[p]).reshape(L, d_in // 2, 2, d_out // 2, 2).mean((2, 4))
    chosen, masks = top_of_all(scores, 7), none()
    masks |= {p: np.repeat(np.repeat(c, 2, 1), 2, 2) for p, c in chosen.items()}
    assert sum(m.sum() for m in masks.values()) == 7 * 4
    follow_fixed_mask(smt(budget=7, size=2, batches=3, on="layers.attn"), masks)


def test_s2ft():
    """S2FT permutes coupled matrices and trains the first rows of W_down and W_o: the same as rows where they are."""
    method = s2ft(channels=3, heads=1, head_dim=2)
    _, moves = next(follow(method))
    rows = {p: moves[p].all(-1) for p in ("layers.mlp.down.kernel", "layers.attn.o.kernel")}
    order = {p: np.argsort(~r, axis=-1, kind="stable") for p, r in rows.items()}
    partners = {
        "layers.mlp.down.kernel": ("layers.mlp.gate.kernel", "layers.mlp.up.kernel"),
        "layers.attn.o.kernel": ("layers.attn.q.kernel",),
    }

    def permuted(w: dict) -> dict:
        w = dict(w)
        for p, index in order.items():
            w[p] = np.take_along_axis(w[p], index[:, :, None], 1)
            for path in partners[p]:
                w[path] = np.take_along_axis(w[path], index[:, None, :], 2)
        return w

    w, g = permuted(start()), gradient(start(), batches()[0])
    agree(gradient(w, batches()[0]), permuted(g))  # the permuted model is the same model
    first = none()
    first["layers.mlp.down.kernel"][:, :3] = True
    first["layers.attn.o.kernel"][:, :2] = True  # one head of two channels
    adam = Adam(w)
    for i, (weights, _) in enumerate(follow(method)):
        back = {p: np.take_along_axis(w[p], np.argsort(index)[:, :, None], 1) for p, index in order.items()}
        agree(weights, back)
        if i < STEPS:
            w = adam.step(w, gradient(w, batches()[i]), first)


def test_gmt():
    """The mask of every step is that of the |gradient| per tensor (layer); Adam sees the masked gradient, by torch."""
    leaves = {p: [torch.tensor(x, requires_grad=True) for x in w] for p, w in start().items()}
    optimizer = torch.optim.Adam([t for ts in leaves.values() for t in ts], lr=RATE)
    for i, (weights, moves) in enumerate(follow(gmt(ratio=0.4, on="layers"))):
        assert all(m.all() for m in moves.values())
        agree(weights, {p: np.stack([t.detach().numpy() for t in ts]) for p, ts in leaves.items()})
        if i < STEPS:
            g = gradient({p: np.stack([t.detach().numpy() for t in ts]) for p, ts in leaves.items()}, batches()[i])
            for p, ts in leaves.items():
                for layer, t in enumerate(ts):
                    keep = g[p][layer].size - round(0.4 * g[p][layer].size)
                    least = np.sort(np.abs(g[p][layer]).reshape(-1))[-keep]
                    t.grad = torch.tensor(np.where(np.abs(g[p][layer]) >= least, g[p][layer], 0))
            optimizer.step()


def test_sara():
    """sjtuplayer/SaRA: entries below the threshold train; midway those still below it go on, the others stay put.

    There the optimizer is made anew midway and the value of a trained entry is replaced by its magnitude; here moments
    go on and signs stay. The nuclear norm is tested by itself.
    """
    w = start()
    flat = np.sort(np.abs(np.concatenate([x.reshape(-1) for x in w.values()])))
    threshold = flat[round(0.2 * flat.size) - 1]
    on = {p: np.abs(x) <= threshold for p, x in w.items()}
    adam, left = Adam(w, 5e-2), 0
    method = sara(budget=0.2, adjustments=1, nuclear=0)
    for i, (weights, moves) in enumerate(follow(method, optimizer=optax.adam(5e-2))):
        same_masks(moves, on)
        agree(weights, w)
        if i < STEPS:
            w = adam.step(w, gradient(w, batches()[i]), on)
            if i + 1 == STEPS // 2:
                still = {p: m & (np.abs(w[p]) <= threshold) for p, m in on.items()}
                left = sum(int(on[p].sum() - m.sum()) for p, m in still.items())
                on = still
                adam.keep(on)
    assert left > 0, "nothing grew beyond the threshold"


def test_lt_sft():
    """cambridgeltl/composable-sft: the K entries that a full run moved most train, from the start, and no other."""
    moved = {p: np.random.default_rng(i).normal(size=w.shape) for i, (p, w) in enumerate(start().items())}

    def trainer(given, method, steps):
        return jax.tree_util.tree_map_with_path(
            lambda path, w: w + moved[".".join(k.key for k in path)].astype(np.float32), given
        )

    method = lt_sft(budget=100, search_steps=1, on="layers")
    follow_fixed_mask(method, top_of_all({p: np.abs(m) for p, m in moved.items()}, 100), trainer=trainer)


def test_paca():
    """The partial backward pass gives dense Adam on the chosen input channels."""
    method = paca(rank=2)
    _, masks = next(follow(method))
    assert all((m.all(-1) == m.any(-1)).all() and (m.any(-1).sum(-1) == 2).all() for m in masks.values())
    follow_fixed_mask(method, masks)


def test_lisa():
    """LMFlow: every period other layers, each with a fresh AdamW; the layers in between are untouched."""
    w, on = start(), None
    seen = set()
    for i, (weights, moves) in enumerate(follow(lisa(num_layers=1, period=2, always=""))):
        agree(weights, w)
        if i % 2 == 0 and i < STEPS:
            on, adam = moves, Adam(w)
            layers = {tuple(m.reshape(L, -1).all(1)) for m in moves.values()}
            assert len(layers) == 1 and sum(next(iter(layers))) == 1
            seen |= layers
        same_masks(moves, on)
        if i < STEPS:
            w = adam.step(w, gradient(w, batches()[i]), on)
    assert len(seen) > 1


def test_spt():
    """The tau entries of largest summed squared gradient; all entrywise where no matrix has enough of them."""
    masks = top_of_all(mean_gradient(start(), 3, np.square), 60)
    follow_fixed_mask(spt(budget=60, threshold=float("inf"), batches=3), masks)


def test_greentrainer():
    """Importance sum g^2 per tensor, and the choice that brute force finds within the budget of backward FLOPs."""
    method = greentrainer(
        rho=0.5, rounds=1, batches=2, resolution=1008
    )  # one part, one multiply-add: nothing is rounded
    g, paths = mean_gradient(start(), 2), list(start())
    gains = np.stack([(g[p] ** 2).sum((1, 2)) for p in paths], 1)
    costs, passing = flops(params(), paths, DECODER_ROLES)
    budget, best, chosen = 0.5 * (costs.sum() + passing.sum()), -1.0, None
    for bits in range(1, 2**gains.size):
        mask = ((bits >> np.arange(gains.size)) & 1).astype(bool).reshape(gains.shape)
        if gains[mask].sum() > best:
            deepest = np.flatnonzero(mask.any(1))[0]
            if costs[mask].sum() + passing[deepest:].sum() <= budget:
                best, chosen = gains[mask].sum(), mask
    tuned = method.init(KEY, params(), probe())
    found = weights_by_path(combine(tuned))
    opened = np.stack([np.asarray(found[p].is_open) for p in paths], 1)
    assert all(isinstance(found[p], Gated) for p in paths)
    np.testing.assert_array_equal(opened, chosen)
    masks = {p: np.broadcast_to(chosen[:, i, None, None], start()[p].shape) for i, p in enumerate(paths)}
    follow_fixed_mask(method, masks)


def test_apet():
    """yushengsu-thu/PET_Scaling: what is drawn trains, the rest does not; there whole tensors, here n entries."""
    method = apet(count=50)
    _, masks = next(follow(method))
    assert sum(m.sum() for m in masks.values()) == 50 and all(m.any() for m in masks.values())
    follow_fixed_mask(method, masks)


def test_grafting():
    """abhishekpanigrahi1996/Skill-Localization-by-grafting: S moves by SGD along (1 - 2 base) delta g sigmoid'(S).

    There the base patch holds what exceeds the k-th largest change, here the k largest.
    """
    moved = {p: np.random.default_rng(i).normal(size=w.shape) / 3 for i, (p, w) in enumerate(start().items())}

    def trainer(given, method, steps):
        return jax.tree_util.tree_map_with_path(
            lambda path, w: w + moved[".".join(k.key for k in path)].astype(np.float32), given
        )

    rate, pre = 100.0, start()
    patch = {p: m.astype(float) for p, m in top_of_all({p: np.abs(m) for p, m in moved.items()}, 100).items()}
    logits = {p: np.full(w.shape, -1.0) for p, w in pre.items()}
    method = grafting(budget=100, tuning_steps=1, sharpness=1.0, on="layers")
    for i, tuned in enumerate(cuts(method, trainer=trainer, optimizer=optax.sgd(rate))):
        flip = {p: 1 / (1 + np.exp(-s)) for p, s in logits.items()}
        w = {p: pre[p] + (patch[p] + (1 - 2 * patch[p]) * flip[p]) * moved[p] for p in pre}
        agree(weights_by_path(materialize(combine(tuned))), w, 2e-4)  # a high rate, which makes roundings grow
        if i < STEPS:
            g = gradient(w, batches()[i])
            for p, f in flip.items():
                logits[p] = logits[p] - rate * (1 - 2 * patch[p]) * g[p] * moved[p] * f * (1 - f)
    share = {p: np.round(patch[p] + (1 - 2 * patch[p]) * flip[p]) for p in pre}
    assert sum((share[p] != patch[p]).sum() for p in pre) > 10, "the mask never changed"
    agree(weights_by_path(rounded(combine(tuned))), {p: pre[p] + share[p] * moved[p] for p in pre})


def test_cofitune():
    """rattlesnakey/CoFiTune: |tanh| of the standardised gradient of gates that are one, by torch, damps by unit.

    There gates are differentiated in the divergence of two passes with dropout, here in the loss. There W_up and W_down
    of the named layers have an optimizer, as here; its flattened mask of W_up is replaced by that of the units.
    """
    gates = {n: torch.ones(L, d, dtype=torch.float64, requires_grad=True) for n, d in (("up", 10), ("down", 8))}
    w = {p: torch.tensor(x) for p, x in start().items()}
    total = 0.0
    for batch in batches()[:2]:
        x, y = (torch.tensor(batch[k].astype(np.float64)) for k in "xy")
        for layer in range(L):
            get = {name: w[f"layers.{name}.kernel"][layer] for name in SHAPES}
            hidden = torch.tanh(x @ get["mlp.gate"]) * (x @ get["mlp.up"] * gates["up"][layer])
            x = x + torch.tanh(x @ get["attn.q"]) @ get["attn.o"] + hidden @ get["mlp.down"] * gates["down"][layer]
        total = total + ((x - y) ** 2).mean()
    total.backward()
    rates, masks = {}, none()
    for name, gate in gates.items():
        z = (gate.grad - gate.grad.mean(1, keepdim=True)) / gate.grad.std(1, keepdim=True)
        rates[f"layers.mlp.{name}.kernel"] = 1 - torch.tanh(z).abs().numpy()[:, None, :]
        masks[f"layers.mlp.{name}.kernel"][1:] = True
    w = start()
    method = cofitune(first=1, last=3, batches=2)
    for i, (weights, moves) in enumerate(follow(method, optimizer=optax.sgd(0.1))):
        same_masks(moves, masks)
        agree(weights, w)
        if i < STEPS:
            g = gradient(w, batches()[i])
            w = {p: x - 0.1 * g[p] * masks[p] * rates.get(p, 1) for p, x in w.items()}


def test_ist():
    """antgroup/importance-aware-sparse-tuning-IST-paper: trials of suppressed layers, rewards, scores, active layers.

    There a parameter that is not active keeps its own count of steps; here steps are counted in common. Draws are made
    by the library's generator.
    """

    def choose(scores, draws, count):
        chance = 1 / (1 + np.exp(-scores))
        return np.isin(np.arange(L), draws.choice(L, count, replace=False, p=chance / chance.sum()))

    def weights(factors, share):
        return {p: base[p] + 2 * share[:, None, None] * (a @ b) for p, (a, b) in factors.items()}

    def mean_loss(w, batch):
        return np.mean((forward(w, batch["x"].astype(np.float64), np.tanh) - batch["y"]) ** 2)

    method = ist(rank=2, fraction=0.4, suppressed=0.67, candidates=2, period=2, rate=1000.0)
    base, scores, count, seen = start(), np.zeros(L), 0, set()
    for i, tuned in enumerate(cuts(method)):
        found = weights_by_path(combine(tuned))
        if i == 0:
            factors = {p: [np.asarray(f.value, np.float64) for f in (w.a, w.b)] for p, w in found.items()}
            moments = {p: [(np.zeros_like(f), np.zeros_like(f)) for f in ab] for p, ab in factors.items()}
            active = choose(np.zeros(L), generator(jax.random.fold_in(KEY, 1)), 1)
        for w in found.values():
            np.testing.assert_array_equal(w.a.is_open, active)
        np.testing.assert_allclose(tuned.state["importance"], scores, rtol=1e-3, atol=1e-4)
        agree(weights_by_path(materialize(combine(tuned))), weights(factors, np.ones(L)))
        seen.add(active.tobytes())
        if i == STEPS:
            break
        g, count = gradient(weights(factors, np.ones(L)), batches()[i]), count + 1
        for p, (a, b) in factors.items():
            pulls, on = (2 * g[p] @ b.swapaxes(1, 2), 2 * a.swapaxes(1, 2) @ g[p]), active[:, None, None]
            for k, pull in enumerate(pulls):
                m, v = moments[p][k]
                m[:], v[:] = np.where(on, 0.9 * m + 0.1 * pull, m), np.where(on, 0.999 * v + 0.001 * pull**2, v)
                step = m / (1 - 0.9**count) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
                factors[p][k] = factors[p][k] - RATE * on * step
        if i + 1 < STEPS:
            draws = generator(jax.random.fold_in(KEY, i + 1))
            if (i + 1) % 2 == 0:
                sets = []
                while len(sets) < 2:
                    one = choose(scores, draws, 2)
                    if not any((one == other).all() for other in sets):
                        sets.append(one)
                rewards = [np.exp(-mean_loss(weights(factors, np.where(s, 0.25, 1)), batches()[0])) for s in sets]
                chance = 1 / (1 + np.exp(-scores))
                for reward, s in zip(rewards, sets, strict=True):
                    scores = scores + (reward - np.mean(rewards)) * chance * (1 - chance) * 1000.0 * s
            active = choose(-scores, draws, 1)
    assert len(seen) > 1 and np.abs(scores).max() > 1e-2
