"""Figures of the paper (arXiv 2402.08644 v3), beside ours. ML is PaLM2-Bison, MS PaLM2-Gecko, TPUv5e, batch 1."""

from __future__ import annotations

# Table 1, pretraining data. Rows by the type of drafter and its loss: plain or tandem, ce or distil.
TABLE_1: dict[str, dict[str, float]] = {
    "plain-ce": {"accuracy": 55.06, "cross_entropy": 2.14, "agreement": 74.64, "total_variation": 0.391},
    "plain-distil": {"accuracy": 56.50, "cross_entropy": 2.12, "agreement": 75.30, "total_variation": 0.318},
    "tandem-ce": {"accuracy": 58.35, "cross_entropy": 1.94, "agreement": 80.00, "total_variation": 0.178},
    "tandem-distil": {"accuracy": 58.61, "cross_entropy": 1.99, "agreement": 81.00, "total_variation": 0.141},
}
TABLE_1_NAMES = {
    "plain-ce": "Gecko",
    "plain-distil": "Gecko-Distil",
    "tandem-ce": "Tandem-CE",
    "tandem-distil": "Tandem-Distil",
}
TABLE_1_BLOCK_LENGTH = 2

# Table 2, speed-up over ML alone, each drafter at its best block length; Reddit, CNN/DM, LM1B.
TABLE_2_DATA = ("Reddit", "CNN/DM", "LM1B")
TABLE_2: dict[int, dict[str, tuple[float, float, float]]] = {
    1: {
        "plain-distil": (2.169, 2.219, 2.348),
        "tandem-distil": (2.471, 2.473, 2.610),
        "tandem over plain": (1.139, 1.115, 1.112),
    },
    4: {
        "plain-distil": (1.919, 1.940, 2.011),
        "tandem-distil": (2.234, 2.190, 2.359),
        "tandem over plain": (1.164, 1.129, 1.173),
    },
}
COST_RATIO = 6.4  # how much faster Gecko is than Bison

# Adaptive block length: over ML alone, and over the best fixed one.
ADAPTIVE = {"over ML": (2.582, 2.599, 2.853), "over fixed": (1.045, 1.051, 1.093)}
