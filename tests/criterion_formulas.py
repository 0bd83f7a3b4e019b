"""The criteria's formulas, written anew in numpy; float64 ``weight [out, in] -> c [in]``."""

import numpy as np


def _amber_channel(weight: np.ndarray) -> np.ndarray:
    rows = []
    for row in weight:
        low, high = np.quantile(row, [0.005, 0.995])
        inside = (row >= low) & (row <= high)
        rows.append(np.where(inside, (row - row[inside].mean()) / row[inside].std(), 0.0))
    return np.sqrt((np.array(rows) ** 2).sum(axis=0))


def _amber(weight: np.ndarray) -> np.ndarray:
    low, high = np.quantile(weight, [0.005, 0.995])
    inside = (weight >= low) & (weight <= high)
    standard = (weight - weight[inside].mean()) / weight[inside].std()
    return np.sqrt((np.where(inside, standard, 0.0) ** 2).sum(axis=0))


FORMULAS = {
    "wina": lambda w: np.sqrt((w**2).sum(axis=0)),
    "variance": lambda w: w.var(axis=0),
    "amber": _amber,
    "amber-channel": _amber_channel,
}
