"""Noise floor of repeated cross-validation: what seeds, folds and patients contribute to a difference of two settings.

Model of a score: setting + fold + patient + setting x fold + setting x patient + network + residual. Both settings share the
folds and the patients, which are nested in folds. A network is one seed of one fold of one setting; the residual is patient x
network. Mean squares are those of the analysis of variance, intervals Satterthwaite's (1946); docs/science.md has their error.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import f, norm, t

POWER = 0.8
"""Probability with which a planned comparison shows the difference."""
LEVEL = 0.95
"""Coverage of intervals."""
PLANNED_SEEDS = (2, 3, 5, 10)
"""Numbers of seeds for which the plan has a number of patients."""
MAX_PATIENTS, MAX_SEEDS = 20_000, 100
"""Limits of the plan: what needs more is out of reach."""
MAX_TIMES = 1000
"""Multiple of the wanted difference up to which the smallest detectable one is searched."""
NUM_DRAWS = 2000
"""Simulated comparisons per power of the plan."""

Sides = tuple[np.ndarray, np.ndarray]
"""Values of baseline and other, each of shape [..., seeds, patients]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Components:
    """Standard deviations of one score, in the unit of the metric; None where the repeats do not separate them."""

    seeds: float | None = None
    """Of the networks of one fold, trained with different seeds."""
    folds: float | None = None
    """Of the means of folds, beyond what patients and networks explain: the training subset."""
    patients: float
    """Of patients within a fold; with a single seed the residual is included."""
    residual: float | None = None
    """Of one patient between networks, beyond the difference of their means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sizes of a comparison that shows a difference with a power of `POWER`, at the measured variances and number of folds."""

    difference: float
    detectable: float | None
    """Smallest difference that the present numbers of seeds and patients show; None above `MAX_TIMES` the wanted one."""
    num_patients: int | None
    """Patients needed with the present seeds; None above `MAX_PATIENTS`."""
    num_seeds: int | None
    """Seeds needed per setting with the present patients; None above `MAX_SEEDS`."""
    patients_by_seeds: dict[int, int | None]
    """Patients needed for each of `PLANNED_SEEDS`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFloor:
    """Difference of one metric, other minus baseline, with its sources of variance."""

    num_seeds: tuple[int, int]
    """Of baseline and other."""
    num_folds: int
    num_patients: int
    mean_baseline: float
    mean_other: float
    difference: float
    ci95_low: float
    ci95_high: float
    """Over seeds, folds and patients; with a single seed on a side over patients alone, for the networks tested."""
    p_not_better: float | None
    """Probability that the better one is not better; None with a single seed on a side, which does not tell."""
    num_patients_higher: int
    num_patients_lower: int
    """Patients whose mean over seeds is higher, or lower, in other."""
    sd_baseline: Components
    sd_other: Components
    sd_difference: Components
    """Of a difference between one network of each side: fold and patient are the interactions with the setting."""
    plan: Plan | None
    """None with a single seed on a side, or without a `difference` to show."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeanSquares:
    """Mean squares of one comparison, or of many along the leading axes."""

    num_seeds: tuple[int, int]
    fold_sizes: np.ndarray
    """Patients of each fold, shape [K]."""
    patients: np.ndarray
    """Of the patients' differences within folds, shape [...]."""
    folds: np.ndarray
    """Of the folds' mean differences, times patients per fold, shape [...]; 0 with a single fold."""
    seeds: np.ndarray
    """Variance between seeds of the mean of a fold, by side and fold, shape [..., 2, K]; 0 with a single seed."""
    residual: np.ndarray
    """Of patient x network, by side, shape [..., 2]; 0 with a single seed."""

    @property
    def num_patients(self) -> float:
        """Patients of all folds."""
        return float(self.fold_sizes.sum())

    @property
    def has_seeds(self) -> bool:
        """Whether the variance between seeds is known on both sides."""
        return min(self.num_seeds) > 1


