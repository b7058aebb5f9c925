"""Mutants that change nothing a test could see: (module, function, part of the mutated line) -> why.

Spaces do not count. `mutants.py` leaves them out of the share killed.
"""

EQUIVALENT = {}


def reason_for(mutant):
    """Why the mutant is equivalent; None if it is not."""
    text = "".join("".join(mutant["new"]).split())
    for (module, function, part), reason in EQUIVALENT.items():
        if (module, function) == (mutant["module"], mutant["function"]) and "".join(part.split()) in text:
            return reason
    return None
