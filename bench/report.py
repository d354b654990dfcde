"""Tables and pictures of what is measured: `python -m bench.report [--results FOLDER]`.

Reads every .jsonl in FOLDER (bench/results by default) and writes beside them report.md and, for each device and op,
<device>-<op>-time.png and <device>-<op>-memory.png. Of each device only the latest commit's results are shown.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

from .results import CEILINGS, OURS, Result, load

# Colours that differ in print and for the colour-blind.
OURS_COLOUR, PEER_COLOUR, CEILING_COLOUR = "#0b6e99", "#b8b8b8", "#e0c46c"
PEER_COLOURS = (PEER_COLOUR, "#7a7a7a", "#404040")  # where colours alone tell peers apart
PANELS_ACROSS = 2
MEBIBYTE = 2**20


def grouped(results: Iterable[Result]) -> dict[tuple, list[Result]]:
    """Contestants that may be compared, by group, in the order measured."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(result.group, []).append(result)
    return groups


def title(result: Result) -> str:
    return f"{result.op} {result.pass_name}, {result.dtype} {sizes(result)}"


def sizes(result: Result) -> str:
    """The shape of the problem, and for logits the hidden size that they come from, if they do."""
    shape = ", ".join(str(size) for name, size in result.shape.items() if name != "H")
    return f"[{shape}]" + (f" from H = {result.shape['H']}" if "H" in result.shape else "")


