"""The command line: arguments and exit codes only. What a command does lives in the module it calls."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.cli import file_commands, machine_commands
from runtimes.errors import DeployError, InputError, UnavailableError
from runtimes.system.device import CPU, Device

app = typer.Typer(
    name="ldm-deploy",
    help="Compile a trained latent diffusion model into a bundle that runs without PyTorch, and prove its accuracy.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of text")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="folder that `build` wrote")]
DeviceOption = Annotated[Device, typer.Option(
    parser=Device.parse, metavar="KIND[:NUMBER]",
    help="cpu, cuda, tensorrt, tensorrt-rtx; OpenVINO: cpu, gpu, npu, auto; the second GPU is cuda:1")]
Threads = Annotated[int, typer.Option(min=0, help="CPU threads; 0 = all cores")]
Hint = Annotated[str, typer.Option(help="OpenVINO: latency (a call has all cores) or throughput (calls share them)")]
PinThreads = Annotated[bool, typer.Option("--pin-threads", help="keep each CPU thread on a core of its own")]
Shapes = Annotated[list[str], typer.Option(help="axis=min:opt:max, several with commas: batch=1:2:8,height=...")]
Target = Annotated[str, typer.Option(help="onnxruntime, openvino, tensorrt, tensorrt-rtx; auto: faster on this CPU")]
Keep = Annotated[list[str], typer.Option(help="pattern of node names or op types that stay in float32")]
Quantization = Annotated[str, typer.Option(help="int8 recipe: hybrid, static, dynamic or weight-only")]
TextEncoderBits = Annotated[int | None, typer.Option(help="8 or 4: of text encoders' weights in integer builds")]
Methods = Annotated[list[str], typer.Option(help="split-skips, smoothquant, bias-correction: lose less in 8 bits")]
CalibrationPrompts = Annotated[Path | None, typer.Option(help="prompts that ranges are found with, one a line")]
CalibrationSamples = Annotated[int | None, typer.Option(help="U-Net calls that ranges are found from")]
RangeEstimator = Annotated[str, typer.Option(help="minmax, percentile, mse or entropy")]
Lora = Annotated[list[str], typer.Option(help="LoRA, FILE or FILE:SCALE; may come again")]
EngineOptions = Annotated[list[str], typer.Option(help="TensorRT builder: capabilities=SM86+SM89, static=true, …")]
Prune = Annotated[str, typer.Option(help="share of the U-Net's channels to remove; of 0.5,0.3 the most within budget")]
PruneVae = Annotated[float, typer.Option(help="share of the autoencoder's channels to remove: 0.25")]
PruneMethod = Annotated[str, typer.Option(help="what a channel's importance is: taylor, l1 or l2")]
PruneWidths = Annotated[str, typer.Option(help="levels lose the same share (uniform) or what they bear (sensitivity)")]
PruneBlocks = Annotated[str, typer.Option(help="whole blocks to remove, BK-SDM's base, small or tiny")]
Mask = Annotated[str, typer.Option(help="weights to zero, no shape changes: textbook or 2:4")]
Recover = Annotated[int, typer.Option(help="steps of distillation from the original after pruning")]
RecoverPrompts = Annotated[Path | None, typer.Option(help="file with one prompt a line to distil on")]
BudgetOptions = Annotated[list[str], typer.Option(help="override an accuracy limit: image_psnr_db=40")]
Verify = Annotated[str, typer.Option(help="compare with PyTorch: full, quick (4 steps of an image), components, no; "
                                          "auto: full where that takes a minute or two, else quick")]
NoVerify = Annotated[bool, typer.Option("--no-verify", help="the same as --verify no")]
Variant = Annotated[str, typer.Option(help="of the weight files: fp16 reads *.fp16.safetensors where there are such")]
Revision = Annotated[str, typer.Option(help="of a MODEL on the Hub: a branch, a tag or a commit; default main")]
OutputPng = Annotated[Path, typer.Option("-o", "--output", help="PNG file; several images get numbered names")]
Against = Annotated[str | None, typer.Option(help="the source model; default: where the bundle was built from")]
ModelArgument = Annotated[str, typer.Argument(help="folder in diffusers layout, or OWNER/NAME on the Hugging Face Hub; "
                                                    "default: the model that ships with us")]


@app.command()
def build(
    model: ModelArgument = "",
    variant: Variant = "",
    revision: Revision = "",
    target: Target = "",
    precision: Annotated[str, typer.Option(help="fp32, fp16, bf16, int8 or auto")] = "",
    shapes: Shapes = [],  # noqa: B006
    lora: Lora = [],  # noqa: B006
    lora_mode: Annotated[str, typer.Option(help="merge, or swap: for `generate --lora` to put others in place")] = "",
    embedding: Annotated[list[str], typer.Option(help="textual inversion, FILE or FILE:TOKEN; may come again")] = [],  # noqa: B006
    vae: Annotated[str, typer.Option(help="folder of an autoencoder in place of the model's own")] = "",
    keep: Keep = [],  # noqa: B006
    quantization: Quantization = "",
    text_encoder_bits: TextEncoderBits = None,
    quantization_methods: Methods = [],  # noqa: B006
    calibration_prompts: CalibrationPrompts = None,
    calibration_samples: CalibrationSamples = None,
    range_estimator: RangeEstimator = "",
    device: Annotated[str, typer.Option(help="of onnxruntime, what the bundle will run on: cpu (default), cuda, "
                                             "tensorrt; on GPUs fp16 computes in float16")] = "",
    cpu: Annotated[str, typer.Option(help="that INT8 is for: auto (this one), vnni, avx2")] = "",
    engine: EngineOptions = [],  # noqa: B006
    step_cache: Annotated[bool, typer.Option("--step-cache", help="a second U-Net graph, for generate "
                                                                  "--cache-interval")] = False,
    safety_checker: Annotated[bool, typer.Option("--safety-checker", help="export the model's own too")] = False,
    prune: Prune = "",
    prune_vae: PruneVae = 0.0,
    prune_method: PruneMethod = "",
    prune_widths: PruneWidths = "",
    prune_blocks: PruneBlocks = "",
    mask: Mask = "",
    recover: Recover = 0,
    recover_prompts: RecoverPrompts = None,
    spec: Annotated[Path | None, typer.Option(help="YAML file with these options; those given here win")] = None,
    budget: BudgetOptions = [],  # noqa: B006
    verify: Verify = "",
    no_verify: NoVerify = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be done, do nothing")] = False,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="default: build/MODEL-TARGET-PRECISION")] = None,
) -> None:
    """Build a bundle: load, export, optimize, and prove it equal to PyTorch."""
    from deploy.building.choose import plan_build, run_build
    from deploy.cli import console
    from deploy.core.pruning_options import given_options
    from deploy.core.spec import covering, make_spec, parse_budget, parse_engine, parse_shapes

    options: dict[str, Any] = {k: v for k, v in (
        ("model", model), ("target", target), ("precision", precision), ("quantization", quantization),
        ("range_estimator", range_estimator), ("step_cache", step_cache), ("lora_mode", lora_mode),
        ("safety_checker", safety_checker), ("device", device), ("cpu", cpu), ("variant", variant),
        ("revision", revision)) if v}
    options |= {name: number for name, number in (("text_encoder_bits", text_encoder_bits),
                                                  ("calibration_samples", calibration_samples)) if number is not None}
    if quantization_methods:
        options["quantization_methods"] = tuple(quantization_methods)
    if calibration_prompts is not None:
        from calibration.trajectory.prompts import read_prompts

        options["calibration_prompts"] = read_prompts(calibration_prompts)
    options |= {name: files for name, files in (("lora", tuple(lora)), ("embedding", tuple(embedding)),
                                                ("vae", vae)) if files}
    options |= given_options(prune, prune_vae, prune_method, prune_widths, prune_blocks, mask, recover, recover_prompts)
    if shapes:
        profiles = parse_shapes(shapes)
        options["shapes"] = covering(profiles)
        if len(profiles) > 1:
            options["profiles"] = profiles
    if keep:
        options["keep"] = tuple(keep)
    if engine:
        options["engine"] = parse_engine(engine)
    if budget:
        options["budget"] = parse_budget(budget)
    if verify and no_verify:
        raise InputError("both --verify and --no-verify are given", where="build", fix="give one of them")
    if verify or no_verify:
        options["verify"] = "no" if no_verify else verify
    build_spec = make_spec(options, spec)
    if dry_run:
        console.show_plan(plan_build(build_spec), build_spec, output)
        return
    with console.BuildProgress() as progress:
        outcome = run_build(build_spec, output, progress=progress)
    console.show_outcome(outcome)


@app.command("prune")
def prune_model(
    model: ModelArgument = "",
    prune: Prune = "",
    prune_vae: PruneVae = 0.0,
    prune_method: PruneMethod = "",
    prune_widths: PruneWidths = "",
    prune_blocks: PruneBlocks = "",
    mask: Mask = "",
    recover: Recover = 0,
    recover_prompts: RecoverPrompts = None,
    budget: BudgetOptions = [],  # noqa: B006
    verify: Verify = "auto",
    no_verify: NoVerify = False,
    output: Annotated[Path, typer.Option("-o", "--output", help="folder in diffusers layout")] = Path("pruned"),
) -> None:
    """Write a smaller model as a diffusers folder."""
    from deploy.building.prune_folder import prune_folder
    from deploy.cli import console
    from deploy.core.pruning_options import given_options
    from deploy.core.spec import make_spec, parse_budget

    options = given_options(prune, prune_vae, prune_method, prune_widths, prune_blocks, mask, recover, recover_prompts)
    options |= {"model": model} if model else {}
    options |= {"budget": parse_budget(budget), "verify": "no" if no_verify else verify}
    with console.BuildProgress() as progress:
        components = prune_folder(make_spec(options), output, progress=progress)
    console.show_pruned(components, output)


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
    images: Annotated[int, typer.Option(min=1, help="generated with each setting")] = 100,
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
    with console.BuildProgress() as progress:
        measured = measure(opened, images=images, device=device, threads=threads, progress=progress.working)
    file = presets.save(opened.manifest.digest, measured)
    console.print_json(presets.summary(measured)) if json else console.show_tradeoffs(measured, file)


@app.command()
def verify(
    bundle: BundlePath,
    against: Against = None,
    effort: Annotated[str, typer.Option(help="auto, full, quick or components; as --verify of `build`")] = "auto",
    device: DeviceOption = CPU,
    json: Json = False,
) -> None:
    """Compare a bundle with its PyTorch source at component, trajectory and image level."""
    from deploy.building.verify import verify_bundle
    from deploy.cli import console

    result = verify_bundle(bundle, against, device=device, effort=effort)
    console.print_json(result.to_json()) if json else console.show_verification(result)
    result.enforce()
    if result.unverified:
        raise UnavailableError("not everything could be executed here", where="; ".join(result.unverified),
                               fix="verify it where its runtime and device are")


@app.command()
def bench(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="folders that `build` wrote")],
    against: Annotated[str, typer.Option(help="also measure PyTorch: torch,torch.compile")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="interleaved images of each that count")] = 7,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 25,
    guidance: Annotated[float, typer.Option(help="guidance_scale")] = 7.5,
    batch: Annotated[str, typer.Option(help="images at once, several with commas: 1,2,4,8")] = "1",
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
    report = run_bench(bundles, options, console.say)
    console.print_json(report) if json else show_bench(report)


@app.command()
def report(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="folders that `build` wrote")],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file")] = Path("report.html"),
    bench: Annotated[Path | None, typer.Option(help="what `bench --json` printed: adds the bundles' seconds")] = None,
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
    image: Annotated[list[Path], typer.Option(help="image to judge the VAE by; may come again")] = [],  # noqa: B006
    grid: Annotated[Path | None, typer.Option(help="PNG: how images come about along the denoising")] = None,
    steps: Annotated[int, typer.Option(min=2, help="denoising steps")] = 20,
    guidance: Annotated[float, typer.Option(help="guidance_scale")] = 5.0,
    device: DeviceOption = CPU,
    json: Json = False,
) -> None:
    """Find what is wrong with images: VAE, U-Net without a prompt, response to text, guidance, in this order."""
    from deploy.cli import console
    from deploy.diagnose.run_checks import DiagnoseOptions, diagnose_pipeline

    options = DiagnoseOptions(tuple(image), steps, guidance, device)
    found = diagnose_pipeline(target, options, grid, console.say)
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
