"""The command line: each command imports its recipe only when it runs, so that `samlet --help` answers at once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperCommand

from samlet import __version__
from samlet.errors import SamletError

app = typer.Typer(
    name="samlet",
    help="Distil a Segment-Anything teacher into a MobileSAM that is good on your own images.",
    epilog="A day with samlet: check-data my_images/, train my.yaml, evaluate runs/my my_images/",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Format = Annotated[
    Literal["auto", "mask_folders", "instance_labels", "coco", "sa1b"],
    typer.Option(help="How masks are written; auto finds out and says so."),
]
ImageSize = Annotated[
    int | None, typer.Option(help="Input size of the models; by default what their files say, else 1024.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a CUDA GPU where there is one.")]


def main() -> None:
    """Run a command; what the user can mend is one sentence and exit code 2."""
    try:
        app()
    except SamletError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _samlet(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)] = False,
) -> None:
    """Distil a Segment-Anything teacher into a MobileSAM that is good on your own images."""


@app.command("check-data", epilog="Example: samlet check-data my_images/ --sheet sheet.png")
def check_data(
    path: Annotated[Path, typer.Argument(help="A data set: a folder with splits, or one split.")],
    format: Format = "auto",
    sheet: Annotated[Path | None, typer.Option(help="Where the contact sheet goes.")] = None,
    json: Annotated[Path | None, typer.Option(help="Where the whole report goes as JSON.")] = None,
    image_size: Annotated[int, typer.Option(min=32, help="Input size that tiny objects are judged by.")] = 1024,
    unlabelled: Annotated[
        Literal["refuse", "use", "drop"], typer.Option(help="What training would do with images without masks.")
    ] = "refuse",
) -> None:
    """Say what is in a data set, draw a contact sheet, and exit 2 on what training would refuse."""
    from samlet.recipes.check_data import check_data

    raise typer.Exit(
        check_data(path, format=format, sheet=sheet, json=json, image_size=image_size, unlabelled=unlabelled)
    )


@app.command(epilog="Example: samlet train my.yaml training.max_steps=100")
def train(
    config: Annotated[Path, typer.Argument(help="YAML or JSON file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, laid over the file.")] = None,
) -> None:
    """Train and distil; the same command goes on where it was stopped."""
    from samlet.config import RunConfig
    from samlet.schema import load_config

    checked = load_config(RunConfig, config, overrides or ())
    from samlet.recipes.train import train

    raise typer.Exit(train(checked))


@app.command(epilog="Example: samlet extract my.yaml extraction.dtype=int8 --processes 2")
def extract(
    config: Annotated[Path, typer.Argument(help="YAML or JSON file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, laid over the file.")] = None,
    processes: Annotated[int, typer.Option(min=1, help="At work at once; the GPUs are shared out.")] = 1,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each process; equal threads give equal bytes.")] = None,
    engine: Annotated[Literal["local", "ray"], typer.Option(help="Who starts the processes.")] = "local",
    store: Annotated[
        Path | None, typer.Option(help="The folder of a single teacher's store, where it is not called by its name.")
    ] = None,
) -> None:
    """Compute the teachers' features ahead of time; the same command goes on, and adds what is new."""
    from samlet.config import RunConfig
    from samlet.schema import load_config

    checked = load_config(RunConfig, config, overrides or ())
    from samlet.recipes.extract import extract

    raise typer.Exit(extract(checked, engine=engine, processes=processes, threads=threads, store=store))


@app.command(epilog="Example: samlet doctor my.yaml dataset.root=my_images/ --json")
def doctor(
    config: Annotated[Path, typer.Argument(help="YAML or JSON file.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key.path=value, laid over the file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the whole report as JSON.")] = False,
) -> None:
    """Look at a run on two steps: terms, gradients, times, memory, how long it will be; exit 2 on what is off."""
    from samlet.config import RunConfig
    from samlet.schema import load_config

    checked = load_config(RunConfig, config, overrides or ())
    from samlet.recipes.doctor import doctor

    raise typer.Exit(doctor(checked, as_json=json))


