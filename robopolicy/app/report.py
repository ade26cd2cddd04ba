"""Write one self-contained HTML page about a run: training, success with intervals, latency, film."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

EXAMPLES: tuple[tuple[str, str], ...] = (
    ("robopolicy report run=pick_cube", "writes checkpoints/pick_cube/report.html"),
    ("robopolicy report run=checkpoints/pick_cube open=true", "and shows it in the browser"),
    ("robopolicy report run=zoo/pick_cube --json", "for a published policy; prints where the page is as JSON"),
)


def run(cfg: DictConfig) -> dict[str, Any]:
    """Render the report of `cfg.run`."""
    from rich.console import Console
    from rich.markup import escape

    from robopolicy.evaluation.report import render_report
    from robopolicy.evaluation.results import run_folder
    from robopolicy.training import checkpoint

    path = render_report(run_folder(checkpoint.resolve(cfg.run)))
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"wrote [bold]{escape(str(path))}[/] ({path.stat().st_size / 1e6:.1f} MB)"
    )
    if cfg.open:
        import webbrowser

        webbrowser.open(path.resolve().as_uri())
    return {"report": str(path)}
