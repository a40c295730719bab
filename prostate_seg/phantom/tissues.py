"""Rendering of the pelvis, slice by slice; each tissue is blended over those further outside.

Arrays are [SUB_SLICES, Y, X], the thin slices of one slice. Signal is relative, urine = 1.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from prostate_seg.imaging.geometry import Geometry
from prostate_seg.phantom.patient import (
    BODY_TEXTURE_VOX,
    FLATTENING_PIVOT,
    GLAND_TEXTURE_REACH,
    GLAND_TEXTURE_VOX,
    URETHRA,
    Gland,
    Patient,
    Points,
    Vector,
    unit_points,
)
from prostate_seg.phantom.study import Study, grid_points

FAT, MUSCLE, CORTEX, MARROW, URINE, FLUID, CAPSULE = 0.58, 0.13, 0.04, 0.4, 1.0, 0.75, 0.1
DETRUSOR, RECTAL_WALL, MUCOSA, SPHINCTER, LOOSE_TISSUE = 0.17, 0.22, 0.45, 0.18, 0.38
"""T2-weighted signal, measured on real studies."""
SUB_SLICES = 3
"""Thin slices whose mean is one slice, which blurs edges through the plane."""
EDGE_MM = 1.0
"""Width of the ramp from one tissue to the next."""
RECTUM_GAP_MM = 1.5
"""Distance from the back of the gland to the rectal wall."""
FAT_RIM_MM = 2.0
"""Loose tissue around the capsule, which separates the gland from bladder, veins and rectum."""
COIL_REACH_MM = 25.0
"""Distance over which an endorectal coil's gain falls to 0.6 of its maximum."""
FADE_FROM = 2 / 3
"""Fraction of the half length beyond which apex and base fade into their surroundings: the outer sixths of the gland."""
BODY_TEXTURE_MM = 1.6
"""Voxel edge of the patient's lattice where it is the texture of tissues."""
BEND_MM = 3.0
"""Standard deviation of the shifts that deform the body around the gland, along x and along y."""
BEND_VOXEL_MM = 8.0
"""Voxel edge of the same lattice where it gives these shifts: they change over about 20 mm."""


class _Canvas(NamedTuple):
    """The thin slices of one slice, to which tissues are added."""

    signal: np.ndarray
    """Signal so far, shape [SUB_SLICES, Y, X]."""
    points: Points
    bent: Points
    """The same with the deformation of the body, for everything but the gland."""
    grain: np.ndarray
    """Texture of zero mean and unit variance, shape [1, Y, X]."""

    def blend(self, distance_mm: np.ndarray, value: float | np.ndarray, *, edge_mm: float = EDGE_MM) -> None:
        """Blend `value` over the samples with negative distance to a surface."""
        coverage = np.clip(0.5 - distance_mm / edge_mm, 0, 1)
        self.signal[:] += coverage * (value - self.signal)

    def blend_walled(self, distance_mm: np.ndarray, *, wall_mm: float, wall: float, inside: float) -> None:
        """Blend a textured organ with a wall."""
        self.blend(distance_mm, wall)
        self.blend(distance_mm + wall_mm, inside * (1 + 0.06 * self.grain))


def _mirrored(points: Points) -> Points:
    """Fold the right half over the left, so that one shape gives organs on both sides."""
    return points._replace(x=abs(points.x))


def _distance_mm(scaled: Sequence[np.ndarray], half_axes: Sequence[float | np.ndarray]) -> np.ndarray:
    """Return the approximate signed distance to an ellipsoid that `scaled` coordinates map onto the unit ball."""
    tiny = np.float32(1e-6)  # keeps distances finite at the centre
    level = np.sqrt(sum(s * s for s in scaled)) + tiny
    steepness = np.sqrt(sum((s / h) ** 2 for s, h in zip(scaled, half_axes, strict=True))) + tiny
    return level * (level - 1) / steepness


def _ellipsoid_mm(points: Points, centre: Vector, half_axes: Vector) -> np.ndarray:
    return _distance_mm([(p - c) / h for p, c, h in zip(points, centre, half_axes, strict=True)], half_axes)


