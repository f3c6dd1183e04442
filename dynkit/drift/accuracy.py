"""How accurate a classifier is on samples without labels, from its probabilities on them and on labelled ones.

Four estimators make different assumptions; where they disagree, none should be trusted. None can see a change of the
labels' meaning that leaves the samples as they were.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy  # its parts load at first use

from dynkit.errors import InvalidInput, check_whole

__all__ = ["AccuracyEstimate", "estimate_accuracy", "label_shift_weights"]

Array = np.ndarray[Any, np.dtype[np.float64]]
Classes = np.ndarray[tuple[int], np.dtype[np.int64]]

_TRANSPORTED = 1_000  # samples that are matched to labels: the cost grows with their third power
_DISAGREEMENT = 0.05
_FOLDS = 5


@dataclass(frozen=True)
class AccuracyEstimate:
    """Result of `estimate_accuracy`.

    Parameters
    ----------
    estimate : float
        Accuracy, from 0 to 1: the median of ATC, CBPE and DoC.
    low, high : float
        95 % band of the accuracy that the labels of these samples will show, by the bootstrap over reference and
        current samples, with the chance that is left in a label.
    methods : dict
        What each estimator says: ``atc``, ``cbpe``, ``doc`` and ``cot``.
    """

    estimate: float
    low: float
    high: float
    methods: dict[str, float]

    @property
    def disagree(self) -> bool:
        """Whether estimators are further apart than five points and than the band is wide."""
        spread = max(self.methods.values()) - min(self.methods.values())
        return spread > max(_DISAGREEMENT, self.high - self.low)

    def __repr__(self) -> str:
        said = ", ".join(f"{name} {value:.3f}" for name, value in self.methods.items())
        doubt = "; the estimators disagree" if self.disagree else ""
        return f"accuracy {self.estimate:.3f} ({self.low:.3f} to {self.high:.3f}): {said}{doubt}"


def estimate_accuracy(
    reference_probs: Any, reference_labels: Any, probs: Any, *, resamples: int = 200, seed: int = 0
) -> AccuracyEstimate:
    """Estimate a classifier's accuracy on samples that have no labels.

    Parameters
    ----------
    reference_probs : (N, K) array or tensor
        Probabilities that the model gave to labelled samples which it was not trained on; (N,) is the probability of
        class 1 of two.
    reference_labels : (N,) integers
        Their classes, from 0 to K - 1.
    probs : (M, K)
        Probabilities that it gave to the samples in question.
    resamples : int
        Of the bootstrap that makes the band.
    seed : int

    Returns
    -------
    AccuracyEstimate
        With estimate, low, high, methods and disagree.

    Raises
    ------
    InvalidInput
        When probabilities do not add up to 1, or labels are not classes.

    Notes
    -----
    ATC counts the samples whose largest probability passes the threshold that as many reference samples pass as are
    right (Garg et al. 2022). CBPE is the mean of the largest probability after temperature scaling (Guo et al. 2017),
    which is used where it lowers the log loss of every fold. DoC subtracts the fall of the mean largest probability
    from the accuracy on the reference (Guillory et al. 2021). COT is the cost of the cheapest matching of up to
    1 000 samples with labels as frequent as in the reference (Lu et al. 2023).
    """
    p, labels, q = _checked(reference_probs, reference_labels, probs)
    check_whole("resamples", resamples, 1)
    check_whole("seed", seed, 0)
    rng = np.random.default_rng(seed)
    right = p.argmax(1) == labels
    temperature = _temperature(p, labels)
    old, new = p.max(1), q.max(1)
    old_calibrated, new_calibrated = _scaled(p, temperature).max(1), _scaled(q, temperature).max(1)
    atc = _passing(old, right, new)
    cbpe, doc = float(new_calibrated.mean()), float(right.mean() - old.mean() + new.mean())
    chance = float((new_calibrated * (1 - new_calibrated)).mean() / len(q)) ** 0.5  # of as many labels
    middles = []
    for _ in range(resamples):
        i, j = rng.integers(len(p), size=len(p)), rng.integers(len(q), size=len(q))
        passing = _passing(old[i], right[i], new[j])
        shifted = (
            right[i].mean() + new_calibrated[j].mean() - old_calibrated[i].mean()
        )  # the calibration is as uncertain
        middle = np.median([passing, shifted, right[i].mean() - old[i].mean() + new[j].mean()])
        middles.append(middle + rng.normal(scale=chance))
    spread = np.array(middles) - np.median(middles)
    methods = {"atc": atc, "cbpe": cbpe, "doc": min(1.0, max(0.0, doc)), "cot": _transported(labels, q, rng)}
    estimate = float(np.median([atc, cbpe, methods["doc"]]))
    low, high = (min(1.0, max(0.0, estimate + float(np.quantile(spread, at)))) for at in (0.025, 0.975))
    return AccuracyEstimate(estimate, low, high, methods)


def label_shift_weights(reference_probs: Any, reference_labels: Any, probs: Any) -> Array:
    """Estimate how much more frequent each class has become, were the classes themselves the same (BBSE).

    Solves ``C w = mu`` where C is the joint distribution of predicted and true class on the reference and mu that of
    the predicted class on the current samples (Lipton et al. 2018, equation 4); negative weights become 0.

    Parameters
    ----------
    reference_probs, reference_labels, probs
        See `estimate_accuracy`.

    Returns
    -------
    (K,) float64
        Frequency of each class now by that in the reference; 0 for a class the reference does not have.
    """
    p, labels, q = _checked(reference_probs, reference_labels, probs)
    classes = p.shape[1]
    joint = np.zeros((classes, classes))
    np.add.at(joint, (p.argmax(1), labels), 1 / len(p))
    predicted = np.bincount(q.argmax(1), minlength=classes) / len(q)
    there = np.bincount(labels, minlength=classes) > 0
    change = np.linalg.lstsq(joint, predicted - joint.sum(1), rcond=None)[0]  # the least one where several explain it
    return np.asarray(np.where(there, np.maximum(1 + change, 0), 0), np.float64)


def _checked(reference_probs: Any, reference_labels: Any, probs: Any) -> tuple[Array, Classes, Array]:
    p, q = _probabilities(reference_probs, "reference_probs"), _probabilities(probs, "probs")
    labels = _array(reference_labels, "reference_labels")
    if p.shape[1] != q.shape[1]:
        raise InvalidInput(f"reference_probs has {p.shape[1]} classes, probs has {q.shape[1]}; both need the same")
    if labels.shape != (len(p),):
        raise InvalidInput(
            f"reference_labels has shape {labels.shape}; expected one label for each of {len(p)} samples"
        )
    if labels.dtype.kind not in "iub" or labels.min() < 0 or labels.max() >= p.shape[1]:
        raise InvalidInput(f"reference_labels must be whole numbers from 0 to {p.shape[1] - 1}, the columns of probs")
    return p, labels.astype(np.int64), q


def _probabilities(values: Any, name: str) -> Array:
    array = _array(values, name)
    if array.dtype.kind not in "fiub":
        raise InvalidInput(f"{name} is {array.dtype}; expected probabilities")
    array = array.astype(np.float64)
    if array.ndim == 1:
        array = np.stack([1 - array, array], axis=1)
    if array.ndim != 2 or not len(array) or array.shape[1] < 2:
        raise InvalidInput(
            f"{name} has shape {array.shape}; expected a probability of each class for each sample (N, K)"
        )
    if not np.isfinite(array).all() or array.min() < 0 or np.abs(array.sum(1) - 1).max() > 1e-3:
        raise InvalidInput(f"{name} must be probabilities that add up to 1; take the softmax of logits first")
    return array


def _array(values: Any, name: str) -> np.ndarray[Any, Any]:
    """Return what a user has as an array."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.double() if values.is_floating_point() else values
    try:
        return np.asarray(values)
    except (TypeError, ValueError) as error:
        raise InvalidInput(f"{name} cannot be read as an array: {error}") from None


