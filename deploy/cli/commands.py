"""The command line: arguments and exit codes only. What a command does lives in the module it calls."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from deploy.cli import build_commands, file_commands, machine_commands
from deploy.cli.derived_options import derived_command, described
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

BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="folder that `build` wrote")]
BundlePaths = Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="folders that `build` wrote")]
DeviceOption = Annotated[Device, described(
    "where the bundle runs: cpu, cuda, tensorrt or tensorrt-rtx, with OpenVINO cpu, gpu, npu or auto; the second "
    "GPU is cuda:1", default="cpu", parser=Device.parse, metavar="KIND[:NUMBER]")]
Threads = Annotated[int, described("CPU threads, 0 being one for each core", default=0, least=0)]
Hint = Annotated[str, described("how OpenVINO shares the cores: each call has all of them, or calls run side by side",
                                default="latency", choices=("latency", "throughput"))]
PinThreads = Annotated[bool, described("bind each CPU thread to one core", "--pin-threads", default=False)]
Lora = Annotated[list[str], described("LoRA in place of the bundle's, FILE or FILE:SCALE, of a bundle built with "
                                      "--lora-mode swap; may be given again", default=None)]
OutputPng = Annotated[Path, described("PNG file; several images get numbered names", "-o", "--output",
                                      default="out.png")]
GUIDANCE = "guidance scale, the weight of the prompt; usual are 1 to 15, 1 being without guidance"
Effort = Annotated[str, described("how much is compared, as --verify of `build`", default="auto",
                                  choices=("auto", "full", "quick", "components"))]


@app.command()
def generate(
    bundle: BundlePath,
    prompt: Annotated[list[str], typer.Argument(help="what to generate")] = [],  # noqa: B006
    prompts: Annotated[Path | None, typer.Option(help="file with one prompt a line, instead of PROMPT")] = None,
    negative: Annotated[str | None, typer.Option(help="what not to generate")] = None,
    image: Annotated[Path | None, typer.Option(help="start from this image (image-to-image)")] = None,
    mask: Annotated[Path | None, typer.Option(help="white where the image is painted anew (inpainting)")] = None,
    strength: Annotated[float | None, typer.Option(help="how far to leave the image, above 0 to 1; default the "
                                                        "model's: 0.8, of XL 0.3, with --mask 1")] = None,
    steps: Annotated[int | None, typer.Option(help="denoising steps; default 25")] = None,
    quality: Annotated[str, typer.Option(help="draft, balanced or high: what `tradeoffs` measured of the bundle; "
                                              "options that are given win")] = "",
    budget_ms: Annotated[float | None, typer.Option(help="the most accurate that takes so long for an image, as "
                                                         "`tradeoffs` measured")] = None,
    guidance: Annotated[float | None, typer.Option(help="guidance_scale, 1 is off; default the model's: 7.5, of XL "
                                                        "5")] = None,
    guidance_rescale: Annotated[float, typer.Option(help="against overexposure, 0 to 1")] = 0.0,
    guidance_interval: Annotated[str, typer.Option(help="share of the steps under guidance, as first:last")] = "",
    part: Annotated[str, typer.Option(help="of the schedule: 0:0.8 for a base model, 0.8:1 for a refiner")] = "0:1",
    weighting: Annotated[bool, typer.Option("--weighting", help="weigh (word:1.3), (word), \\[word]")] = False,
    long_prompts: Annotated[bool, typer.Option("--long-prompts", help="read long prompts in windows, do not cut")]
    = False,
    cache_interval: Annotated[int | None, typer.Option(help="compute the U-Net's deep layers every so many steps; "
                                                            "needs a bundle built with --step-cache")] = None,
    seed: Annotated[int, typer.Option(help="the first image's seed, as PyTorch's; the next ones count up")] = 0,
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="images for each prompt")] = 1,
    scheduler: Annotated[str | None, typer.Option(
        help="sampling method, by default the model's: ddim, ddpm, euler, euler-ancestral, heun, kdpm2, "
             "kdpm2-ancestral, lms, dpm++, dpm-single, dpm-sde, deis, unipc, sa-solver, lcm, tcd, pndm, "
             "edm-euler or edm-dpm++")] = None,
    height: Annotated[int | None, typer.Option(help="pixels")] = None,
    width: Annotated[int | None, typer.Option(help="pixels")] = None,
    aspect: Annotated[str, typer.Option(help="width:height, as 16:9; the bundle's nearest size")] = "",
    memory_budget: Annotated[str, typer.Option(help="as 2GB: as many images at once as fit")] = "",
    tile: Annotated[int | None, typer.Option(help="generate in overlapping tiles of so many pixels, for large images")]
    = None,
    latents: Annotated[Path | None, typer.Option(help="initial latents, .npy float32 (B, C, H/f, W/f)")] = None,
    save_latents: Annotated[Path | None, typer.Option(help="write the final latents as .npy")] = None,
    safety: Annotated[str, typer.Option(help="the bundle's safety checker: off, report, or replace by black")] = "off",
    grid: Annotated[int, typer.Option(min=0, help="write one sheet with this many columns")] = 0,
    preview: Annotated[Path | None, typer.Option(help="PNG rewritten after each step: what will come of it")] = None,
    metadata: Annotated[bool, typer.Option("--metadata/--no-metadata", help="prompt, seed and bundle hash in the PNG")]
    = True,
    lora: Lora = [],  # noqa: B006
    device: DeviceOption = CPU,
    threads: Threads = 0,
    hint: Hint = "latency",
    pin_threads: PinThreads = False,
    check: Annotated[bool, typer.Option("--check", help="hash large files again that nobody wrote to since")] = False,
    output: OutputPng = Path("out.png"),
) -> None:
    """Generate images with a bundle. Needs no PyTorch."""
    from deploy.cli.generate import GenerateRequest, generate_files

    generate_files(
        GenerateRequest(
            bundle=bundle, prompts=tuple(prompt), prompts_file=prompts, negative=negative, image=image, mask=mask,
            strength=strength, steps=steps, quality=quality, budget_ms=budget_ms, guidance_scale=guidance,
            guidance_rescale=guidance_rescale, guidance_interval=guidance_interval, part=part, weighting=weighting,
            long_prompts=long_prompts, cache_interval=cache_interval, seed=seed, count=count, scheduler=scheduler,
            height=height, width=width, aspect=aspect, memory_budget=memory_budget, tile=tile, latents=latents,
            save_latents=save_latents, safety=safety, grid=grid, preview=preview, metadata=metadata,
            device=device, threads=threads, hint=hint, pin_threads=pin_threads, check=check,
            lora=tuple(lora), output=output,
        )
    )


@app.command()
def tradeoffs(
    bundle: BundlePath,
    images: Annotated[int, described("images that are generated with each setting", default=100, least=1)] = 100,
    device: DeviceOption = CPU,
    threads: Threads = 0,
    json: Json = False,
) -> None:
    """Measure what few steps, cached features and less guidance gain and cost; `generate --quality` follows it."""
    from deploy.bench import presets
    from deploy.bench.tradeoffs import measure
    from deploy.cli import console
    from runtimes.bundle.folder import Bundle

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
    """Compare a bundle with its PyTorch source at component, trajectory and image level."""
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
