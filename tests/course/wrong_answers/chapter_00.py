"""Typical wrong answers to the exercises of chapter 00, and what their hints must say."""

WRONG = [
    ("00.1", lambda x, w1, w2: ((x @ w1) ** 2).relu() @ w2, "Take relu first"),
    ("00.1", lambda x, w1, w2: (x @ w1).relu() @ w2, "without the square"),
    ("00.1", lambda x, w1, w2: ((x @ w1).relu() @ w2) ** 2, "You square the output"),
    ("00.1", lambda x, w1, w2: x @ w1 @ w2, "Nothing happens between"),
    ("00.1", lambda x, w1, w2: (x @ w1).relu() ** 2, "This is y2"),
    ("00.2", 0.9375, "only the missing clusters"),
    ("00.2", 0.03125, "the share that is left"),
    ("00.2", 0.875, "for 4 of 16 clusters"),
    ("00.2", 96.875, "in percent"),
    ("00.3", "A and B", "its interval begins at"),
    ("00.3", "all", "C's mean is even below zero"),
    ("00.3", "none", "Is zero in it"),
    ("00.3", "B", "Answer with one of"),
    ("00.2", 0.46875, "Multiply the shares that are left"),
    ("00.2", 0.94, "only the missing clusters"),
]
