"""XLA compilation: the persistent cache, and a count of what was compiled."""

import os
from pathlib import Path

import jax


def enable_compilation_cache() -> str | None:
    """Keeps compiled programs in the user's cache directory, so that a second start compiles nothing.

    A directory that is configured already (`JAX_COMPILATION_CACHE_DIR`) is left as it is, and
    `JAX_ENABLE_COMPILATION_CACHE=false` turns the cache off. Returns the directory, None when there is none.
    """
    if not jax.config.jax_enable_compilation_cache:
        return None
    if jax.config.jax_compilation_cache_dir is None:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxft" / "xla"
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError:  # a read-only home directory costs compile time, not the run
            return None
        jax.config.update("jax_compilation_cache_dir", str(root))
    return jax.config.jax_compilation_cache_dir


class CompilationLog:
    """Counts the programs compiled, and how many of them came from the persistent cache, while entered.

    Attributes:
      programs: programs compiled or loaded from the cache.
      cached: how many of them were loaded from the cache.
      seconds: time spent on both, in seconds.
    """

    def __init__(self) -> None:
        self.programs = self.cached = 0
        self.seconds = 0.0

    def _duration(self, event: str, seconds: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self.programs += 1
            self.seconds += seconds

    def _event(self, event: str, **_: object) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            self.cached += 1

    def __enter__(self) -> "CompilationLog":
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)
        return self

    def __exit__(self, *_: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._duration)
        jax.monitoring.unregister_event_listener(self._event)
