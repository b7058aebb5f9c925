"""Records that several tests of the report read."""

import pytest

from replicate.report import kernel_tables


@pytest.fixture(scope="module")
def kernels():
    return kernel_tables.recorded(kernel_tables.KERNELS)


@pytest.fixture(scope="module")
def venom():
    return kernel_tables.recorded(kernel_tables.VENOM)
