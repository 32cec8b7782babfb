"""Errors a user can act on: they name the key or place, the value, and the nearest valid choice."""

import difflib
from collections.abc import Iterable


class JaxftError(ValueError):
    """Base of every error that a user's input causes. The command line prints its message without a traceback."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """A sentence fragment naming the closest of `choices` to `name`, then all of them.

    >>> nearest("rnak", ["rank", "alpha"])
    'did you mean "rank"? Valid: alpha, rank'
    """
    choices = sorted(choices)
    folded = {choice.casefold(): choice for choice in choices}
    close = difflib.get_close_matches(str(name).casefold(), folded, n=1, cutoff=0.5)
    hint = f'did you mean "{folded[close[0]]}"? ' if close else ""
    shown = choices if len(choices) <= 40 else [*choices[:40], f"... ({len(choices)} in all)"]
    return f"{hint}Valid: {', '.join(shown)}"
