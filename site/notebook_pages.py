"""A stored notebook as the site shows it: nothing is executed; exercises and answers get their boxes."""

import base64
import json
import re

TITLE = re.compile(r"### (\d\d\.\d+)\b[ ·:.]*([^\n]*)")
SOLUTION = re.compile(r"^( *)### BEGIN SOLUTION\n.*?### END SOLUTION\n?", re.S | re.M)
HIDDEN = re.compile(r"^ *### BEGIN HIDDEN TESTS\n.*?### END HIDDEN TESTS\n?", re.S | re.M)
TO_WRITE = "# Write your answer here, in place of the next line.\nraise NotImplementedError()\n"


def label(kind, number):
    """Name of an exercise or a solution that links can use: exercise-05-2."""
    return f"{kind}-{number.replace('.', '-')}"


def numbers(path):
    """Numbers of the exercises (or solutions) that a notebook holds, such as 05.2."""
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if is_markdown(cell)]
    return [number for cell in cells for number, _ in TITLE.findall("".join(cell["source"]))]


def is_markdown(cell):
    return cell["cell_type"] == "markdown"


def stage(source, target, markdown, kind="exercise", paired=()):
    """Write the notebook `source` to `target`, with its pictures beside it.

    Args:
        markdown: function of a cell's text, which gives that of the site.
        kind: "exercise", "solution" or "lab", of which students' version is shown.
        paired: numbers of the exercises that stand in a chapter and have a solution.
    """
    notebook = json.loads(source.read_text(encoding="utf-8"))
    cells = notebook["cells"]
    if kind == "lab":
        cells = [released(cell) for cell in cells]
        cells = notebook["cells"] = [cell for cell in cells if cell["source"]]  # the others were hidden tests
    for number, cell in enumerate(cells):
        cell["source"] = text = "".join(cell["source"])
        if is_markdown(cell):
            cell["source"] = boxed(markdown(text), kind, paired) if kind != "lab" else markdown(text)
        else:
            cell["outputs"] = [
                shown(output, target, f"{number}-{index}") for index, output in enumerate(cell["outputs"])
            ]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(notebook), encoding="utf-8")


def released(cell):
    """A lab's cell as students get it: without answers, hidden tests and outputs."""
    cell, text = dict(cell), "".join(cell["source"])
    marks = cell["metadata"].get("nbgrader", {})
    if is_markdown(cell):
        cell["source"] = "*Write your answer here.*" if marks.get("solution") else text
        return cell
    stripped = SOLUTION.sub(lambda match: re.sub("^", match[1], TO_WRITE.rstrip(), flags=re.M) + "\n", text)
    if marks.get("solution") and stripped == text:
        stripped = TO_WRITE
    return cell | {"source": HIDDEN.sub("", stripped).rstrip(), "outputs": []}


def boxed(text, kind, paired):
    """Text in which each exercise (or solution), from its title to the next heading, stands in a box."""

    def box(match):
        number, title, body = match.groups()
        exercise, solution = label("exercise", number), label("solution", number)
        if kind == "solution" and number not in paired:
            return match[0][1:]  # a section of its own
        if kind == "solution":
            lines = [f"`````{{solution}} {exercise}", f":label: {solution}"]
        else:
            lines = [f"`````{{exercise}} {number} · {title}", f":label: {exercise}", ":nonumber:"]
            if number in paired:
                body = f"{body.rstrip()}\n\n[Solution](#{solution})"
        return "\n".join([*lines, "", body.strip(), "`````", "", ""])

    return re.sub(TITLE.pattern + r"\n(.*?)(?=^#{1,3} |\Z)", box, text + "\n", flags=re.S | re.M).rstrip()


def shown(output, target, name):
    """An output whose picture has become a file, so that its description and its width count."""
    data = output.get("data", {})
    if "image/png" not in data:
        return output
    picture = target.parent / "pictures" / f"{target.stem}-{name}.png"
    picture.parent.mkdir(parents=True, exist_ok=True)
    picture.write_bytes(base64.b64decode("".join(data["image/png"])))
    about = output["metadata"].get("image/png", {})
    alt = re.sub(r"([\[\]*_`$\\])", r"\\\1", about.get("alt", ""))
    width = f"{{width={about['width']}px}}" if "width" in about else ""
    return output | {"data": {"text/markdown": f"![{alt}](pictures/{picture.name}){width}"}}
