"""An nbval plugin: outputs are compared token by token, a measured number with a measured number.

A measured number is written by `replicate.figures.about`: the sign ≈, a number, perhaps ± its spread. It may
differ between machines; everything else must be the same to the letter, but for the width of padding, which
follows the numbers. What goes to stderr and outputs that show progress are not compared.
"""

import re

from nbval.plugin import IPyNbCell, IPyNbFile

from replicate.notebooks import PROGRESS

NUMBER = r"(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?|nan|inf)"
MEASURED = re.compile(rf"≈[-+]?{NUMBER}(?: ± {NUMBER})?")


def masked(text):
    """`text` with a sign in place of each measured number and one width of padding."""
    text = MEASURED.sub("≈#", text)
    return re.sub(r"-{3,}", "---", re.sub(r"[ \t]+", " ", text))


def pytest_configure():
    original, compare = IPyNbFile.__init__, IPyNbCell.compare_outputs

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.skip_compare = (*self.skip_compare, "stderr")

    def compare_others(self, test, ref, skip_compare=None):
        there = [output for output in test if output.get("metadata") != PROGRESS]
        return compare(self, there, ref, skip_compare)

    IPyNbFile.__init__ = init
    IPyNbCell.compare_outputs = compare_others
    IPyNbCell.sanitize = lambda self, text: masked(text) if isinstance(text, str) else text
