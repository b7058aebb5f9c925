import ast

import matplotlib as mpl
import pytest
import torch
from jupyter_client.manager import start_new_kernel
from matplotlib import pyplot as plt

from replicate.report import chapter, chapter_values, format_plots, notebooks
from replicate.study import results

BAD = {
    "profile is 5; choose": (5, 1),
    "profile is 'smoek'; choose": ("smoek", 1),
    "profile is 'gpu40m'; choose": ("gpu40m", 1),
    r"profile is \['smoke'\]; choose": (["smoke"], 1),
    "seed is -1; choose": ("smoke", -1),
    "seed is 1.5; choose": ("smoke", 1.5),
    "seed is 'abc'; choose": ("smoke", "abc"),
    "seed is True; choose": ("smoke", True),
    "seed is 2147483648; choose": ("smoke", 2**31),
}


@pytest.mark.parametrize(("words", "given"), BAD.items(), ids=[str(given) for given in BAD.values()])
def test_a_bad_parameter_is_refused_in_one_line(words, given):
    with pytest.raises(chapter.BadParameter, match=f"^{words}") as refused:
        chapter.begin(*given)
    (line,) = refused.value._render_traceback_()
    assert line == f"BadParameter: {refused.value}" and "\n" not in line


@pytest.mark.parametrize(("profile", "seed"), [("smoke", 0), ("laptop", 7), ("gpu", 2**31 - 1)])
def test_a_good_one_sets_the_look(profile, seed):
    with mpl.rc_context({"figure.constrained_layout.use": False}):
        chapter.begin(profile, seed)
        assert mpl.rcParams["figure.constrained_layout.use"]


def until_begin(book):
    """Statements of a notebook's code cells, without its parameters, to its first call of chapter.begin."""
    found = []
    for cell in book.content["cells"]:
        if cell["cell_type"] == "code" and "parameters" not in notebooks.tags(cell):
            for statement in ast.parse(notebooks.source(cell)).body:
                found.append(statement)
                if ast.unparse(statement).startswith("chapter.begin("):
                    return found
    pytest.fail(f"{book.name} never calls chapter.begin")


@pytest.mark.parametrize("book", notebooks.discover(), ids=lambda book: book.name)
def test_every_notebook_refuses_bad_parameters_before_it_does_anything(book):
    statements = until_begin(book)
    assert ast.unparse(statements[-1]) == "chapter.begin(profile, seed)"
    code = compile(ast.Module(statements, []), book.name, "exec")
    for profile, seed in [(5, 1), ("smoek", 1), ("smoke", -1), ("smoke", 1.5), ("smoke", "abc")]:
        space = {"profile": profile, "seed": seed}
        with pytest.raises(chapter.BadParameter) as refused:
            exec(code, space)
        assert len(refused.value._render_traceback_()) == 1


def test_normal_numbers_are_the_same_wherever_they_are_drawn():
    one, other = chapter.normal_numbers(), chapter.normal_numbers()
    first, second = one(2, 3), one(1)
    assert torch.equal(other(2, 3), first) and torch.equal(other(1), second)
    assert first.dtype == torch.float64 and first[0, 0].item() == 0.1257302210933933


def test_sliders_draw_at_once_where_somebody_reads(monkeypatch):
    moved, shown = [], []
    monkeypatch.setattr("matplotlib.pyplot.show", lambda: shown.append(len(moved)))
    monkeypatch.setenv("REPLICATE_STATIC", "1")
    chapter.touch(lambda N: moved.append(N), N=(1, 5))
    assert moved == [], "a notebook run by a command stores a picture, no sliders"
    monkeypatch.delenv("REPLICATE_STATIC")
    chapter.touch(lambda N: moved.append(N), N=(1, 5))
    assert moved == [3] and shown == [1], "what was drawn is shown"
    chapter.touch(lambda N: moved.append(N), button="Measure", N=(1, 5))
    assert moved == [3], "what takes long waits for its button"


def test_the_kernel_has_one_thread_for_cells_and_sliders():
    """Where a slider's callback has a thread of its own, pyplot draws two pictures at once and loses one."""
    manager, client = start_new_kernel()
    try:
        said = client.kernel_info(reply=True, timeout=60)["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    assert said["implementation"] == "ipython"
    assert "kernel subshells" not in said.get("supported_features", [])


def test_what_sliders_draw():
    format_plots.try_venom(chapter.normal_numbers()(16, 32), v=4, n=1, m=8)
    ax = plt.gcf().axes[1]
    assert ax.get_title() == "V:N:M = 4:1:8" and ax.get_xlabel().startswith("87.5% zeros")
    format_plots.one_group([1.2, 1.0, -0.6, 1.5])
    heights = [bar.get_height() for bar in plt.gcf().axes[0].patches]
    assert heights[4:8] == pytest.approx([1.2, 0, 0, 1.5]), "hard"
    assert heights[8:] == pytest.approx([0.2, 0, 0, 0.5]), "soft"
    plt.close("all")


def test_value_markers_of_a_chapter():
    book = notebooks.select(notebooks.discover(), ["05"])[0]
    runs = results.recorded_study("gpu")
    gap = results.differences(runs, "venom16", "valid_loss", ["static16"])["static16"]
    half = (gap.high - gap.low) / 2
    assert (
        chapter_values.value(book, "held-out gpu: static16 - venom16") == f"{gap.mean:.3f} ± {half:.3f} (3)"
    )
    assert chapter_values.value(book, "held-out gpu: no such arm") == ""
    assert "](04_neuron_level_activation.ipynb)" in chapter_values.value(book, "links")
