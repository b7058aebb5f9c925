"""Mutants that change nothing a test could see: (module, function, what of the mutated line) -> why.

Spaces do not count; a decorator that is gone is written as "no @name". `mutants.py` leaves these mutants out
of the share killed.
"""

EQUIVALENT = {
    ("ffn", "_SparseProducts", "no @staticmethod"): "torch calls forward and backward by the class",
    ("router", "cluster_neurons", "continue"): "the labels do not change any more; it only takes longer",
    ("router", "permuted_venom", "cumsum(-1)"): "the last axis of a vector is its first",
    ("router", "_filled", "stable=False"): "on a CPU torch sorts stably in any case",
    ("data", "TokenData._sequences", "non_blocking=False"): "a copy on the CPU never waits",
    ("ablations", "score_gradient", "mask.unflatten(1,"): "the last axis of a matrix is axis 1",
    ("ablations", "mvue24", "u <= high"): "a random number meets a bound with probability 0",
    ("ablations", "mvue24", "max / 9"): "any bound does whose four sum up to a finite number",
}


def reason_for(mutant):
    """Why the mutant is equivalent; None if it is not."""
    gone = mutant["operator"] == "RemoveDecorator"
    text = "no" + "".join(mutant["old"]) if gone else "".join(mutant["new"])
    for (module, function, part), reason in EQUIVALENT.items():
        same = (module, function) == (mutant["module"], mutant["function"])
        if same and "".join(part.split()) in "".join(text.split()):
            return reason
    return None
