"""Meshes: sizes that fit, sizes that do not, and which process feeds which rows."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
from pydantic import ValidationError

from jaxft.distributed import AXES, MeshConfig, MeshError, data_partition, make_mesh


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        ({}, (8, 1, 1, 1, 1)),
        ({"fsdp": 8}, (1, 8, 1, 1, 1)),
        ({"fsdp": -1, "tensor": 2}, (1, 4, 2, 1, 1)),
        ({"fsdp": 2, "tensor": 4}, (1, 2, 4, 1, 1)),
        ({"data": 2, "fsdp": 1, "sequence": -1}, (2, 1, 1, 4, 1)),
        ({"fsdp": 2, "dcn": 2}, (4, 2, 1, 1, 1)),
        ({"fsdp": -1, "dcn": 2}, (2, 4, 1, 1, 1)),
    ],
)
def test_sizes(config, sizes):
    mesh = make_mesh(MeshConfig(**config))
    assert tuple(mesh.shape[a] for a in AXES) == sizes
    assert {d.id for d in mesh.devices.flat} == set(range(8))


def test_slices_are_the_outer_part_of_the_data_axis():
    mesh = make_mesh(MeshConfig(fsdp=2, dcn=2))
    first = {d.id for d in mesh.devices[:2].flat}
    assert first == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fsdp": 3}, r"\(fsdp: 3\) needs a multiple of 3 devices, but there are 8; possible: \{data: 4, fsdp: 2\}"),
        ({"data": 2, "fsdp": 2}, r"has 4 devices, but there are 8; set one axis to -1"),
        ({"data": 16}, r"\(data: 16\) has 16 devices, but there are 8"),
        ({"fsdp": 4, "tensor": 4}, r"needs a multiple of 16 devices.*possible: \{data: 1, fsdp: 4, tensor: 2\}"),
        ({"tensor": 8, "dcn": 2}, r"mesh.data = 1 is not a multiple of mesh.dcn = 2"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused_with_a_proposal(config, message):
    with pytest.raises(MeshError, match=message):
        make_mesh(MeshConfig(**config))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"fsdp": 0}, "mesh.fsdp = 0"),
        ({"tensor": -2}, "mesh.tensor = -2"),
        ({"data": -1, "fsdp": -1}, "only one axis"),
        ({"fdsp": 2}, "fdsp"),
        ({"dcn": 0}, "dcn"),
    ],
)
def test_a_wrong_key_or_size_is_refused_before_devices_are_looked_at(config, message):
    with pytest.raises(ValidationError, match=message):
        MeshConfig(**config)


def test_one_device_is_a_mesh():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert mesh.size == 1 and data_partition(mesh) == (0, 1)


def fake_mesh(shape, processes):
    """A mesh whose devices belong to the given processes, in order."""
    devices = np.empty(len(processes), object)
    devices[:] = [SimpleNamespace(process_index=p) for p in processes]
    return SimpleNamespace(axis_names=AXES, devices=devices.reshape(shape))


@pytest.mark.parametrize(
    ("shape", "processes", "expected"),
    [
        ((4, 1, 1, 1, 1), [0, 0, 1, 1], {0: (0, 2), 1: (1, 2)}),
        ((1, 4, 1, 1, 1), [0, 0, 1, 1], {0: (0, 2), 1: (1, 2)}),
        ((1, 1, 4, 1, 1), [0, 0, 1, 1], {0: (0, 1), 1: (0, 1)}),  # tensor over processes: all feed the same rows
        ((2, 1, 2, 1, 1), [0, 1, 2, 3], {0: (0, 2), 1: (0, 2), 2: (1, 2), 3: (1, 2)}),
        ((2, 2, 1, 1, 1), [0, 1, 2, 3], {p: (p, 4) for p in range(4)}),
    ],
)
def test_data_partition(shape, processes, expected, monkeypatch):
    mesh = fake_mesh(shape, processes)
    for process, part in expected.items():
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        assert data_partition(mesh) == part


@pytest.mark.parametrize("processes", [[0, 1, 1, 1], [0, 1, 0, 1]])
def test_rows_that_cannot_be_divided_among_processes_are_refused(processes):
    # rows in the order of the mesh: unequal shares, or shares that do not follow one another
    with pytest.raises(MeshError, match="cannot be divided among the processes"):
        data_partition(fake_mesh((4, 1, 1, 1, 1), processes))
