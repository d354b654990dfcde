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

from bench.results import ROOT, Result, load

OURS = "robustloss"
# Colours that differ in print and for the colour-blind.
OURS_COLOUR, PEER_COLOUR, CEILING_COLOUR = "#0b6e99", "#b8b8b8", "#e0c46c"
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
    """The logits' shape, and the hidden size that they come from, if they do."""
    B, T, V = (result.shape[name] for name in "BTV")
    return f"[{B}, {T}, {V}]" + (f" from H = {result.shape['H']}" if "H" in result.shape else "")


def columns(group: list[Result]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a group's table; contestants that are absent are not in it (see `absences`)."""
    measured = [result for result in group if result.ms is not None]
    ours = [result for result in measured if result.peer.startswith(OURS)]
    unit = group[0].rate_unit or ""
    header = ["", "median ms", "spread ms", unit, "of ceiling", "extra MiB", *(f"vs {own.peer}" for own in ours)]
    rows = [
        [
            result.peer,
            f"{result.ms:.2f}",
            f"{result.ms_spread:.2f}",
            _number(result.rate, ".3g" if unit == "TFLOP/s" else ".1f"),
            _number(result.fraction_of_ceiling, ".0%"),
            _number(extra_mebibytes(result), ".0f"),
            *(f"{result.ms / own.ms:.2f}x" for own in ours),
        ]
        for result in measured
    ]
    return header, rows


def extra_mebibytes(result: Result) -> float | None:
    # A resident set is measured to some pages, so that nothing can come out below nothing.
    return None if result.peak_bytes is None else max(result.peak_bytes / MEBIBYTE, 0.0)


def absences(group: list[Result]) -> list[str]:
    return [f"{result.peer}: absent, {result.absent}" for result in group if result.ms is None]


def ceilings_of(group: list[Result]) -> str:
    names = sorted({result.ceiling for result in group if result.ceiling})
    return f"ceiling: {', '.join(names)}" if names else "ceiling not measured"


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


_EXPLANATION = """Medians and interquartile ranges of one run; ratios above 1x are slower than robustloss. GB/s and
TFLOP/s count the least work of the pass. "of ceiling" is the fraction of what the machine gave in the same run for a
plain read or copy, or for the regime's matrix products alone. "extra MiB" is measured: the peak beyond the inputs and
the returned gradients."""


def draw(results: list[Result], folder: Path) -> list[Path]:
    """The pictures of every device and op."""
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for device, of_device in _by(results, "device").items():
        for op, of_op in _by(of_device, "op").items():
            name = f"{_slug(device)}-{op.replace('_', '-')}"
            paths.append(_draw(of_op, folder / f"{name}-time.png", f"{op}: median time on {device}", "time"))
            if any(result.peak_bytes is not None for result in of_op):
                paths.append(_draw(of_op, folder / f"{name}-memory.png", f"{op}: extra memory on {device}", "memory"))
    return paths


def _draw(results: list[Result], path: Path, heading: str, what: str) -> Path:
    """One panel for each group."""
    from matplotlib import pyplot

    def value(result: Result) -> float | None:
        if what == "time":
            return result.ms
        return extra_mebibytes(result)

    panels = [[result for result in group if value(result) is not None] for group in grouped(results).values()]
    panels = [panel for panel in panels if panel]
    n_rows = -(-len(panels) // PANELS_ACROSS)
    longest = max(len(panel) for panel in panels)
    figure, axes = pyplot.subplots(
        n_rows,
        PANELS_ACROSS,
        figsize=(7.5 * PANELS_ACROSS, (0.25 * longest + 0.9) * n_rows + 0.6),
        squeeze=False,
        layout="constrained",
    )
    figure.suptitle(heading)
    for place, panel in zip_longest(axes.flat, panels):
        if panel:
            _draw_panel(place, panel, value, "ms" if what == "time" else "MiB")
        else:
            place.set_axis_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw_panel(axes, panel: list[Result], value: Callable[[Result], float], unit: str) -> None:
    panel = sorted(panel, key=value)
    values = [value(result) for result in panel]
    own = next((value(result) for result in panel if result.peer == OURS), 0.0)
    colours = [
        OURS_COLOUR if result.peer.startswith(OURS) else CEILING_COLOUR if result.is_ceiling else PEER_COLOUR
        for result in panel
    ]
    axes.barh([result.peer for result in panel], values, color=colours)
    for position, amount in enumerate(values):
        # Next to no memory is no measure of anything.
        ratio = f"  ({amount / own:.2f}x)" if own > (1 if unit == "MiB" else 0) else ""
        digits = ",.0f" if amount >= 100 or unit == "MiB" else ".3g"
        axes.text(amount, position, f" {amount:{digits}} {unit}{ratio}", va="center", fontsize=8)
    axes.set_title(f"{panel[0].pass_name}, {panel[0].dtype} {sizes(panel[0])}", fontsize=9, loc="left")
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(values) or 1)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


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
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    try:
        paths = write(parser.parse_args(arguments).results)
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(str(path) for path in paths))
    return 0


if __name__ == "__main__":
    sys.exit(main())
