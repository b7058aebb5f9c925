"""An nbval plugin: outputs are compared token by token, a measured number with a measured number.

A measured number is written by `replicate.figures.about`: the sign ≈, a number, perhaps ± its spread. It may
differ between machines; everything else must be the same to the letter, but for the width of padding, which
follows the numbers. What goes to stderr, progress included, is not compared.
"""

import re

from nbval.plugin import IPyNbCell, IPyNbFile

NUMBER = r"(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:e[-+]?[0-9]+)?|nan|inf)"
MEASURED = re.compile(rf"≈[-+]?{NUMBER}(?: ± {NUMBER})?")


def masked(text):
    """`text` with a sign in place of each measured number and one width of padding."""
    text = MEASURED.sub("≈#", text)
    return re.sub(r"-{3,}", "---", re.sub(r"[ \t]+", " ", text))


def pytest_configure():
    original = IPyNbFile.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.skip_compare = (*self.skip_compare, "stderr")

    IPyNbFile.__init__ = init
    IPyNbCell.sanitize = lambda self, text: masked(text) if isinstance(text, str) else text
