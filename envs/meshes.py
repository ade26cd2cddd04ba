"""Coarser meshes for the cameras of a policy where pictures are drawn by the processor.

A Panda's visual meshes have 134,000 triangles, and a software renderer pays for each of them in every picture, however
small the picture. Here the vertices of a mesh are gathered in cells of a few millimetres and merged (vertex clustering,
Rossignac and Borrel 1993), which a camera picture of 64 x 64, with pixels of 2 cm, hardly shows: docs/rgb.md measures
both. Videos, and machines that render on a GPU, keep the original meshes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

CELL_M = 0.008
"""Side of a cell."""
CELLS_ACROSS = 16
"""Small things have smaller cells: at least so many along the longest side of a mesh."""
MOST_TRIANGLES = 1000
"""Meshes with fewer are left alone."""

Mesh = tuple[NDArray[np.float32], NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32]]
"""Vertices [V, 3], m; triangles [T, 3]; normals [V, 3]; texture coordinates [V, 2]."""

_MADE: dict[tuple[str, int, tuple[float, ...]], Mesh] = {}
"""Coarse meshes by file, part and scale."""


@contextlib.contextmanager
def coarse_meshes() -> Iterator[None]:
    """Within the block, bodies get coarse meshes in place of fine ones. Not for threads."""
    import sapien.render

    kind = sapien.render.RenderBodyComponent
    attach = kind.attach

    def attach_coarse(self: Any, shape: Any) -> Any:
        for part in _coarse_parts(shape):
            attach(self, part)
        return self

    kind.attach = attach_coarse
    try:
        yield
    finally:
        kind.attach = attach


def cluster(mesh: Mesh, cell_m: float) -> Mesh:
    """Return `mesh` with one vertex per cell and side: where its vertices were in the mean.

    Vertices of a cell whose normals point into different octants become one place with several normals, so that edges
    stay sharp and no gaps open. No vertex moves further than the diagonal of a cell.
    """
    vertices, triangles, normals, uvs = mesh
    cells = _groups(np.floor(vertices / cell_m).astype(np.int64))
    place = _means(vertices, cells)
    octant = (normals > 0) @ np.array([1, 2, 4])
    corners = _groups(np.stack([cells, octant], axis=1))
    first = np.unique(corners, return_index=True)[1]
    facing = _means(normals, corners)
    facing /= np.maximum(np.linalg.norm(facing, axis=1, keepdims=True), 1e-6)
    a, b, c = cells[triangles].T
    left = triangles[(a != b) & (b != c) & (a != c)]
    kept = np.unique(np.sort(cells[left], axis=1), axis=0, return_index=True)[1]
    return (
        place[cells[first]].astype(np.float32),
        corners[left[np.sort(kept)]].astype(np.uint32),
        facing.astype(np.float32),
        uvs[first].astype(np.float32),
    )


def _groups(keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return a number per row of `keys` [V, K], equal where rows are equal: [V]."""
    return np.unique(keys, axis=0, return_inverse=True)[1].reshape(-1)


def _means(values: NDArray[Any], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean of `values` [V, 3] in each of the G groups [V]: [G, 3]."""
    counts = np.bincount(groups)
    return np.stack([np.bincount(groups, column) / counts for column in values.T.astype(np.float64)], axis=1)


def flatten(mesh: Mesh) -> Mesh | None:
    """Return two triangles that look like `mesh`, if that is a level rectangle with an even texture, else None."""
    vertices, triangles, normals, uvs = mesh
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    (x0, y0, z), (x1, y1, top) = low, high
    u, v = vertices[triangles[:, 1]] - vertices[triangles[:, 0]], vertices[triangles[:, 2]] - vertices[triangles[:, 0]]
    area = 0.5 * np.abs(u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0]).sum()
    if top > z or np.ptp(normals, axis=0).any() or abs(area - (x1 - x0) * (y1 - y0)) > 1e-3 * area:
        return None
    design = np.column_stack([vertices[:, :2], np.ones(len(vertices))])
    texture = np.linalg.lstsq(design, uvs, rcond=None)[0]
    if np.abs(design @ texture - uvs).max() > 1e-3:
        return None
    corners = np.array([[x0, y0, z], [x1, y0, z], [x1, y1, z], [x0, y1, z]], dtype=np.float32)
    order = [[0, 1, 2], [0, 2, 3]] if normals[0, 2] > 0 else [[0, 2, 1], [0, 3, 2]]
    return (
        corners,
        np.array(order, dtype=np.uint32),
        np.tile(normals[:1], (4, 1)).astype(np.float32),
        (np.column_stack([corners[:, :2], np.ones(4)]) @ texture).astype(np.float32),
    )


def _coarse_parts(shape: Any) -> Iterator[Any]:
    """Yield the shapes that stand for `shape`: itself, or a coarser one for each of its parts."""
    import sapien.render

    fine = isinstance(shape, sapien.render.RenderShapeTriangleMesh) and (
        sum(len(part.triangles) for part in shape.parts) > MOST_TRIANGLES
    )
    if not fine:
        yield shape
        return
    for number, part in enumerate(shape.parts):
        vertices, triangles, normals, uvs = _coarse(shape, number, part)
        if len(triangles):
            made = sapien.render.RenderShapeTriangleMesh(vertices, triangles, normals, uvs, part.material)
            made.local_pose, made.name = shape.local_pose, shape.name
            made.set_front_face(shape.get_front_face())
            yield made


def _coarse(shape: Any, number: int, part: Any) -> Mesh:
    """Return the coarse mesh of `part`, the part `number` of `shape`; those of files are made once."""
    scale = tuple(float(s) for s in shape.scale)
    key = (shape.filename, number, scale)
    if shape.filename and key in _MADE:
        return _MADE[key]
    vertices = part.vertices * np.array(scale)
    mesh = (vertices, part.triangles.astype(np.int64), part.get_vertex_normal(), part.get_vertex_uv())
    cell_m = min(CELL_M, float(np.ptp(vertices, axis=0).max()) / CELLS_ACROSS)
    found = flatten(mesh) or cluster(mesh, cell_m)
    if shape.filename:
        _MADE[key] = found
    return found
