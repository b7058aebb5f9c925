"""This processor taken for another: variables by which the numeric libraries leave instructions out."""

from numpy._core._multiarray_umath import __cpu_dispatch__, __cpu_features__

# Of torch, oneDNN and MKL. Without AVX-512 or without AVX, sums are made in another order.
PROCESSORS = {
    "own": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "plain": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "SSE41",
        "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
        "OMP_NUM_THREADS": "1",
    },
}
OF_AVX2 = ("X86_V3", "AVX2", "FMA3")


def variables(name):
    """The environment of a process that is to compute as on this processor; see PROCESSORS."""
    if name == "own":
        return {}
    there = [feature for feature in __cpu_dispatch__ if __cpu_features__.get(feature)]
    without = [feature for feature in there if name != "avx2" or feature not in OF_AVX2]
    return {**PROCESSORS[name], **({"NPY_DISABLE_CPU_FEATURES": " ".join(without)} if without else {})}