def columns(group: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a group's table, without columns that hold nothing; contestants that are absent are not in it
    (see `absences`).
    """
    measured = [result for result in group if result.ms is not None]
    ours = [result for result in measured if result.peer.startswith(OURS)]
    unit = group[0].rate_unit or "rate"
    header = ["", "median ms", "spread ms", unit, "of ceiling", "extra MiB", "launches"]
    rows = [
        [
            result.peer,
            _milliseconds(result.ms, result.ms),
            _milliseconds(result.ms_spread, result.ms),
            _number(result.rate, ".3g" if unit == "TFLOP/s" else ".1f"),
            _number(result.fraction_of_ceiling, ".0%"),
            _number(extra_mebibytes(result), ".0f"),
            _number(result.launches, "d"),
            *(f"{result.ratio_to(own):.2f}x" for own in ours),
        ]
        for result in measured
    ]
    header += [f"vs {own.peer}" for own in ours]
    filled = [index for index in range(len(header)) if any(row[index] for row in rows)]
    return [header[index] for index in filled], [[row[index] for index in filled] for row in rows]


def _milliseconds(value: float, median: float) -> str:
    # Calls of microseconds keep two digits of their spread, too.
    return f"{value:.2f}" if median >= 1 else f"{value:.4f}"


def extra_mebibytes(result: Result) -> float | None:
    # A resident set is measured to some pages, so that nothing can come out below nothing.
    return None if result.peak_bytes is None else max(result.peak_bytes / MEBIBYTE, 0.0)


def absences(group: list[Result]) -> list[str]:
    return [f"{result.peer}: absent, {result.absent}" for result in group if result.ms is None]


def ceilings_of(group: list[Result]) -> str:
    names = sorted({result.ceiling for result in group if result.ceiling})
    return f"ceiling: {', '.join(names)}" if names else "no ceiling"


def tables(results: Iterable[Result]) -> Iterator[tuple[str, list[str]]]:
    """A title and lines for each group, for a terminal."""
    for group in grouped(results).values():
        header, rows = columns(group)
        widths = [max(len(row[index]) for row in [header, *rows]) for index in range(len(header))]
        lines = ["  ".join(_pad(row, widths)).rstrip() for row in [header, *rows]]
        first = group[0]
        yield f"{title(first)} ({first.device}, {first.threads} threads, {ceilings_of(group)})", lines + absences(group)


def markdown(results: list[Result], pictures: list[Path]) -> str:
    """The report: for each device what was measured with, pictures, tables, and who was absent and why."""
    text = ["# Benchmarks", _EXPLANATION]
    for device, of_device in _by(results, "device").items():
        first = of_device[0]
        packages = ", ".join(f"{name} {version}" for name, version in first.versions.items())
        text += [f"## {device}", f"{first.threads} threads, commit {first.commit}; {packages}."]
        text += [f"![{path.stem}]({path.name})" for path in pictures if path.name.startswith(_slug(device))]
        for group in grouped(of_device).values():
            header, rows = columns(group)
            text.append(f"### {title(group[0])}\n{ceilings_of(group)}")
            if rows:
                text.append("\n".join(_markdown_row(row) for row in [header, ["---"] * len(header), *rows]))
            text += ["\n".join(f"- {line}" for line in absences(group))]
    return "\n\n".join(part for part in text if part) + "\n"


_EXPLANATION = """Medians and interquartile ranges of one run; ratios above 1x are slower than robustloss, which for
calls of microseconds, and on a CPU for optimizer steps, has its rounds between those of each other contestant. GB/s and
TFLOP/s count the least work of the pass. "of ceiling" is the fraction of what the machine gave in the same run for a
plain read or copy, for the regime's matrix products alone, or for torch.sort. "extra MiB" is measured: the peak beyond
the inputs and the returned gradients. "launches" are the kernels, copies and fills that one call starts on a GPU."""


def draw(results: list[Result], folder: Path) -> list[Path]:
    """The pictures of every device and op."""
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for device, of_device in _by(results, "device").items():
        for op, of_op in _by((result for result in of_device if result.ms is not None), "op").items():
            name = f"{_slug(device)}-{op.replace('_', '-')}"
            path, heading = folder / f"{name}-time.png", f"{op}: median time on {device}"
            # Where a size is called n there are many, and a panel shows them side by side.
            by_size = "n" in of_op[0].shape
            paths.append(_draw_by_size(of_op, path, heading) if by_size else _draw(of_op, path, heading, "time"))
            if any(result.peak_bytes is not None for result in of_op):
                paths.append(_draw(of_op, folder / f"{name}-memory.png", f"{op}: extra memory on {device}", "memory"))
    return paths


def _draw(results: list[Result], path: Path, heading: str, what: str) -> Path:
    """One panel for each group."""

    def value(result: Result) -> float | None:
        return result.ms if what == "time" else extra_mebibytes(result)

    panels = [[result for result in group if value(result) is not None] for group in grouped(results).values()]
    panels = [panel for panel in panels if panel]
    height = 0.25 * max(len(panel) for panel in panels) + 0.9
    return _draw_panels(
        panels,
        lambda axes, panel: _draw_panel(axes, panel, value, "ms" if what == "time" else "MiB"),
        height,
        path,
        heading,
    )


def _draw_by_size(results: list[Result], path: Path, heading: str) -> Path:
    """One panel for each pass and type."""
    panels = [panel for of_pass in _by(results, "pass_name").values() for panel in _by(of_pass, "dtype").values()]
    return _draw_panels(panels, _draw_sizes, 2.6, path, f"{heading}; x: over {OURS}")


def _draw_panels(
    panels: list[list[Result]], draw_panel: Callable[..., None], height: float, path: Path, heading: str
) -> Path:
    from matplotlib import pyplot

    n_rows = -(-len(panels) // PANELS_ACROSS)
    size = (7.5 * PANELS_ACROSS, height * n_rows + 0.6)
    figure, axes = pyplot.subplots(n_rows, PANELS_ACROSS, figsize=size, squeeze=False, layout="constrained")
    figure.suptitle(heading)
    for place, panel in zip_longest(axes.flat, panels):
        if panel:
            draw_panel(place, panel)
        else:
            place.set_axis_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw_panel(axes, panel: list[Result], value: Callable[[Result], float], unit: str) -> None:
    panel = sorted(panel, key=value)
    values = [value(result) for result in panel]
    own = next((result for result in panel if result.peer == OURS), None)
    colours = [
        OURS_COLOUR if result.peer.startswith(OURS) else CEILING_COLOUR if result.is_ceiling else PEER_COLOUR
        for result in panel
    ]
    axes.barh([result.peer for result in panel], values, color=colours)
    for position, (result, amount) in enumerate(zip(panel, values, strict=True)):
        ratio = ""
        if own is not None and unit == "ms":
            ratio = f"  ({result.ratio_to(own):.2f}x)"
        elif own is not None and value(own) > 1:  # next to no memory is no measure of anything
            ratio = f"  ({amount / value(own):.2f}x)"
        digits = ",.0f" if amount >= 100 or unit == "MiB" else ".3g"
        axes.text(amount, position, f" {amount:{digits}} {unit}{ratio}", va="center", fontsize=8)
    axes.set_title(f"{panel[0].pass_name}, {panel[0].dtype} {sizes(panel[0])}", fontsize=9, loc="left")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(values) or 1)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_sizes(axes, panel: list[Result]) -> None:
    """Bars on a logarithmic scale, side by side for each size; above ours its time, above others their ratio to it."""
    from matplotlib.patches import Patch

    peers = list(_by(panel, "peer"))
    greys = iter(len(peers) * PEER_COLOURS)
    colours = {
        peer: OURS_COLOUR if peer == OURS else CEILING_COLOUR if peer in CEILINGS else next(greys) for peer in peers
    }
    groups = list(grouped(panel).values())
    width = 0.8 / len(peers)
    for position, group in enumerate(groups):
        own = next((result for result in group if result.peer == OURS), None)
        for index, result in enumerate(group):
            place = position + (index - (len(group) - 1) / 2) * width
            axes.bar(place, result.ms, width, color=colours[result.peer])
            text = _two_digits(result.ms) if own in (None, result) else f"{_two_digits(result.ratio_to(own))}x"
            axes.text(place, result.ms, text, ha="center", va="bottom", fontsize=6)
    axes.set_yscale("log")
    axes.set_ylabel("ms", fontsize=8)
    axes.set_title(f"{panel[0].pass_name}, {panel[0].dtype}", fontsize=9, loc="left")
    axes.set_xticks(range(len(groups)), [sizes(group[0]) for group in groups])
    axes.margins(y=0.15)
    axes.tick_params(labelsize=8)
    handles = [Patch(color=colour, label=peer) for peer, colour in colours.items()]
    axes.legend(
        handles=handles, fontsize=7, frameon=False, ncols=len(handles), loc="lower right", bbox_to_anchor=(1, 0.97)
    )
    axes.spines[["top", "right"]].set_visible(False)


def _two_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def latest(results: Iterable[Result]) -> list[Result]:
    """Of each device the results of the last run: of its commit and number of threads."""
    results = list(results)
    last = {result.device: result for result in sorted(results, key=lambda result: result.time)}

    def run(result: Result) -> tuple[str, int]:
        return result.commit, result.threads

    return [result for result in results if run(result) == run(last[result.device])]


def write(folder: Path) -> list[Path]:
    """Report and pictures of every results file in the folder. Raises FileNotFoundError where there is none."""
    files = sorted(folder.glob("*.jsonl"))
    results = latest(result for file in files for result in load(file))
    if not results:
        raise FileNotFoundError(f"no results in {folder}: make bench RESULTS={folder} writes them")
    pictures = draw(results, folder)
    report = folder / "report.md"
    draft = report.with_suffix(".md.partial")
    draft.write_text(markdown(results, pictures))
    draft.replace(report)  # whole, or not at all
    return [report, *pictures]


def _by(results: Iterable[Result], attribute: str) -> dict[str, list[Result]]:
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(getattr(result, attribute), []).append(result)
    return found


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _pad(row: list[str], widths: list[int]) -> list[str]:
    return [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]


def _markdown_row(row: list[str]) -> str:
    return "| " + " | ".join(row) + " |"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", metavar="FOLDER")
    try:
        paths = write(parser.parse_args(arguments).results)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
