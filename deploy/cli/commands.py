"""The command line: arguments and exit codes only. What a command does lives in the module it calls."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli import build_commands, file_commands, machine_commands, serve_commands
from deploy.cli.derived_options import Option, derived_command, described
from deploy.cli.machine_commands import Json
from runtimes.errors import DeployError, UnavailableError
from runtimes.system.device import CPU, Device

app = typer.Typer(
    name="ldm-deploy",
    help="Compile a trained latent diffusion model into a bundle that runs without PyTorch, and prove its accuracy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
derived_command(app, build_commands.build_options)(build_commands.build)
derived_command(app, build_commands.prune_options)(build_commands.prune)

derived_command(app, serve_commands.serve_options)(serve_commands.serve)
derived_command(app, serve_commands.serve_engine_options)(serve_commands.serve_engine)

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="folder that `build` wrote")]
BundlePaths = Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="folders that `build` wrote")]
DeviceOption = Annotated[Device, described(
    "where the bundle runs: cpu, cuda, tensorrt or tensorrt-rtx, with OpenVINO cpu, gpu, npu or auto; the second "
    "GPU is cuda:1", default="cpu", parser=Device.parse, metavar="KIND[:NUMBER]")]
Threads = Annotated[int, described("CPU threads, 0 being one for each core", default=0, least=0)]
GUIDANCE = "how strongly to follow the prompt; usual are 1 to 15; at 1 and below guidance is off and a step costs half"
Effort = Annotated[str, described("how much is compared, as --verify of `build`", default="auto",
                                  choices=("auto", "full", "quick", "components"))]


def generate_options() -> list[Option]:
    """The fields of a request, and what concerns the command alone."""
    from deploy.cli.generate import generate_options

    return generate_options()


@derived_command(app, generate_options)
def generate(given: dict[str, Any]) -> None:
    """Generate images with a bundle. Needs no PyTorch."""
    from deploy.cli.generate import generate

    generate(given)


@app.command()
def tradeoffs(
    bundle: BundlePath,
    images: Annotated[int, described("images that are generated with each setting", default=100, least=1)] = 100,
    device: DeviceOption = CPU,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Measure time and accuracy of fewer steps, caching and less guidance, for `generate --quality`."""
    from deploy.bench.tradeoffs import measure
    from deploy.cli import console
    from runtimes.bundle.folder import Bundle
    from runtimes.inputs import quality_presets as presets

    opened = Bundle.open(bundle)
    with console.shown_progress():
        measured = measure(opened, images=images, device=device, threads=threads)
    file = presets.save(opened.manifest.digest, measured)
    console.print_json(presets.summary(measured)) if json else console.show_tradeoffs(measured, file)


@app.command()
def verify(
    bundle: BundlePath,
    against: Annotated[str | None, described("source model, a folder or OWNER/NAME on the Hub",
                                             default="where the bundle was built from")] = None,
    effort: Effort = "auto",
    device: DeviceOption = CPU,
    json: Json = False,
) -> None:
    """Compare a bundle with its source in diffusers: weights, feeds, components, trajectories, images."""
    from deploy.building.verify import verify_bundle
    from deploy.cli import console

    with console.shown_progress():
        result = verify_bundle(bundle, against, device=device, effort=effort)
    console.print_json(result.to_json()) if json else console.show_verification(result)
    result.enforce()
    if result.unverified:
        raise UnavailableError("not everything could be executed here", where="; ".join(result.unverified),
                               fix="verify it where its runtime and device are")


@app.command()
def bench(
    bundles: BundlePaths,
    against: Annotated[str, described("measure PyTorch, too: torch, torch.compile, or both with a comma",
                                      default=None)] = "",
    rounds: Annotated[int, described("images of each bundle, in turns, that are timed", default=7, least=1)] = 7,
    steps: Annotated[int, described("denoising steps of an image", default=25, least=1)] = 25,
    guidance: Annotated[float, described(GUIDANCE, default=7.5)] = 7.5,
    batch: Annotated[str, described("images of one call, at least 1; several batches with commas: 1,2,4,8",
                                    default=1)] = "1",
    device: DeviceOption = CPU,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Measure bundles side by side: seconds, where they go, memory, cold start, distance from the machine's limits."""
    from deploy.bench.contest import BenchOptions, run_bench
    from deploy.cli import console
    from deploy.cli.bench_table import show_bench
    from deploy.core.spec import parse_numbers

    options = BenchOptions(tuple(a.strip() for a in against.split(",") if a.strip()), rounds, steps, guidance,
                           parse_numbers(batch, "--batch"), threads, device)
    with console.shown_progress():
        report = run_bench(bundles, options)
    console.print_json(report) if json else show_bench(report)


@app.command()
def report(
    bundles: BundlePaths,
    output: Annotated[Path, described("HTML file to write", "-o", "--output", default="report.html")]
    = Path("report.html"),
    bench: Annotated[Path | None, described("what `bench --json` printed, as a file: adds the bundles' seconds",
                                            default=None)] = None,
) -> None:
    """Write one page about bundles: passes, sizes, accuracy, images; several are set against each other."""
    from deploy.cli import console
    from deploy.report.page import report_bundles

    for missing in report_bundles(bundles, output, bench):
        console.say(missing)
    console.say(f"wrote {output}")


@app.command()
def diagnose(
    target: Annotated[str, typer.Argument(metavar="BUNDLE|MODEL", help="folder that `build` wrote, or a model")],
    image: Annotated[list[Path], described("image that the VAE is judged by; may be given again",
                                           default="images that the model generates")] = [],  # noqa: B006
    grid: Annotated[Path | None, described("PNG file to write: the image after each step", default=None)] = None,
    steps: Annotated[int, described("denoising steps of an image", default=20, least=2)] = 20,
    guidance: Annotated[float, described(GUIDANCE, default=5.0)] = 5.0,
    device: DeviceOption = CPU,
    json: Json = False,
) -> None:
    """Find what is wrong with images: VAE, U-Net without a prompt, response to text, guidance, in this order."""
    from deploy.cli import console
    from deploy.diagnose.run_checks import DiagnoseOptions, diagnose_pipeline

    options = DiagnoseOptions(tuple(image), steps, guidance, device)
    with console.shown_progress():
        found = diagnose_pipeline(target, options, grid)
    console.print_json(found.to_json()) if json else console.show_diagnosis(found)
    found.enforce()


@app.command()
def inspect(bundle: BundlePath, json: Json = False) -> None:
    """Show what is in a bundle: components, axes, passes, sizes, parity."""
    from deploy.cli import console
    from runtimes.bundle.folder import Bundle
    from runtimes.bundle.manifest import to_json

    opened = Bundle.open(bundle)
    console.print_json(to_json(opened.manifest)) if json else console.show_bundle(opened)


app.command()(file_commands.convert)
app.command("export-triton")(file_commands.export_triton)
derived_command(app, file_commands.kubernetes_options)(file_commands.export_kubernetes)
app.command()(machine_commands.doctor)
app.add_typer(machine_commands.app, name="cache")


def main() -> None:
    """Run the command line; every DeployError becomes one line and its exit code."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except DeployError as error:
        from deploy.cli.console import show_error

        show_error(error)
        sys.exit(error.exit_code)
    except SystemExit as stop:
        if stop.code == 130:  # what typer makes of Ctrl-C
            sys.stderr.write("interrupted; finished parts are kept and the next build goes on from them\n")
        raise
