"""Records that several tests of the report read; pictures that no test leaves open."""

import matplotlib as mpl
import matplotlib.pyplot as plt
import pytest

from replicate.report import kernel_tables, study_tables


@pytest.fixture(scope="module")
def kernels():
    return kernel_tables.recorded(kernel_tables.KERNELS)


@pytest.fixture(scope="module")
def venom():
    return kernel_tables.recorded(kernel_tables.VENOM)


@pytest.fixture(scope="module")
def gpu():
    return study_tables.runs("gpu")


@pytest.fixture(autouse=True)
def closed():
    with mpl.rc_context({"axes.titlelocation": "center"}):  # whatever a test before has set
        yield
    plt.close("all")