@app.command(epilog="Example: samlet evaluate before=weights/mobile_sam.pt runs/my my_images/ --split val")
def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help="Weights, runs or folders; name=path names one.")],
    data: Annotated[Path, typer.Argument(help="The data set.")],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    format: Format = "auto",
    image_size: ImageSize = None,
    out: Annotated[Path | None, typer.Option(help="Folder for evaluate.json and evaluate.md.")] = None,
    max_images: Annotated[int | None, typer.Option(min=1, help="Only the first n images.")] = None,
    device: Device = "auto",
    everything: Annotated[
        bool,
        typer.Option("--everything", help="Automatic masks in place of prompts: AR, AP, boundary AP, calibration."),
    ] = False,
    points_per_side: Annotated[
        int | None, typer.Option(min=1, help="With --everything: points along each side; by default as tuned, else 32.")
    ] = None,
    pred_iou_thresh: Annotated[
        float | None, typer.Option(max=1, help="With --everything: keep masks that the model trusts more than this.")
    ] = None,
    stability_thresh: Annotated[
        float | None, typer.Option(max=1, help="With --everything: keep masks that are at least this stable.")
    ] = None,
    fast: Annotated[
        bool | None, typer.Option("--fast/--plain", help="With --everything: coarse points first, or all of them.")
    ] = None,
) -> None:
    """Measure mIoU and mDice at the original resolution, or automatic masks, several checkpoints side by side."""
    settings: dict[str, Any] = {
        "points_per_side": points_per_side,
        "pred_iou_thresh": pred_iou_thresh,
        "stability_score_thresh": stability_thresh,
        "fast": fast,
    }
    where: dict[str, Any] = {"split": split, "format": format, "image_size": image_size, "out": out}
    where |= {"device": device, "max_images": max_images}
    if everything:
        from samlet.recipes.evaluate_everything import evaluate_everything

        evaluate_everything(checkpoints, data, **where, **settings)
        return
    if any(value is not None for value in settings.values()):
        raise SamletError("points, thresholds and --fast/--plain are of automatic masks: add --everything")
    from samlet.recipes.evaluate import evaluate

    evaluate(checkpoints, data, **where)


@app.command("tune-amg", epilog="Example: samlet tune-amg runs/my my_images/ --metric f1")
def tune_amg(
    checkpoint: Annotated[str, typer.Argument(help="Weights, run or folder.")],
    data: Annotated[Path, typer.Argument(help="The data set.")],
    split: Annotated[str, typer.Option(help="Split of the data set.")] = "val",
    metric: Annotated[
        Literal["f1", "ar"], typer.Option(help="f1: few wrong masks and few missed objects; ar: recall alone.")
    ] = "f1",
    points_per_side: Annotated[
        int | None, typer.Option(min=1, help="Points along each side of the grid; by default 32.")
    ] = None,
    format: Format = "auto",
    image_size: ImageSize = None,
    max_images: Annotated[int | None, typer.Option(min=1, help="Only the first n images.")] = None,
    device: Device = "auto",
) -> None:
    """Find the thresholds of automatic masks that suit a checkpoint, and leave them beside it as amg.json."""
    from samlet.recipes.tune_amg import tune_amg

    tune_amg(
        checkpoint,
        data,
        split=split,
        metric=metric,
        points_per_side=points_per_side,
        format=format,
        image_size=image_size,
        max_images=max_images,
        device=device,
    )


class _Lists(TyperCommand):
    """Takes `--points 0 0.5 1` for what the parser underneath only knows as `--points 0 --points 0.5 --points 1`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeat the option before each number that follows it."""
        spelled, option = list[str](), ""
        for word in args:
            if word == "--points":
                option = word
            elif option and _is_number(word):
                spelled += [option, word]
            else:
                spelled.append(word)
                option = ""
        return super().parse_args(ctx, spelled)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


@app.command(
    cls=_Lists,
    epilog="Example: samlet interpolate weights/mobile_sam.pt runs/my --data my.yaml --out runs/mixed --points 0 0.5 1",
)
def interpolate(
    base: Annotated[Path, typer.Argument(help="The model before fine-tuning: weights, run or folder.")],
    tuned: Annotated[Path, typer.Argument(help="The model that was trained from it.")],
    data: Annotated[Path, typer.Option(help="The data set, or a run's configuration: its validation images.")],
    out: Annotated[Path, typer.Option(help="Folder for the chosen student, curve.png and interpolation.json.")],
    points: Annotated[
        list[float] | None,
        typer.Option(
            metavar="A B ...",
            help="Shares of the tuned model to measure, from 0 to 1 with spaces between; by default 0 0.25 0.5 0.75 1.",
        ),
    ] = None,
    retention: Annotated[
        Path | None, typer.Option(help="A data set or configuration of what should not be forgotten.")
    ] = None,
    max_retention_drop: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Most that retention may lose against the base; 0.02: two points."),
    ] = None,
    metric: Annotated[
        Literal["mean_miou", "point_miou", "box_miou"], typer.Option(help="What the chosen point is best at.")
    ] = "mean_miou",
    split: Annotated[str | None, typer.Option(help="Split of the data set; val by default.")] = None,
    format: Format = "auto",
    image_size: ImageSize = None,
    max_images: Annotated[int | None, typer.Option(min=1, help="Only the first n images of each set.")] = None,
    device: Device = "auto",
) -> None:
    """Mix a fine-tuned model with its base (WiSE-FT), measure the mixtures, and keep the best."""
    from samlet.recipes.interpolate import DEFAULT_POINTS, interpolate

    interpolate(
        base,
        tuned,
        data=data,
        out=out,
        points=points or DEFAULT_POINTS,
        retention=retention,
        metric=metric,
        max_retention_drop=max_retention_drop,
        split=split,
        format=format,
        image_size=image_size,
        max_images=max_images,
        device=device,
    )


