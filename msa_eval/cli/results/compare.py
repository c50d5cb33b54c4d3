"""``msa-eval compare``."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("compare.html"), show_default=True, help="The page to write."
)
def compare(results: tuple[Path, ...], out: Path) -> None:
    """Compare RESULTS with the first of them, sample by sample: paired differences, McNemar's test, and a page.

    Folders of 'msa-eval curve' become one table and one figure, as PDF and SVG.
    """
    if any((path / "curve.csv").is_file() for path in results):
        _compare_curves(results, out)
        return
    from msa_eval.report.comparison import compare as compare_results
    from msa_eval.report.comparison import load_all, name_all, render_comparison
    from msa_eval.report.exhibits import pictures_of
    from msa_eval.report.page import check_page
    from msa_eval.report.sidebyside import write_comparison

    check_page(out)
    comparison = compare_results(load_all(results))
    click.echo(render_comparison(comparison))
    pictures = {name: pictures_of(path, comparison.results[name]) for name, path in name_all(results).items()}
    path = write_comparison(comparison, out, pictures)
    click.echo(f"\npage in {path}, {path.stat().st_size / 1000:.0f} kB")


def _compare_curves(folders: tuple[Path, ...], out: Path) -> None:
    from msa_eval.report.curves import compare_curves, draw_curves, render_curves
    from msa_eval.report.style import save

    tables, notes = compare_curves(folders)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    click.echo(render_curves(tables))
    for path in save(draw_curves(tables), out.with_suffix("")):
        click.echo(path)