def _rod_mm(points: Points, start: Vector, end: Vector, *, radius_mm: float) -> np.ndarray:
    """Return the signed distance to a rod with round ends."""
    axis = np.subtract(end, start)
    relative = [p - c for p, c in zip(points, start, strict=True)]
    along = sum(r * np.float32(a / (axis @ axis)) for r, a in zip(relative, axis, strict=True))
    along = np.clip(along, 0, 1)
    return np.sqrt(sum((r - along * np.float32(a)) ** 2 for r, a in zip(relative, axis, strict=True))) - radius_mm


def _tube_mm(points: Points, *, centre_y: np.ndarray, half_width: np.ndarray, half_height: np.ndarray) -> np.ndarray:
    """Return the approximate signed distance to a tube along z with elliptic sections."""
    return _distance_mm((points.x / half_width, (points.y - centre_y) / half_height), (half_width, half_height))


def render_slice(patient: Patient, study: Study, *, acquired: Geometry, index: int, difficulty: float) -> np.ndarray:
    """Render all tissues from the outside in and return the mean through the slice, shape [Y, X]."""
    gland = patient.gland
    first = index - (SUB_SLICES - 1) / (2 * SUB_SLICES)
    placed = acquired.window((first, 0, 0), (SUB_SLICES, *acquired.shape_vox[1:]))
    thin = replace(placed, spacing_mm=(acquired.spacing_mm[0] / SUB_SLICES, *acquired.spacing_mm[1:]))
    points = grid_points(thin, (slice(None),) * 3, gland_centre_mm=study.gland_centre_mm)
    middle = Points(*(p[SUB_SLICES // 2][None] for p in points))
    grain = _body_texture(patient, middle, voxel_mm=BODY_TEXTURE_MM)
    # Shift each place of the body differently, so that neither its two sides nor two patients are alike.
    left, back = (
        BEND_MM * _body_texture(patient, middle._replace(x=middle.x + away), voxel_mm=BEND_VOXEL_MM)
        for away in (0.0, BODY_TEXTURE_VOX / 2 * BEND_VOXEL_MM)
    )
    fat = FAT * (1 + 0.05 * grain - 0.6 * np.clip(grain - 1.7, 0, 1))  # with dots of vessels
    bent = Points(points.x + left, points.y + back, points.z)
    canvas = _Canvas(np.repeat(fat, SUB_SLICES, axis=0), points, bent, grain)
    _add_muscles(canvas, patient)
    _add_bones(canvas, patient)
    _add_pelvic_floor(canvas, gland, study)
    _add_rectum(canvas, gland, study)
    _add_bladder_and_vesicles(canvas, gland, study)
    _add_sphincter(canvas, gland)
    _add_prostate(canvas, patient, difficulty=difficulty)
    # An endorectal coil brightens its neighbourhood.
    distance_sq = points.x**2 + (points.y - _rectum_at(gland, study, points.z)[0]) ** 2
    gain = 1 + study.coil_gain * np.exp(-distance_sq / (2 * COIL_REACH_MM**2))
    return (canvas.signal * gain).mean(axis=0)


def _body_texture(patient: Patient, points: Points, *, voxel_mm: float) -> np.ndarray:
    """Return the patient's texture at some points, on a lattice of this voxel size."""
    index_zyx = [p / np.float32(voxel_mm) for p in points[::-1]]
    return ndimage.map_coordinates(patient.body_texture, index_zyx, order=1, mode="grid-wrap", output=np.float32)


def _add_muscles(canvas: _Canvas, patient: Patient) -> None:
    """Obturators at the side walls, adductors below them, glutei behind, the abdominal wall in front."""
    sides = _mirrored(canvas.bent)
    out = patient.hip_shift_mm
    bowed = sides._replace(x=sides.x - 0.004 * (sides.y - 5) ** 2 * np.sign(5 - sides.y))
    for distance in (
        _ellipsoid_mm(sides, (80 + out, -22, -12), (24, 22, 22)),
        _ellipsoid_mm(bowed, (50 + out, 0, 12), (9, 42, 48)),
        _rod_mm(sides, (18, -48, -22), (62 + out, -8, -28), radius_mm=13),
        (72 - sides.y - 0.45 * sides.x - 4 * np.sin(0.1 * sides.x)) * 0.9,
        _ellipsoid_mm(sides, (16, -78, 45), (16, 9, 45)),
    ):
        canvas.blend(distance, MUSCLE * (1 + 0.2 * canvas.grain))


def _add_bones(canvas: _Canvas, patient: Patient) -> None:
    """Pubis with its rami, hip joint, ischium and coccyx: marrow in a dark rim."""
    sides = _mirrored(canvas.bent)
    out, front = patient.hip_shift_mm, -(patient.gland.half_height_mm + 24)
    bowed = sides._replace(y=sides.y - 0.012 * sides.x**2)
    for distance in (
        _ellipsoid_mm(bowed, (20, front - 2, 0), (20, 11, 20)),
        _rod_mm(sides, (12, front + 2, -14), (50 + out, 14, -44), radius_mm=6.5),
        _ellipsoid_mm(sides, (84 + out, 2, 18), (33, 33, 32)),
        _rod_mm(sides, (70 + out, 22, 8), (56 + out, 30, -46), radius_mm=13),
        _ellipsoid_mm(canvas.bent, (0, 62, 12), (8, 6, 22)),
    ):
        canvas.blend_walled(distance, wall_mm=1.8, wall=CORTEX, inside=MARROW)
    head = _ellipsoid_mm(sides, (88 + out, 2, 20), (25, 25, 25))
    canvas.blend(abs(head - 1.5) - 1.0, LOOSE_TISSUE)
    canvas.blend_walled(head, wall_mm=1.8, wall=CORTEX, inside=MARROW)


def _add_pelvic_floor(canvas: _Canvas, gland: Gland, study: Study) -> None:
    """The levator: a dark funnel around gland and rectum, open to the front, filled with loose tissue and veins."""
    level = np.clip(canvas.bent.z / gland.half_length_mm, -2.2, 1.6)
    back = gland.half_height_mm + 2 * study.rectum_radius_mm + 7
    front = -gland.half_height_mm - 10
    centre_y = gland.tilt * canvas.bent.z + (front + back) / 2
    half_height = (back - front) / 2 * (1 + 0.12 * level)
    half_width = (gland.half_width_mm + 7) * (1 + 0.3 * level - 0.05 * np.minimum(level + 1, 0) ** 2)
    backness = (canvas.bent.y - centre_y) / half_height
    half_width = half_width * (1 - 0.15 * backness)
    funnel = _tube_mm(canvas.bent, centre_y=centre_y, half_width=half_width, half_height=half_height)
    thickness_mm = np.clip(4.5 - 1.5 * level, 2, 8) * np.clip(0.7 + backness, 0, 1)
    canvas.blend(funnel, MUSCLE * (1 + 0.15 * canvas.grain))
    canvas.blend(funnel + thickness_mm, LOOSE_TISSUE * (1 + 0.15 * canvas.grain))
    veins = _ellipsoid_mm(canvas.bent, (0, -gland.half_height_mm - 5, -3), (15, 6, 16))
    canvas.blend(veins, LOOSE_TISSUE * (1 + 0.5 * canvas.grain))


def _rectum_at(gland: Gland, study: Study, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Place the rectum along the back of the gland; above the base it follows the sacrum.

    Returns its centre along y and its half height in mm, and from 0 in the anal canal to 1 above it how far it is open.
    """
    open_part = np.clip((z + gland.half_length_mm + 6) / 14, 0, 1)
    half_height = study.rectum_radius_mm * (0.7 + 0.25 * open_part + 0.06 * np.sin(0.15 * z))
    gland_back = gland.half_height_mm * (1 - FLATTENING_PIVOT * gland.flattening) + gland.tilt * z
    above = np.maximum(z - gland.half_length_mm, 0)
    return gland_back + half_height + RECTUM_GAP_MM + 0.012 * above**2, half_height, open_part


def _add_rectum(canvas: _Canvas, gland: Gland, study: Study) -> None:
    """Rectum behind the gland, narrowing to the anal canal with its sphincter below the apex."""
    centre_y, half_height, open_part = _rectum_at(gland, study, canvas.bent.z)
    half_width = half_height * (1.1 + 0.15 * open_part)
    distance = _tube_mm(canvas.bent, centre_y=centre_y, half_width=half_width, half_height=half_height)
    content = study.rectum_signal * (1 + 0.3 * canvas.grain)
    canvas.blend(distance, RECTAL_WALL)
    canvas.blend(abs(distance + 2.6) - 0.5, MUCOSA)
    canvas.blend(distance + 3.6, RECTAL_WALL + open_part * (content - RECTAL_WALL))


def _add_bladder_and_vesicles(canvas: _Canvas, gland: Gland, study: Study) -> None:
    """Bladder above and before the base, on which it rests; behind it the bright ducts of the seminal vesicles."""
    radius = study.bladder_radius_mm
    centre = (0.0, gland.tilt * gland.half_length_mm - 0.75 * radius + 4, gland.half_length_mm + 0.55 * radius)
    bladder = _ellipsoid_mm(canvas.bent, centre, (1.1 * radius, 0.8 * radius, radius))
    canvas.blend_walled(bladder, wall_mm=4.5, wall=DETRUSOR, inside=URINE)
    sides = _mirrored(canvas.bent)
    top, back = gland.half_length_mm, 0.45 * gland.half_height_mm + gland.tilt * gland.half_length_mm
    vesicles = _ellipsoid_mm(sides._replace(y=sides.y + 0.15 * sides.x), (15, back + 4, top + 2), (15, 6, 9))
    lumen = np.clip(1.6 - 1.6 * abs(canvas.grain), 0, 1)
    canvas.blend(vesicles, RECTAL_WALL + lumen * (FLUID - RECTAL_WALL))


def _add_sphincter(canvas: _Canvas, gland: Gland) -> None:
    """Below the apex the urethra in its sphincter, then the bulb."""
    end_y = -gland.tilt * gland.half_length_mm
    end_z = -gland.half_length_mm
    distance = _rod_mm(canvas.bent, (0, end_y, end_z + 4), (0, end_y - 3, end_z - 16), radius_mm=7.0)
    canvas.blend(distance, SPHINCTER)
    canvas.blend(distance + 4.5, URETHRA)
    canvas.blend(_ellipsoid_mm(canvas.bent, (0, end_y - 2, end_z - 24), (9, 12, 9)), FLUID)


def _add_prostate(canvas: _Canvas, patient: Patient, *, difficulty: float) -> None:
    """Capsule and zones; towards apex and base they fade into the surroundings of the gland."""
    gland = patient.gland
    unit = unit_points(gland, canvas.points)
    distance = _distance_mm(unit, (gland.half_width_mm, gland.half_height_mm, gland.half_length_mm))
    if not (distance < 8).any():
        return
    fade = np.clip((abs(unit.z) - FADE_FROM) / (1 - FADE_FROM), 0, 1) * (0.05 + 0.7 * difficulty)
    neighbour = np.where(unit.z < 0, np.float32(SPHINCTER), np.float32(DETRUSOR))
    canvas.blend(distance - FAT_RIM_MM, LOOSE_TISSUE)
    halo = np.clip(1 - distance / 8, 0, 1) * fade
    canvas.signal[:] += halo * (neighbour - canvas.signal)
    # The patient's lattice at unit coordinates; only samples near the gland need it.
    near = distance < 1
    per_unit = (GLAND_TEXTURE_VOX - 1) / (2 * GLAND_TEXTURE_REACH)
    index_zyx = np.stack([(u[near] + GLAND_TEXTURE_REACH) * per_unit for u in unit[::-1]])
    inside = np.zeros(near.shape, dtype=np.float32)
    inside[near] = ndimage.map_coordinates(patient.gland_signal, index_zyx, order=1, mode="nearest", output=np.float32)
    canvas.blend(distance, inside + fade * (neighbour - inside), edge_mm=EDGE_MM * (1 + 2 * difficulty))
    rim = CAPSULE + 0.15 * difficulty
    canvas.blend(abs(distance) - 0.6, rim + fade * (neighbour - rim))
