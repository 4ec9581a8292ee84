"""AP against epochs of many runs as a picture: a line for each method, the mean over its seeds."""

import math
import statistics
from collections import defaultdict

from PIL import Image, ImageDraw, ImageFont

from kd.tools.table import SETTING, key, method_name

WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 900, 440, 60, 30, 250, 50  # of the picture and its margins, in pixels
ALIKE = (*(name for name in SETTING if name != "iteration"), "teacher")  # within a line
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2)  # of AP between grid lines


def read_curves(runs: list[dict]) -> dict[str, dict[int, float]]:
    """Return the mean AP over seeds after each evaluated epoch, for each detector, student and method.

    --eval-interval says which epochs are evaluated, beside the last. Names include settings that differ.

    Args:
        runs: from `kd.tools.table.collect`.
    """
    named = defaultdict(list)
    for run in runs:
        args = run["args"]
        named[f"{args['detector']} {args['student']} {method_name(args)}"].append(run)
    groups = defaultdict(lambda: defaultdict(list))
    for name, members in named.items():
        differing = [setting for setting in ALIKE if len({key(run["args"], (setting,)) for run in members}) > 1]
        for run in members:
            label = ", ".join([name, *(f"{setting} {run['args'].get(setting)}" for setting in differing)])
            for line in run["log"]:
                groups[label][line["epoch"]].append(line["AP"])
    return {
        name: {epoch: statistics.mean(values) for epoch, values in sorted(epochs.items())}
        for name, epochs in sorted(groups.items())
    }


def draw_curves(curves: dict[str, dict[int, float]]) -> Image.Image:
    """Draw AP against epochs, the legend in the order of the last AP; the AP axis need not start at 0."""
    last = max(epoch for curve in curves.values() for epoch in curve)
    values = [ap for curve in curves.values() for ap in curve.values()]
    step = next((step for step in STEPS if (max(values) - min(values)) / step <= 8), STEPS[-1])
    low = math.floor(min(values) / step)  # in steps, as high
    high = max(math.ceil(max(values) / step), low + 1)
    canvas = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)

    def at(epoch: float, ap: float) -> tuple[float, float]:
        across, up = (epoch - 1) / max(last - 1, 1), (ap / step - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    for line in range(low, high + 1):
        draw.line([at(1, line * step), at(last, line * step)], "#dddddd")
        draw.text((LEFT - 8, at(1, line * step)[1]), f"{line * step:.2f}", "black", font, anchor="rm")
    for epoch in range(1, last + 1, math.ceil(last / 12)):
        draw.text((at(epoch, low * step)[0], HEIGHT - BOTTOM + 8), str(epoch), "black", font, anchor="mt")
    draw.text((LEFT, TOP - 8), "AP", "black", font, anchor="rb")
    draw.text((at(last, low * step)[0], HEIGHT - 8), "epochs", "black", font, anchor="rb")

    names = sorted(curves, key=lambda name: -list(curves[name].values())[-1])
    for row, name in enumerate(names):
        color = f"hsl({360 * row // len(names)}, 75%, 42%)"
        points = [at(epoch, ap) for epoch, ap in curves[name].items()]
        draw.line(points, color, width=3)
        for x, y in points:
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), color)
        draw.text((WIDTH - RIGHT + 16, TOP + 20 * row), name, color, font, anchor="lm")
    return canvas
