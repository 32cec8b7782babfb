"""The environment of the processes that tests start: flags as tests/conftest.py sets them, other devices."""

import os
import re


def xla_flags(devices: int) -> str:
    """`XLA_FLAGS` of this process for `devices` CPU devices."""
    return re.sub(r"(?<=device_count=)\d+", str(devices), os.environ["XLA_FLAGS"])


def environment(devices: int = 1) -> dict[str, str]:
    """That of this process, for a program with as many devices."""
    return os.environ | {"XLA_FLAGS": xla_flags(devices)}