@app.command(epilog="Example: samlet predict runs/my photo.jpg --point 320,240 --point 20,30,0 --out mask.png")
def predict(
    checkpoint: Annotated[str, typer.Argument(help="Weights, run or folder.")],
    image: Annotated[Path, typer.Argument(help="An image.")],
    point: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X,Y[,0]",
            help="A click in image pixels; ,0 where it does not belong to the object. Once for each click.",
        ),
    ] = None,
    box: Annotated[
        str | None, typer.Option(metavar="X0,Y0,X1,Y1", help="Top left and bottom right corner in image pixels.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The mask, 0 and 255, at the image's size.")] = Path("mask.png"),
    overlay: Annotated[Path | None, typer.Option(help="The image with prompt and mask drawn in.")] = None,
    image_size: ImageSize = None,
    device: Device = "auto",
) -> None:
    """Segment what the clicks and the box point at."""
    from samlet.recipes.predict import predict

    predict(
        checkpoint, image, points=point or (), box=box, out=out, overlay=overlay, image_size=image_size, device=device
    )


@app.command(epilog="Example: samlet masks runs/my photos/ --out masks/")
def masks(
    checkpoint: Annotated[str, typer.Argument(help="Weights, run or folder.")],
    images: Annotated[Path, typer.Argument(help="An image, or a folder of images.")],
    out: Annotated[Path, typer.Option(help="Folder for masks.json (COCO), label PNGs and overlays.")],
    points_per_side: Annotated[
        int | None, typer.Option(min=1, help="Points along each side of the grid; as tuned, else 32.")
    ] = None,
    pred_iou_thresh: Annotated[
        float | None, typer.Option(max=1, help="Masks stay that the model rates above it; as tuned, else 0.88.")
    ] = None,
    stability_thresh: Annotated[
        float | None, typer.Option(max=1, help="Masks stay that are as stable; as tuned, else 0.95.")
    ] = None,
    crop_layers: Annotated[
        int | None, typer.Option(min=0, help="Look again at 4, 16, ... crops, for small objects.")
    ] = None,
    min_area: Annotated[int | None, typer.Option(min=0, help="Fill holes and drop islands of fewer pixels.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Every point, as SAM does it, in place of the fast search.")
    ] = False,
    overlays: Annotated[bool, typer.Option("--overlays/--no-overlays", help="Draw the masks over the images.")] = True,
    image_size: ImageSize = None,
    device: Device = "auto",
) -> None:
    """Segment everything on images; the same command goes on where it was stopped."""
    from samlet.recipes.masks import masks

    asked = {
        "points_per_side": points_per_side,
        "pred_iou_thresh": pred_iou_thresh,
        "stability_score_thresh": stability_thresh,
        "crop_n_layers": crop_layers,
        "min_mask_region_area": min_area,
    }
    code = masks(
        checkpoint,
        images,
        out=out,
        thresholds={name: value for name, value in asked.items() if value is not None},
        plain=plain,
        overlays=overlays,
        image_size=image_size,
        device=device,
    )
    raise typer.Exit(code)


@app.command(epilog="Example: samlet schema --out schema.json")
def schema(
    out: Annotated[Path | None, typer.Option(help="File to write; by default the terminal.")] = None,
) -> None:
    """Write the JSON schema of the configuration, for editors."""
    import json

    from samlet.artefacts import write_text
    from samlet.config import RunConfig
    from samlet.schema import json_schema

    text = json.dumps(json_schema(RunConfig), indent=2) + "\n"
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)


stores = typer.Typer(
    help="Look after stored teacher features.",
    epilog="Example: samlet store info stores/SAM-H",
    no_args_is_help=True,
)
app.add_typer(stores, name="store")
StorePath = Annotated[Path, typer.Argument(help="The store: a folder with manifest.json.")]


@stores.command("info", epilog="Example: samlet store info stores/SAM-H")
def store_info(path: StorePath) -> None:
    """Say of what a store's features are, and how far each split is."""
    from samlet.recipes.store import info

    raise typer.Exit(info(path))


@stores.command("verify", epilog="Example: samlet store verify stores/SAM-H --repair")
def store_verify(
    path: StorePath,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair", help="Drop what is damaged, so that extracting again computes it; nobody else may be writing."
        ),
    ] = False,
) -> None:
    """Look at every byte of a store; exit 2 if anything is wrong or unfinished."""
    from samlet.recipes.store import verify

    raise typer.Exit(verify(path, repair_it=repair))


@stores.command("convert", epilog="Example: samlet store convert stores/SAM-H stores/small --dtype int8 --pack")
def store_convert(
    path: StorePath,
    out: Annotated[Path, typer.Argument(help="Folder of the new store.")],
    dtype: Annotated[
        Literal["fp32", "fp16", "int8"] | None, typer.Option(help="Coarser than before, or the same.")
    ] = None,
    pack: Annotated[bool | None, typer.Option("--pack/--no-pack", help="One file a shard, or .npy files.")] = None,
) -> None:
    """Write a store anew in another dtype or form; the same command goes on where it was stopped."""
    from samlet.recipes.store import convert

    raise typer.Exit(convert(path, out, dtype=dtype, pack=pack))


@stores.command("du", epilog="Example: samlet store du stores/SAM-H")
def store_du(path: StorePath) -> None:
    """Say what a store takes on disk, by split and feature."""
    from samlet.recipes.store import du

    raise typer.Exit(du(path))
