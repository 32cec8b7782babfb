"""Pictures: a comparison (learned against forgot, and what each run cost), and what a method selected."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito's palette, which stays apart for colour-blind readers; shapes differ too, for print.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
TEXT = "#1a1a1a"
FAINT = "#d9d9d9"


def draw(rows: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """A PNG of the runs of a comparison.

    Args:
      rows: for each run `name`, `learned` and `forgot` (nats a token; `forgot` None without a retained set),
        `trained_percent`, `step_milliseconds`, `peak_memory_gib`.
      title: what the runs have in common.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style = {"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT, "font.size": 10.5}
    with plt.rc_context({**style, "axes.edgecolor": "#808080", "axes.spines.top": False, "axes.spines.right": False}):
        figure = plt.figure(figsize=(11, max(5.6, 2.6 + 0.5 * len(rows))), layout="constrained")
        grid = figure.add_gridspec(3, 2, width_ratios=(1.55, 1))
        scatter = figure.add_subplot(grid[:, 0])
        _scatter(scatter, rows)
        costs = (
            ("trained_percent", "parameters trained, %", "{:.3g} %"),
            ("step_milliseconds", "time of a step, ms", "{:.0f} ms"),
            ("peak_memory_gib", "peak memory, GiB", "{:.2f} GiB"),
        )
        for i, (key, label, shown) in enumerate(costs):
            _bars(figure.add_subplot(grid[i, 1]), rows, key, label, shown)
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold", color=TEXT)
        figure.draw_without_rendering()
        _label_points(scatter, rows)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=150, facecolor="white")
        plt.close(figure)
    return file.getvalue()


def draw_selection(record: Mapping[str, Any], title: str) -> bytes:
    """A PNG of what was selected: layers by weights, dark where all entries of a weight train, white where none does.

    Args:
      record: `jaxft.selected.Selected.record()`.
      title: of the run.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shares, columns = record["shares"], record["columns"]
    largest = max((s for row in shares for s in row), default=0) or 1.0
    size = (2.2 + 0.62 * max(len(columns), 4), 2.0 + 0.24 * max(len(shares), 4))
    with plt.rc_context({"text.color": TEXT, "xtick.color": TEXT, "ytick.color": TEXT, "font.size": 9.5}):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        if columns:
            image = axes.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=largest, interpolation="nearest")
            bar = figure.colorbar(image, ax=axes, format=lambda x, _: f"{100 * x:.3g} %")
            bar.set_label("entries that train")
        names = [
            f"{name}\n{group}" if group else name for name, group in zip(columns, record["categories"], strict=True)
        ]
        axes.set_xticks(range(len(columns)), names, rotation=45, ha="right")
        axes.set_yticks(range(0, len(shares), max(len(shares) // 16, 1)))
        axes.set_ylabel("layer")
        rest = [f"{path} {100 * found['share']:.3g} %" for path, found in record["others"].items() if found["share"]]
        axes.set_title("\n".join([title, *([", ".join(rest[:4])] if rest else [])]), loc="left", fontsize=10.5)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=130, facecolor="white")
        plt.close(figure)
    return file.getvalue()


def _look(i: int) -> tuple[str, str]:
    return COLOURS[i % len(COLOURS)], MARKERS[(i // len(COLOURS) + i) % len(MARKERS)]


def _scatter(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    axes.grid(color="#eeeeee", zorder=0)
    axes.axhline(0, color="#808080", linewidth=0.8, zorder=1)
    axes.axvline(0, color="#808080", linewidth=0.8, zorder=1)
    axes.plot(0, 0, marker="+", color=TEXT, markersize=11, markeredgewidth=1.6, zorder=3)
    for i, row in enumerate(rows):
        colour, marker = _look(i)
        axes.plot(
            row["learned"], row["forgot"] or 0.0, marker=marker, color=colour, markersize=11,
            markeredgecolor="white", linestyle="none", zorder=4,
        )  # fmt: skip
    axes.set_xlabel("learned: fall of the loss on the target sets, nats a token\nmore is better →")
    axes.set_ylabel("forgot: rise of the loss on the retained sets,\nnats a token   ← less is better")
    axes.margins(x=0.16, y=0.16)


def _label_points(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Names beside the points, each at the first place around its point where it covers nothing."""
    rows = [row for row in rows if math.isfinite(row["learned"]) and math.isfinite(row["forgot"] or 0.0)]
    renderer = axes.figure.canvas.get_renderer()
    frame = axes.get_window_extent(renderer)
    points = [(0.0, 0.0)] + [(row["learned"], row["forgot"] or 0.0) for row in rows]
    pixels = axes.transData.transform(points)
    taken: list[Any] = []
    scale = axes.figure.dpi / 72
    around = [
        (9, 0, "left", "center"),
        (-9, 0, "right", "center"),
        (0, 9, "center", "bottom"),
        (0, -9, "center", "top"),
    ]
    around += [(9, 9, "left", "bottom"), (-9, 9, "right", "bottom"), (9, -9, "left", "top"), (-9, -9, "right", "top")]
    labels = ["base"] + [row["name"] for row in rows]
    for text, point in zip(labels, points, strict=True):
        best: Any = None
        fewest: tuple[float, float] | None = None
        for radius in (1, 2, 3.2):
            for x, y, horizontal, vertical in around:
                label = axes.annotate(
                    text, point, (x * radius, y * radius), textcoords="offset points", ha=horizontal, va=vertical,
                    color=TEXT, fontweight="bold", fontsize=11, zorder=5,
                    arrowprops={"arrowstyle": "-", "color": "#808080", "linewidth": 0.7} if radius > 1 else None,
                )  # fmt: skip
                box = label.get_window_extent(renderer)
                hidden = sum(box.overlaps(other) for other in taken)
                near = 7 * scale
                hidden += sum(
                    box.x0 - near < px < box.x1 + near and box.y0 - near < py < box.y1 + near
                    for (px, py), other in zip(pixels, points, strict=True)
                    if other != point
                )
                outside = box.x0 < frame.x0 or box.x1 > frame.x1 or box.y0 < frame.y0 or box.y1 > frame.y1
                cost = (hidden + 2 * outside, radius)
                if fewest is None or cost < fewest:
                    if best is not None:
                        best.remove()
                    best, fewest = label, cost
                else:
                    label.remove()
            if fewest is not None and fewest[0] == 0:
                break
        taken.append(best.get_window_extent(renderer))


def _bars(axes: Any, rows: Sequence[Mapping[str, Any]], key: str, label: str, shown: str) -> None:
    values = [row[key] for row in rows]
    largest = max((v for v in values if v is not None), default=1.0) or 1.0
    for i, value in enumerate(values):
        axes.barh(i, value or 0.0, color=_look(i)[0], height=0.66, zorder=2)
        text = shown.format(value) if value is not None else "not measured"
        axes.text((value or 0.0) + largest * 0.02, i, text, va="center", color=TEXT, fontsize=9.5)
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, largest * 1.28)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.spines["left"].set_color(FAINT)
    axes.tick_params(axis="y", length=0)
    axes.set_title(label, loc="left", fontsize=10.5, color=TEXT)
