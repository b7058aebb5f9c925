"""An nbval plugin: what notebooks write to stderr (warnings) and their progress are not compared."""

from nbval.plugin import IPyNbCell, IPyNbFile

from replicate.notebooks import PROGRESS


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
