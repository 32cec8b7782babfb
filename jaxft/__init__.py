"""jaxft: fine-tuning of pretrained models in JAX, for TPU pods, GPUs and laptops.

A tuning method is a pure function that rewrites a parameter pytree; a partition mask says which leaves of the result
train. `jaxft.chain(jaxft.lora(rank=16), jaxft.hft())` is a method, `method.init` cuts a model's parameters by it, and
one train step runs them all. See docs/architecture.md.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Names load on first use: `import jaxft` (and `jaxft --help`) does not import jax.
_PUBLIC = {
    "jaxft.errors": ("JaxftError",),
    "jaxft.hub": ("load_pretrained", "load_tokenizer", "save_pretrained"),
    "jaxft.methods.base": ("Method", "Signals", "chain", "count_trainable"),
    "jaxft.methods.merge": ("merge",),
    "jaxft.methods.probe": ("Probe",),
    "jaxft.methods.registry": ("build", "get_method"),
    "jaxft.partition": ("Roles", "Trains", "Tuned", "combine", "mark", "select", "split"),
    "jaxft.stacking": ("stack_layers",),
    "jaxft.training.loss": ("cross_entropy", "language_model_loss"),
    "jaxft.training.state": ("init_state", "parameters", "tuned_of"),
    "jaxft.training.step": ("make_train_step",),
    "jaxft.weights": ("embed", "linear", "materialize", "scan_layers", "site", "unembed"),
}
_HOME = {name: module for module, names in _PUBLIC.items() for name in names}
# Every preset of the registry is a name of the package as well: `jaxft.lora`, `jaxft.hft`, ...

__all__ = ["__version__", *sorted(_HOME)]


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(name)
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    from jaxft.methods import methods

    entry = methods().get(name.replace("_", "-"))
    if entry is None:
        raise AttributeError(f'module "jaxft" has no attribute "{name}"')
    return entry.factory


def __dir__() -> list[str]:
    from jaxft.methods import methods

    return sorted([*__all__, *(name.replace("-", "_") for name in methods())])
