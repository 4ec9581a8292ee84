"""The tables of results are what the files in kd/methods/runs say: the settings and log of every run, one per line."""

import re
from pathlib import Path

from kd.tools.table import COLUMNS, collect, compare, format_table

ROOT = Path(__file__).parents[1]
METHODS = ROOT / "kd" / "methods"


def runs(section: str) -> list[dict]:
    return collect(METHODS / "runs" / f"{section}.jsonl")


def test_whole_tables():
    """RESULTS.md has every row of every file, under the heading with what the rows share."""
    text = (METHODS / "RESULTS.md").read_text()
    shown = re.findall(r"eval\.py kd/methods/runs/(\S+)\.jsonl --markdown", text)
    assert sorted(shown) == sorted(file.stem for file in (METHODS / "runs").iterdir())
    for section in shown:
        for line in format_table(compare(runs(section)), markdown=True).splitlines():
            assert line in text, f"{section}: {line}"


def test_gains_of_the_readme():
    """The column "gain here" is that of the default setting on FCOS; LD's, that of 200 steps on GFL."""
    text = (ROOT / "README.md").read_text()
    later, founding = ("bckd", "crosskd"), ("frs", "pgd", "ssim", "drkd", "tid", "pkd", "cwd", "mgd", "fgd", "l1", "l2")
    for section, methods in (("shapes", founding), ("shapes-predictions", later), ("gfl", ("ld",))):
        rows = [dict(zip(COLUMNS, row)) for row in compare(runs(section))]
        rows = {row["method"]: row for row in rows if row["student"] in ("r18", "r34 -> r18")}
        assert rows["none"]["AP"] in text.replace("\n", " "), section
        for method in methods:
            (line,) = [line for line in text.splitlines() if re.match(rf"\| \[?{method}\b", line, re.IGNORECASE)]
            assert f" {rows[method]['gain'].split()[0]} " in line, method


def test_first_command():
    """The README shows what the run of seed 0 printed."""
    text = (ROOT / "README.md").read_text()
    args = {"frs": "frs r50", "teacher": "teacher r101", "none": "plain r50"}
    for run in runs("first"):
        if run["args"]["seed"] == 0:
            name = args[run["folder"].split("-")[0]]
            numbers = "   ".join(f"{run['log'][-1][key]:.3f}" for key in ("AP", "AP50", "AP75"))
            assert re.search(rf"{name} +{numbers}", text), name


def test_ratios():
    """The table of ratios in kd/methods/README.md is that of seed 0 in the default setting."""
    text = (METHODS / "README.md").read_text()
    for run in runs("shapes") + runs("shapes-predictions"):
        args, ratios = run["args"], run["log"][-1]["ratio_to_detection"]
        if args["seed"] == 0 and ratios and not args["inherit"] and args["distill_weight"] == 1 and not args["set"]:
            cell = ", ".join(f"{name.split('_')[2]} {value:.2g}" for name, value in ratios.items())
            assert re.search(rf"^\| `{args['method']}` \|.*{re.escape(cell)}", text, re.MULTILINE), (args, cell)