def noise_floor(baseline: pd.DataFrame, other: pd.DataFrame, *, difference: float | None = None) -> NoiseFloor:
    """Compare two settings, each trained with one or more seeds on the same folds.

    A patient counts once: its value is the mean over its cases.

    Args:
        baseline: One row per seed and case: seed, fold, case_id, patient_id, value.
        other: The same of the other setting; same cases, folds and patients.
        difference: Difference that the plan is for; None makes no plan.

    Raises:
        ValueError: If cases, folds or patients differ between seeds or sides, or no fold has two patients.
    """
    (a, layout), (b, layout_other) = map(_by_patient, (baseline, other))
    if not layout.equals(layout_other):
        raise ValueError("both settings need the same cases, folds and patients.")
    codes = layout.groupby("patient_id")["fold"].first().factorize(sort=True)[0]
    if len(codes) < codes.max() + 2:
        raise ValueError(f"a fold of two patients or more is needed, got {len(codes)} patients in as many folds.")
    squares = mean_squares((a, b), folds=codes)
    by_patient = b.mean(axis=0) - a.mean(axis=0)
    mean = float(by_patient.mean())
    variance, df = (float(one) for one in variance_of_difference(squares))
    half_width = float(t.ppf((1 + LEVEL) / 2, df)) * variance**0.5
    sd_baseline, sd_other = (_components_of_side(values, folds=codes) for values in (a, b))
    plan = plan_for(difference, squares=squares) if difference is not None and squares.has_seeds else None
    return NoiseFloor(
        num_seeds=squares.num_seeds,
        num_folds=len(squares.fold_sizes),
        num_patients=len(codes),
        mean_baseline=float(a.mean()),
        mean_other=float(b.mean()),
        difference=mean,
        ci95_low=mean - half_width,
        ci95_high=mean + half_width,
        p_not_better=_p_not_better(mean, variance, df) if squares.has_seeds else None,
        num_patients_higher=int((by_patient > 0).sum()),
        num_patients_lower=int((by_patient < 0).sum()),
        sd_baseline=sd_baseline,
        sd_other=sd_other,
        sd_difference=_components_of_difference(squares),
        plan=plan,
    )


def _by_patient(table: pd.DataFrame) -> tuple[np.ndarray, pd.DataFrame]:
    """Return the values, shape [seeds, patients], patients sorted, and the fold and patient of each case."""
    rows = table.set_index("case_id").sort_index()
    first, *others = (of_seed[["fold", "patient_id"]] for _, of_seed in rows.groupby("seed"))
    if not all(one.equals(first) for one in others):
        raise ValueError("every seed needs the same cases, folds and patients.")
    values = table.pivot_table(index="seed", columns="patient_id", values="value", sort=True)
    return values.to_numpy(dtype=float), first


def mean_squares(sides: Sides, *, folds: np.ndarray) -> MeanSquares:
    """Return the mean squares of one comparison, or of many along the leading axes.

    Args:
        sides: Values of baseline and other.
        folds: Fold of each patient, 0 to K - 1, shape [patients].
    """
    sizes = np.bincount(folds)
    averaging = np.eye(len(sizes))[folds] / sizes  # [patients, K]: means of folds
    num_within, num_folds = len(folds) - len(sizes), len(sizes)
    differences = sides[1].mean(axis=-2) - sides[0].mean(axis=-2)
    by_fold = differences @ averaging
    from_mean = by_fold - differences.mean(axis=-1, keepdims=True)
    seeds, residual = zip(*(_between_seeds(values, averaging, folds) for values in sides), strict=True)
    return MeanSquares(
        num_seeds=(sides[0].shape[-2], sides[1].shape[-2]),
        fold_sizes=sizes,
        patients=((differences - by_fold[..., folds]) ** 2).sum(axis=-1) / num_within,
        folds=(sizes * from_mean**2).sum(axis=-1) / max(num_folds - 1, 1),
        seeds=np.stack(seeds, axis=-2),
        residual=np.stack(residual, axis=-1),
    )


