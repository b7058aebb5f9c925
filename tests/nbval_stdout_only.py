"""An nbval plugin: what notebooks write to stderr (progress, warnings) is not compared."""

from nbval.plugin import IPyNbFile


def pytest_configure():
    original = IPyNbFile.__init__

    def init(self, *args, **kwargs):
        original(self, *args, **kwargs)
        self.skip_compare = (*self.skip_compare, "stderr")

    IPyNbFile.__init__ = init
