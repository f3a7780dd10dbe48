"""Draw docs/pictures/packed_row.png: a packed row, and who sees whom in it.

python tools/draw_packed_row.py [FILE.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from rm_scale.batching.packed.attention_rules import sees, token_places
from rm_scale.batching.packed.layout import pack_row

PROMPT, FIRST, SECOND = "#c9ced6", "#4878a8", "#d08a3e"


def draw(path: Path) -> None:
    """Write the picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Rectangle

    groups = [[[1, 2, 3, 4, 5, 11, 12, 13], [1, 2, 3, 4, 5, 21, 22]], [[6, 7, 8, 31, 32], [6, 7, 8, 41, 42, 43]]]
    row = pack_row(groups, share_prompts=True, pad_token_id=0)
    width = row.layout.width
    places = token_places(row.layout)
    index = torch.arange(width)
    seen = sees(places, index[:, None], index[None, :], None)
    colours = [(PROMPT, FIRST, SECOND)[int(response) + 1] for response in places.response]

    figure, axes = pyplot.subplots(figsize=(7.2, 7.4))
    for query in range(width):
        for key in range(width):
            colour = colours[key] if seen[query, key] else "#ffffff"
            axes.add_patch(Rectangle((key, query), 1, 1, facecolor=colour, edgecolor="#e3e3e3", linewidth=0.6))
    for token in range(width):
        axes.add_patch(Rectangle((token, -2.2), 1, 1, facecolor=colours[token], edgecolor="white"))
        axes.text(token + 0.5, -1.7, str(int(places.position[token])), ha="center", va="center", fontsize=8)
    for end in row.score_index.tolist():
        axes.annotate(
            "reward", (end + 0.5, -2.2), (end + 0.5, -3.4), ha="center", fontsize=8, arrowprops={"arrowstyle": "->"}
        )
    for span in row.layout.spans:
        axes.add_patch(
            Rectangle((span.start, span.start), span.end - span.start, span.end - span.start, fill=False, lw=1.4)
        )
    axes.text(-0.4, -1.7, "position", ha="right", va="center", fontsize=8)
    axes.text(-0.4, width / 2, "this token ...", ha="right", va="center", fontsize=9, rotation=90)
    axes.text(width / 2, width + 0.8, "... sees these", ha="center", fontsize=9)
    names = ((PROMPT, "prompt, once per group"), (FIRST, "response 1"), (SECOND, "response 2"))
    handles = [Rectangle((0, 0), 1, 1, facecolor=colour) for colour, _ in names]
    axes.legend(
        handles, [name for _, name in names], loc="lower left", bbox_to_anchor=(0.12, 0.16), fontsize=8, frameon=False
    )
    axes.set_xlim(-2, width + 0.5)
    axes.set_ylim(width + 1.4, -4.2)
    axes.set_aspect("equal")
    axes.axis("off")
    figure.savefig(path, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    default = Path(__file__).resolve().parents[1] / "docs" / "pictures" / "packed_row.png"
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