def _between_seeds(values: np.ndarray, averaging: np.ndarray, folds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the variance between seeds of the means of folds, shape [..., K], and the mean square of the residual, [...]."""
    num_seeds = values.shape[-2]
    of_folds = values @ averaging
    if num_seeds == 1:
        return np.zeros_like(of_folds[..., 0, :]), np.zeros(values.shape[:-2])
    networks = of_folds - of_folds.mean(axis=-2, keepdims=True)
    residual = values - values.mean(axis=-2, keepdims=True) - networks[..., folds]
    num_within = (len(folds) - averaging.shape[1]) * (num_seeds - 1)
    return of_folds.var(axis=-2, ddof=1), (residual**2).sum(axis=(-2, -1)) / num_within


def variance_of_difference(squares: MeanSquares) -> tuple[np.ndarray, np.ndarray]:
    """Return the variance of the mean difference and Satterthwaite's degrees of freedom.

    It is the sum of three parts: patients with the residual; seeds, of each side; and folds, as far as the means of folds
    differ more than these two explain. With a single seed on a side it is the first part alone: the networks are fixed.
    """
    num_patients, num_folds = squares.num_patients, len(squares.fold_sizes)
    num_within = num_patients - num_folds
    patients = squares.patients / num_patients
    if not squares.has_seeds:
        return patients, np.full_like(patients, num_within)
    num_seeds = np.array(squares.num_seeds)
    networks = (squares.fold_sizes / num_patients) ** 2 * squares.seeds / num_seeds[:, None]
    residual = squares.residual / (num_patients * num_seeds)  # counted by both parts
    seeds = networks.sum(axis=-1) - residual
    uncertainty = ((networks**2).sum(axis=-1) + residual**2 / num_within) / (num_seeds - 1)
    is_positive = seeds > 0
    variance = patients + np.where(is_positive, seeds, 0).sum(axis=-1)
    spread = patients**2 / num_within + np.where(is_positive, uncertainty, 0).sum(axis=-1)
    folds = np.maximum(squares.folds / num_patients - variance, 0)
    total = variance + folds
    spread = spread + folds**2 / max(num_folds - 1, 1)
    return total, np.divide(total**2, spread, out=np.full_like(total, num_within), where=spread > 0)


def _p_not_better(mean: float, variance: float, df: float) -> float:
    """Return the one-sided p of the better one: the posterior probability that it is not better, with a flat prior."""
    if variance == 0:
        return 0.0 if mean else 0.5
    return float(t.sf(abs(mean) / variance**0.5, df))


def _components_of_side(values: np.ndarray, *, folds: np.ndarray) -> Components:
    """Return the components of one setting, from its mean squares; a negative estimate is 0."""
    num_seeds = values.shape[0]
    sizes = np.bincount(folds)
    averaging = np.eye(len(sizes))[folds] / sizes
    seeds, residual = _between_seeds(values, averaging, folds)
    means = values.mean(axis=0)
    by_fold = means @ averaging
    within = ((means - by_fold[folds]) ** 2).sum() / (len(folds) - len(sizes))
    network = float(seeds.mean() - residual * (1 / sizes).mean())
    return _components(
        has_seeds=num_seeds > 1,
        network=network,
        fold=float(by_fold.var(ddof=1) - within * (1 / sizes).mean() - network / num_seeds) if len(sizes) > 1 else None,
        patient=float(within - residual / num_seeds),
        residual=float(residual),
    )


def _components_of_difference(squares: MeanSquares) -> Components:
    """Return the components of a difference between single networks of the two settings."""
    num_seeds, sizes = np.array(squares.num_seeds), squares.fold_sizes
    networks = squares.seeds.mean(axis=-1) - squares.residual * (1 / sizes).mean()
    per_fold = squares.num_patients / len(sizes)
    beyond = (squares.folds - squares.patients) / per_fold - (networks / num_seeds).sum()
    return _components(
        has_seeds=squares.has_seeds,
        network=float(networks.sum()),
        fold=float(beyond) if len(sizes) > 1 else None,
        patient=float(squares.patients - (squares.residual / num_seeds).sum()),
        residual=float(squares.residual.sum()),
    )


def _components(*, has_seeds: bool, network: float, fold: float | None, patient: float, residual: float) -> Components:
    """Return standard deviations of variances; with a single seed, folds and seeds are not separated."""
    separated = {"seeds": network, "folds": fold, "residual": residual} if has_seeds else {}
    variances = {"patients": patient, **separated}
    return Components(**{name: max(one, 0.0) ** 0.5 for name, one in variances.items() if one is not None})


def plan_for(difference: float, *, squares: MeanSquares) -> Plan:
    """Return the sizes of a comparison that would show a difference, at the variances of one with repeats."""
    seeds, patients = min(squares.num_seeds), int(squares.num_patients)
    num_folds = len(squares.fold_sizes)

    def shows(num_seeds: int, num_patients: int, wanted: float = difference) -> bool:
        return _power(wanted, squares, num_seeds=num_seeds, num_patients=num_patients) >= POWER

    def patients_needed(num_seeds: int) -> int | None:
        return _smallest(lambda number: shows(num_seeds, number), low=2 * num_folds, high=MAX_PATIENTS)

    percents = _smallest(lambda number: shows(seeds, patients, difference * number / 100), low=1, high=100 * MAX_TIMES)
    return Plan(
        difference=difference,
        detectable=None if percents is None else difference * percents / 100,
        num_patients=patients_needed(seeds),
        num_seeds=_smallest(lambda number: shows(number, patients), low=2, high=MAX_SEEDS),
        patients_by_seeds={number: patients_needed(number) for number in PLANNED_SEEDS},
    )


def _smallest(holds: Callable[[int], bool], *, low: int, high: int) -> int | None:
    """Return the smallest number that meets a condition which every larger one meets, too; None above `high`."""
    if not holds(high):
        return None
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def _power(difference: float, measured: MeanSquares, *, num_seeds: int, num_patients: int) -> float:
    """Return the probability that the interval of a comparison of this size excludes 0, from simulated mean squares.

    They have the measured variances; a negative one is 0, and that of folds unless it is significant: its estimate is coarse.
    """
    num_folds, sizes = len(measured.fold_sizes), measured.fold_sizes
    of_network = np.maximum(measured.seeds.mean(axis=-1) - measured.residual * (1 / sizes).mean(), 0)
    found = _components_of_difference(measured)
    rest, df = variance_of_difference(replace(measured, folds=np.zeros_like(measured.folds)))
    chance = f.ppf(LEVEL, num_folds - 1, df) * rest * measured.num_patients if num_folds > 1 else np.inf
    of_fold = found.folds**2 if found.folds and measured.folds > chance else 0.0

    per_fold, num_within = num_patients / num_folds, num_patients - num_folds
    patients = found.patients**2 + measured.residual.sum() / num_seeds
    folds = per_fold * (of_fold + of_network.sum() / num_seeds) + patients
    seeds = (of_network + measured.residual / per_fold)[:, None].repeat(num_folds, axis=1)
    sd = (folds / num_patients) ** 0.5
    if sd == 0:
        return 1.0
    rng = np.random.default_rng(0)  # the same draws for every size, so that power rises smoothly

    def drawn(expected: np.ndarray | float, df: int) -> np.ndarray:
        shape = (NUM_DRAWS, *np.shape(expected))
        return expected * rng.chisquare(df, shape) / df if df else np.zeros(shape)

    squares = MeanSquares(
        num_seeds=(num_seeds, num_seeds),
        fold_sizes=np.full(num_folds, per_fold),
        patients=drawn(patients, num_within),
        folds=drawn(folds, num_folds - 1),
        seeds=drawn(seeds, num_seeds - 1),
        residual=drawn(measured.residual, num_within * (num_seeds - 1)),
    )
    variance, df = variance_of_difference(squares)
    bound = t.ppf((1 + LEVEL) / 2, df) * variance**0.5
    return float((norm.cdf((difference - bound) / sd) + norm.cdf((-difference - bound) / sd)).mean())
