"""Back to ordinary arrays."""

from jaxft.methods.modules.ssf import fold_scale_shift
from jaxft.partition import DECODER_ROLES, Roles, Tuned, combine
from jaxft.weights import ScaleShift, Tree, materialize


def merge(tuned: Tuned, *, roles: Roles = DECODER_ROLES) -> Tree:
    """The tuned model as plain parameters: nodes materialised, scale-and-shift modules folded into the weights.

    Modules that no weight of the architecture can express (soft prompts, bottleneck adapters) stay at their sites; the
    result computes what the tuned model computes either way.
    """
    params = materialize(combine(tuned))
    for scope in (*roles.stacked, None):
        home = params.get(scope) if scope else params
        if not home or "sites" not in home:
            continue
        kept = {}
        for name, module in home["sites"].items():
            if isinstance(module, ScaleShift) and _foldable(home, name, module, roles):
                home = fold_scale_shift(home, name, module, roles.consumers.get(name, ()))
            else:
                kept[name] = module
        home = {k: v for k, v in home.items() if k != "sites"} | ({"sites": kept} if kept else {})
        params = {**params, scope: home} if scope else home
    return params


def _foldable(home: dict, name: str, module: ScaleShift, roles: Roles) -> bool:
    for key in name.split("."):
        if not isinstance(home, dict) or key not in home:
            return False
        home = home[key]
    return "kernel" in home or ("scale" in home and name in roles.consumers)


def unmerged_sites(params: Tree) -> list[str]:
    """Names of the modules that are still at their sites, as `scope.name`."""
    scopes = [("", params)] + [(f"{k}.", v) for k, v in params.items() if isinstance(v, dict) and k != "sites"]
    return sorted(f"{prefix}{name}" for prefix, home in scopes for name in home.get("sites", {}))
