"""A Mermaid flowchart as SVG, so that a page shows it without a script: boxes in rows, from top to bottom."""

import re
from html import escape
from itertools import pairwise

BOX, ROW, COLUMN = (168, 50), 84, 196  # a box's size; distances of rows and of columns, in pixels
NODE = r'(\w+)(?:\["([^"]*)"\])?'
ARROW = re.compile(rf"{NODE}\s*(-->|-\.->|-\.\s*(.+?)\s*\.->)\s*{NODE}")


def read(text):
    """Labels by node, and edges (from, to, dashed, label). Raises ValueError on what it cannot read."""
    labels, edges = {}, []
    for line in text.strip().splitlines()[1:]:
        match = ARROW.fullmatch(line.strip())
        if not match:
            raise ValueError(f"site/flowchart.py cannot read this line of a flowchart: {line!r}")
        start, start_label, arrow, note, end, end_label = match.groups()
        for node, label in ((start, start_label), (end, end_label)):
            labels[node] = label or labels.get(node) or node
        edges.append((start, end, arrow != "-->", note))
    return labels, edges


def longest(node, edges, forward):
    """Length of the longest way from a node along the edges, or against them."""
    ways = [(start, end) if forward else (end, start) for start, end, *_ in edges]
    return max((1 + longest(end, edges, forward) for start, end in ways if start == node), default=0)


def place(labels, edges):
    """Row and column of each node, and of the points (start, end, row) where a long edge passes a row.

    A node stands one row below the lowest of its predecessors; one without any just above its first
    successor. Of each row the node with the longest way to go comes first, so that the main way is straight.
    """
    rows = {node: longest(node, edges, forward=False) for node in labels}
    for node in labels:
        if rows[node] == 0:
            rows[node] = min(rows[end] for start, end, *_ in edges if start == node) - 1
    order = {node: (-longest(node, edges, forward=True), list(labels).index(node)) for node in labels}
    for start, end, *_ in edges:
        for row in range(rows[start] + 1, rows[end]):
            rows[start, end, row] = row
            order[start, end, row] = (1, order[start])
    places = {}
    for row in set(rows.values()):
        inside = sorted((node for node in rows if rows[node] == row), key=order.get)
        places.update({node: (row, column) for column, node in enumerate(inside)})
    return places


def svg(text):
    """Mermaid's lines, the first of which is "flowchart ...", as one <svg> without blank lines."""
    labels, edges = read(text)
    places = place(labels, edges)
    width = COLUMN * (1 + max(column for _, column in places.values()))
    height = ROW * (1 + max(row for row, _ in places.values()))

    def at(node, edge):
        row, column = places[node]
        return COLUMN * column + COLUMN // 2, ROW * row + ROW // 2 + edge * BOX[1] // 2

    parts = []
    for start, end, dashed, note in edges:
        between = [key for key in places if isinstance(key, tuple) and key[:2] == (start, end)]
        points = [at(start, 1), *(at(key, 0) for key in sorted(between, key=lambda key: key[2])), at(end, -1)]
        path = "M{},{}".format(*points[0])
        for (x0, y0), (x1, y1) in pairwise(points):
            middle = (y0 + y1) / 2
            path += f" C{x0},{middle} {x1},{middle} {x1},{y1}"
        style = ' class="dashed"' if dashed else ""
        parts.append(f'<path d="{path}"{style} marker-end="url(#arrow)"/>')
        if note:
            (x0, y0), (x1, y1) = points[:2]
            parts.append(f'<text x="{(x0 + x1) / 2 + 46}" y="{(y0 + y1) / 2 - 2}">{escape(note)}</text>')
    for node, label in labels.items():
        x, y = at(node, 0)
        corner, size = f'x="{x - BOX[0] / 2}" y="{y - BOX[1] / 2}"', 'width="{}" height="{}"'.format(*BOX)
        parts.append(f'<rect {corner} {size} rx="6"/>')
        lines = label.split("<br>")
        for number, line in enumerate(lines):
            style = ' class="name"' if number == 0 else ""
            baseline = y + 5 + 18 * number - 9 * (len(lines) - 1)
            parts.append(f'<text x="{x}" y="{baseline}"{style}>{escape(line)}</text>')
    marker = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" '
        'orient="auto"><path d="M0,0 L8,4 L0,8 z"/></marker></defs>'
    )
    names = ", ".join(label.replace("<br>", " ") for label in labels.values())
    about = f'role="img" aria-label="Flowchart: {escape(names)}"'
    head = f'<svg viewBox="0 0 {width} {height}" width="{width}" {about}>'
    return "\n".join([f'<div class="flowchart">{head}', marker, *parts, "</svg></div>"])
