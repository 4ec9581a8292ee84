"""The tables of results are what the files in kd/methods/runs say: the settings and log of every run, one per line."""

import re
from collections import ChainMap
from pathlib import Path

from kd.detectors import STRIDES
from kd.methods import METHODS, build_method
from kd.tools.table import COLUMNS, collect, compare, format_table

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "kd" / "methods"


def runs(section: str) -> list[dict]:
    return collect(PAGES / "runs" / f"{section}.jsonl")


def test_whole_tables():
    """Each section of RESULTS.md has the whole table of its file, under the heading with what the rows share."""
    text = (PAGES / "RESULTS.md").read_text()
    shown = re.findall(r"eval\.py kd/methods/runs/(\S+)\.jsonl --markdown", text)
    assert sorted(shown) == sorted(file.stem for file in (PAGES / "runs").iterdir())
    for section in shown:
        command = f"eval.py kd/methods/runs/{section}.jsonl --markdown\n```\n"
        (page,) = text.split(command)[1:]
        below = re.split(r"\n## |eval\.py", page)[0]
        table = f"\n{format_table(compare(runs(section)), markdown=True)}\n"
        assert table in below and below.count("\n|") == table.count("\n|"), section


def test_gains_of_the_readme():
    """Each cell is the gain that RESULTS.md has for the method; "-" without one, empty where there can be none."""
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"^\| \[(\w+)\]\(kd/methods/.*?\| .*? \| (.*) \|.*\|$", text, re.MULTILINE)
    table = {method.lower(): [cell.strip() for cell in cells.split("|")] for method, cells in lines}
    assert table.keys() == METHODS.keys()

    recipe = (["recipe-shapes"], ["recipe-persons", "recipe-persons-others"], ["vehicles"])
    columns = (
        ("fcos", gains("shapes-predictions", "fcos") | gains("shapes", "fcos")),
        ("retinanet", gains("detectors", "retinanet")),
        ("faster_rcnn", gains("detectors-more", "faster_rcnn") | gains("detectors", "faster_rcnn")),
        ("gfl", gains("gfl", "gfl")),
        *(("fcos", dict(ChainMap(*map(recipe_gains, sections)))) for sections in recipe),
    )
    for method, cells in table.items():
        for cell, (detector, measured) in zip(cells, columns, strict=True):
            try:
                build_method(method, detector, 256, 256, STRIDES[detector], [])
            except ValueError:
                assert cell == "" and method not in measured, method
            else:
                assert cell == measured.get(method, "-"), method


def recipe_gains(section: str) -> dict[str, str]:
    """Return what `--inherit --distill-weight auto` adds to inheriting alone."""
    return gains(section, "fcos", "over inherit", " inherit x auto")


def gains(section: str, detector: str, column: str = "gain", setting: str = "") -> dict[str, str]:
    """Return a column of a section in points of AP, by method: "+0.100 ± 0.011" as "+10.0±1.1"."""
    rows = [dict(zip(COLUMNS, row)) for row in compare(runs(section))]
    cells = {row["method"]: row[column].replace(" ", "") for row in rows if row["detector"] == detector and row[column]}
    return {
        name.removesuffix(setting): re.sub(r"0\.\d+", lambda value: f"{100 * float(value[0]):.1f}", cell)
        for name, cell in cells.items()
        if name.endswith(setting)
    }


def test_first_command():
    """The README shows what the run of seed 0 printed."""
    text = (ROOT / "README.md").read_text()
    logs = {run["folder"].split("-")[0]: run["log"][-1] for run in runs("first") if run["args"]["seed"] == 0}
    for folder, name in {"teacher": "teacher r101", "none": "plain r50", "frs": "frs r50"}.items():
        numbers = "   ".join(f"{logs[folder][key]:.3f}" for key in ("AP", "AP50", "AP75"))
        assert re.search(rf"{name} +{numbers}", text), name


def test_ratios():
    """The table of ratios in kd/methods/README.md is that of seed 0 in the default setting."""
    text = (PAGES / "README.md").read_text()
    compared = set()
    for run in runs("shapes") + runs("shapes-predictions"):
        args, ratios = run["args"], run["log"][-1]["ratio_to_detection"]
        if args["seed"] == 0 and ratios and not args["inherit"] and args["distill_weight"] == 1 and not args["set"]:
            cell = ", ".join(f"{name.split('_')[2]} {value:.2g}" for name, value in ratios.items())
            assert re.search(rf"^\| `{args['method']}` \|.*{re.escape(cell)}", text, re.MULTILINE), (args, cell)
            compared.add(args["method"])
    assert compared == METHODS.keys() - {"ld"}  # which is for GFL alone
