"""The environment of the processes that tests start: flags as tests/conftest.py sets them, other devices."""

import os
import re


def xla_flags(devices: int) -> str:
    """`XLA_FLAGS` of this process, if it has any, for `devices` CPU devices."""
    others = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", ""))
    return f"{others} --xla_force_host_platform_device_count={devices}".strip()


def environment(devices: int = 1) -> dict[str, str]:
    """That of this process, for a program with as many devices."""
    return os.environ | {"XLA_FLAGS": xla_flags(devices)}
