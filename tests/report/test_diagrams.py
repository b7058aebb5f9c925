import matplotlib as mpl
import pytest
from matplotlib.colors import to_rgba

from replicate.figures import PALETTE
from replicate.report import diagrams
from replicate.settings.presets import SPARSITY_PRESETS

mpl.use("agg")


def texts(ax):
    return [text.get_text() for text in ax.texts]


def fills(ax):
    return [patch.get_facecolor() for patch in ax.patches]


@pytest.mark.parametrize("name", ["dense", "recipe", "recipe, same", "w1+w2+t", "no-mask-reuse"])
def test_the_block_diagram_says_every_product_and_its_format(ax, name):
    sparsity = SPARSITY_PRESETS[name]
    diagrams.draw_products(ax, sparsity, title=name)
    shown = "\n".join(texts(ax))
    for text, operand, kind in sparsity.products():
        assert text.replace("^T", "ᵀ") in shown
        assert kind == "dense" or f"{operand.replace('^T', 'ᵀ')}: " in shown
    names = {"2:4": "2:4 weights", "venom": "venom", "sampled": "control"}
    for (_, operand, kind), fill in zip(sparsity.products(), fills(ax), strict=True):
        name = "2:4 activations" if kind == "2:4" and operand[0] != "W" else names.get(kind)
        assert fill == to_rgba(PALETTE[name] if name else diagrams.GREY)
    assert ("same mask" in shown) == (sparsity.activation != "dense" and sparsity.mask_reuse)


def test_the_grid_has_a_cell_for_each_recipe_and_product(ax):
    recipes = {name: SPARSITY_PRESETS[name] for name in ("dense", "w1", "recipe")}
    diagrams.draw_formats(ax, recipes)
    assert len(ax.patches) == 18
    assert texts(ax)[:6] == ["dense"] * 6
    assert texts(ax)[6] == "W1: 2:4"
    said = diagrams.in_words(recipes | {"w1, same": SPARSITY_PRESETS["w1, same"]})
    assert said.loc["w1, same", "dx = dy1 W1ᵀ"] == "dense, reads S24(W1)ᵀ" and list(said.index)[:3] == [
        *recipes
    ]
    assert said.loc["recipe"].tolist() == texts(ax)[12:]
    assert texts(ax)[12:].count("y2: Venom") == 1
    assert [label.get_text() for label in ax.get_yticklabels()] == list(recipes)


def test_the_grid_says_which_pruned_weight_a_dense_operand_is(ax):
    diagrams.draw_formats(ax, {name: SPARSITY_PRESETS[name] for name in ("w2, same", "recipe, same")})
    assert texts(ax)[:6] == ["dense", "W2: 2:4", "dense\nreads S24(W2)ᵀ", "dense", "dense", "dense"]
    assert texts(ax)[7] == "y2: Venom\nreads S24(W2ᵀ)ᵀ" and texts(ax)[10] == "dy1: Venom\nreads S24(W1)ᵀ"
