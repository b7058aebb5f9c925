import ast

import matplotlib as mpl
import pytest
import torch

from replicate.report import chapter, notebooks

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
