"""Draws the pictures of the course and the gallery, for both themes. Run: python docs/pictures/course.py"""

from __future__ import annotations

from pathlib import Path

import gallery
import heads
import machines
import matrices
from draw import THEMES

PICTURES = {
    "self": matrices.self_attention,
    "cross": matrices.cross_attention,
    "multi-head": heads.multi_head,
    "multi-query": heads.multi_query,
    "grouped-query": heads.grouped_query,
    "latent": heads.latent,
    "masked": matrices.masked,
    "sparse": matrices.sparse,
    "flash": machines.flash,
    "paged": machines.paged,
    "gallery-heads": gallery.heads,
    "gallery-text": gallery.text,
    "gallery-scores": gallery.scores,
}
PLACE = Path(__file__).parent / "course"


def main() -> None:
    """Write all pictures to the folder course beside this file."""
    PLACE.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        for theme in THEMES:
            (PLACE / f"{name}-{theme}.svg").write_text(draw(theme), encoding="utf-8")


if __name__ == "__main__":
    main()
