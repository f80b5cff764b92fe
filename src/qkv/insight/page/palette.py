"""The colours of weights: two ramps in OKLCh whose lightness is a straight line, from the paper away.

Lightness alone orders them, so a reader who sees no hue, and a grey printer, reads the same map. Formulas of OKLab:
B. Ottosson, "A perceptual color space for image processing", 2020.
"""

from __future__ import annotations

import math

STEPS = 16
Ends = tuple[float, float]


def ramp(lightness: Ends, chroma: tuple[float, float, float], hue: Ends, steps: int = STEPS) -> list[str]:
    """Colours of equally spaced lightness; the chroma goes up to its middle value and down again."""
    found = []
    for step in range(steps):
        t = step / (steps - 1)
        low, middle, high = chroma
        bow = low + (high - low) * t + (middle - (low + high) / 2) * 4 * t * (1 - t)
        found.append(_inside(lightness[0] + (lightness[1] - lightness[0]) * t, bow, hue[0] + (hue[1] - hue[0]) * t))
    return found


def light() -> list[str]:
    """On paper: pale to deep blue."""
    return ramp((0.955, 0.24), (0.022, 0.125, 0.09), (105.0, 282.0))


def dark() -> list[str]:
    """On black: deep blue to pale yellow."""
    return ramp((0.245, 0.96), (0.035, 0.135, 0.09), (285.0, 100.0))


def style() -> str:
    """Both ramps as the custom properties --m0 .. --m15; the rest of the style takes them from there."""
    day, night = (";".join(f"--m{i}:{c}" for i, c in enumerate(colours)) for colours in (light(), dark()))
    levels = "".join(f".m{i}{{fill:var(--m{i})}}" for i in range(STEPS))
    return (
        f":root{{{day}}}"
        f"@media (prefers-color-scheme:dark){{:root:not([data-theme=light]){{{night}}}}}"
        f":root[data-theme=dark]{{{night}}}"
        f"@media print{{:root:root:root{{{day}}}}}{levels}\n"
    )


def _inside(lightness: float, chroma: float, hue: float) -> str:
    """The colour of that lightness and hue with the largest chroma, up to the one asked for, that a screen has."""
    low, high = 0.0, chroma
    linear = _linear(lightness, chroma, hue)
    if not _fits(linear):
        for _ in range(24):
            middle = (low + high) / 2
            low, high = (middle, high) if _fits(_linear(lightness, middle, hue)) else (low, middle)
        linear = _linear(lightness, low, hue)
    return "#" + "".join(f"{round(255 * _companded(min(1.0, max(0.0, x)))):02x}" for x in linear)


def _fits(linear: list[float]) -> bool:
    return all(-1e-4 <= x <= 1.0001 for x in linear)


def _companded(x: float) -> float:
    return 12.92 * x if x <= 0.0031308 else 1.055 * x ** (1 / 2.4) - 0.055


def _linear(lightness: float, chroma: float, hue: float) -> list[float]:
    """Linear sRGB of an OKLCh colour."""
    a, b = chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))
    l = (lightness + 0.3963377774 * a + 0.2158037573 * b) ** 3
    m = (lightness - 0.1055613458 * a - 0.0638541728 * b) ** 3
    s = (lightness - 0.0894841775 * a - 1.2914855480 * b) ** 3
    return [
        4.0767416621 * l - 3.3077115913 * m + 0.2309699292 * s,
        -1.2684380046 * l + 2.6097574011 * m - 0.3413193965 * s,
        -0.0041960863 * l - 0.7034186147 * m + 1.7076147010 * s,
    ]