def _passing(scores: Array, right: Any, new: Array) -> float:
    """Return the share of new scores that pass the threshold that as many of these scores pass as are right."""
    wrong = int((~right).sum())
    if wrong == len(scores):
        return 0.0
    threshold = np.partition(scores, wrong)[wrong]
    above, equal = int((scores > threshold).sum()), int((scores == threshold).sum())
    share = (len(scores) - wrong - above) / equal  # of equal scores, as many as are needed
    return float((new > threshold).mean() + share * (new == threshold).mean())


def _temperature(p: Array, labels: Classes) -> float:
    """Return the temperature that calibrates probabilities, 1 where it does not help in every fold."""

    def log_loss(temperature: float, rows: Any) -> float:
        scaled = _scaled(p[rows], temperature)
        return float(-np.log(np.maximum(scaled[np.arange(len(scaled)), labels[rows]], 1e-12)).mean())

    def fitted(rows: Any) -> float:
        found = scipy.optimize.minimize_scalar(
            lambda log: log_loss(float(np.exp(log)), rows), bounds=(-3, 3), method="bounded"
        )
        return float(np.exp(found.x))

    fold = np.arange(len(p)) % _FOLDS
    folds = range(min(_FOLDS, len(p)) if len(p) >= 10 * _FOLDS else 0)
    helps = [log_loss(fitted(fold != k), fold == k) < log_loss(1.0, fold == k) for k in folds]
    return fitted(fold >= 0) if helps and all(helps) else 1.0


def _scaled(p: Array, temperature: float) -> Array:
    if temperature == 1:
        return p
    logits = np.log(np.maximum(p, 1e-12)) / temperature
    scaled = np.exp(logits - logits.max(1, keepdims=True))
    return np.asarray(scaled / scaled.sum(1, keepdims=True))


def _transported(labels: Classes, q: Array, rng: np.random.Generator) -> float:
    """One minus the cost of the cheapest matching of probabilities with the reference's labels."""
    n = min(len(q), _TRANSPORTED)
    some = q[rng.choice(len(q), n, replace=False)]
    shares = np.bincount(labels, minlength=q.shape[1]) / len(labels)
    ends = np.round(np.cumsum(shares) * n).astype(np.int64)
    wanted = np.repeat(np.arange(q.shape[1]), np.diff(ends, prepend=0))
    rows, places = scipy.optimize.linear_sum_assignment(1 - some[:, wanted])
    return float(some[rows, wanted[places]].mean())
