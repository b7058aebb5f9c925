"""README.md and docs/ show the records: their generated blocks are up to date, wrong markers are refused."""

import re
from pathlib import Path

import pytest

from replicate import study
from replicate.report import pages
from replicate.settings.presets import PRESET_OF
from replicate.system import paths
from replicate.training.flops import param_count


def page(folder, text, tables=None, values=None):
    path = Path(folder) / "page.md"
    path.write_text(text, encoding="utf-8")
    return pages.Page(path, lambda: tables or {}, lambda name: (values or {}).get(name, ""))


@pytest.mark.parametrize("name", pages.PAGES)
def test_the_page_shows_the_records(name):
    shown = pages.PAGES[name].path.read_text(encoding="utf-8")
    assert pages.filled(pages.PAGES[name]) == shown, "run python -m replicate pages"


@pytest.mark.parametrize("name", [name for name, page in pages.PAGES.items() if page.path.suffix == ".md"])
def test_links_lead_somewhere(name):
    path = pages.PAGES[name].path
    text = path.read_text(encoding="utf-8")
    heads = [re.sub(r"[^\w -]", "", head.lower()).strip() for head in re.findall(r"(?m)^#+ (.+)$", text)]
    anchors = {head.replace(" ", "-") for head in heads}
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", text)
    assert len(links) > 2
    for place, _, anchor in (link.partition("#") for link in links):
        assert (path.parent / place).exists() if place else anchor in anchors, (place, anchor)


def test_only_what_is_between_the_markers_changes(tmp_path):
    one = "<!-- value: v, 1 -->\n<!-- end --> <!-- value: v, 1 --><!-- end -->"
    text = f"a\n<!-- table: t -->old<!-- end --> b {one}c"
    new = pages.filled(page(tmp_path, text, {"t": "| x |\n"}, {"v, 1": "2 \\1", "unused": "3"}))
    two = "<!-- value: v, 1 -->2 \\1<!-- end -->"
    assert new == f"a\n<!-- table: t -->\n\n| x |\n\n<!-- end --> b {two} {two}c"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", r"marks the tables \[\]; there are \['t'\]"),
        ("<!-- table: t --><!-- end --><!-- table: u --><!-- end -->", r"marks the tables \['t', 'u'\]"),
        ("<!-- table: t --><!-- end --><!-- table: t --><!-- end -->", r"marks the tables \['t', 't'\]"),
        ("<!-- table: t --><!-- end --><!-- value: nothing --><!-- end -->", "'nothing'; there is no such"),
        ("<!-- table: t --><!-- end --><!-- value: empty --><!-- end -->", "'empty'; there is no such"),
        ("<!-- table: t --><!-- end --><!-- end -->", "needs one"),
        ("<!-- table: t --><!-- value: v --><!-- end --><!-- end -->", "needs one"),
    ],
)
def test_a_page_with_wrong_markers_is_refused(text, match, tmp_path):
    with pytest.raises(ValueError, match=f"^page.md.*{match}"):
        pages.filled(page(tmp_path, text, {"t": "x"}, {"v": "1", "empty": ""}))


def test_every_page_or_none_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    good = page(tmp_path, "<!-- value: v --><!-- end -->", values={"v": "1"})
    bad = pages.Page(tmp_path / "missing.md", dict)
    monkeypatch.setattr(pages, "PAGES", {"good": good, "bad": bad})
    with pytest.raises(ValueError, match=r"missing\.md is missing; restore it, or write figures/ anew"):
        pages.main([])
    assert good.path.read_text() == "<!-- value: v --><!-- end -->"
    monkeypatch.setattr(pages, "PAGES", {"good": good})
    assert pages.main([]) == 0
    assert good.path.read_text() == "<!-- value: v -->1<!-- end -->"
    assert capsys.readouterr().out == "page.md\n"


def test_the_table_of_scales_is_that_of_the_presets():
    text = pages.PAGES["commands"].path.read_text(encoding="utf-8")
    for scale in PRESET_OF:
        config = study.arms(scale, ["dense"])[0]
        size, tokens = param_count(config.model)["non_embedding"], config.steps * config.tokens_per_step
        row = re.search(rf"(?m)^\| `{scale}` \| (.+) \|$", text).group(1)
        preset, layers, width, *rest = row.split(" | ")
        assert preset == f"`{PRESET_OF[scale]}`"
        assert (int(layers), int(width)) == (config.model.n_layer, config.model.d_model)
        for said, true in zip(rest, (size, tokens), strict=True):
            assert abs(float(said.removesuffix(" million")) * 1e6 / true - 1) < 0.1, scale
