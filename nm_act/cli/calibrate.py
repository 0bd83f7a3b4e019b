"""``nm-act calibrate``: computes the data of a recipe's mitigations from a text and writes a sparse checkpoint."""

import copy
import dataclasses
import os
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common
from . import options as opt

_STATE = "state"


def calibrate(
    model: opt.Model,
    recipe: Annotated[
        Path,
        typer.Option("--recipe", callback=opt.existing_recipe, help="Recipe (.yaml, .yml or .json) to calibrate."),
    ],
    data: Annotated[Path, typer.Option("--data", help='Text, .jsonl with "text" fields, or a folder of such files.')],
    output: Annotated[Path, typer.Option("--output", help="Folder for the result; a stopped run continues there.")],
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of text.")] = 256,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens per window.")] = 512,
    lr: Annotated[
        float | None, typer.Option("--lr", help="Learning rate of what is learned block by block; 1e-4 by default.")
    ] = None,
    epochs: Annotated[
        float | None, typer.Option("--epochs", help="Passes over the windows in each block; 1 by default.")
    ] = None,
    loss: Annotated[
        str | None, typer.Option("--loss", help="mse, the default, or relative: every token has the same weight.")
    ] = None,
    distill: Annotated[
        int,
        typer.Option("--distill", min=0, help="Steps of end-to-end training on the dense outputs, e.g. 256."),
    ] = 0,
    train: Annotated[
        str, typer.Option("--train", help="What --distill trains: learned data, weights (in the checkpoint), or both.")
    ] = "data",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the choice and the order of windows.")] = 0,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint/--no-checkpoint", help="Also write the whole model for from_pretrained.")
    ] = True,
    dtype: opt.Dtype = "auto",
    device: opt.Device = "cpu",
    threads: opt.Threads = None,
    as_json: opt.AsJson = False,
) -> None:
    """Calibrate a recipe's mitigations, decoder block by decoder block."""
    import torch

    from ..conversion.calibration import DATA_FILE, FACTS_FILE
    from ..conversion.fingerprint import weights_fingerprint
    from ..conversion.sparsify import sparsify
    from ..integrations.checkpoints import check_device
    from ..lab.calibrate import calibrate as run
    from ..lab.calibrate import save_calibration
    from ..lab.calibrate.data import read_texts, split_windows, windows_of
    from ..lab.calibrate.distill import distill as train_end_to_end
    from ..lab.calibrate.run import check_needed
    from ..lab.evaluate.perplexity import check_window
    from ..lab.evaluate.variants import resolved
    from ..lab.output import write_json
    from ..lab.overlap import KEY, fingerprints
    from ..methods.mitigations import data_of, learned_data_of
    from ..recipe import Recipe

    _check_output(output, model)
    chosen = Recipe.load(recipe)
    learning = {"--lr": lr, "--epochs": epochs, "--loss": loss}
    settings = _block_settings(learning, any(map(learned_data_of, resolved(chosen))), str(recipe), seed)
    end_to_end = _distill_settings(distill, train, checkpoint, seed)
    needed = any(map(data_of, resolved(chosen)))
    if end_to_end is None or end_to_end.train == "data":
        check_needed(resolved(chosen))
    check_device(device)
    common.set_threads(threads)
    texts = read_texts(data)
    config = common.load_config(model)
    check_window(config, length, "--length")
    common.check_not_sparse(config, model)
    dense, tokenizer = common.load(model, dtype, "cpu", config=config)
    ids = windows_of(tokenizer, texts, data, windows=windows, length=length, seed=seed)
    if len(ids) < windows:
        common.note(f"the text has {len(ids)} windows of {length} tokens, fewer than {windows}: all are used")
    used = ids
    if end_to_end is not None:
        ids, held_out = split_windows(ids)
    teacher = None if end_to_end is None else copy.deepcopy(dense)
    weights = weights_fingerprint(dense, torch.bfloat16)
    output.mkdir(parents=True, exist_ok=True)
    if needed:
        with common.progress_bar("calibrating") as update:
            report, history = run(
                dense, chosen, ids, settings=settings, device=device, state=output / _STATE, progress=update
            )
    else:
        report, history = sparsify(dense, chosen), []
    trained = {}
    if teacher is not None:
        with common.progress_bar("training end to end") as update:
            done = train_end_to_end(
                report.model.to(device),
                teacher.to(device),
                ids,
                held_out,
                end_to_end,
                lambda step, steps, loss: update(step, steps, f"loss {loss:.3g}"),
            )
        report.model.to("cpu")
        common.note(str(done))
        trained = {"end_to_end": dataclasses.asdict(end_to_end) | dataclasses.asdict(done)}
    facts = {
        "source": common.model_name(model),
        "weights": weights,
        "data": data.name,
        "windows": len(used),
        "length": length,
        **dataclasses.asdict(settings),
        "seconds": round(sum(block["seconds"] for block in history), 1),
        "environment": common.environment(),
        "recipe": chosen.to_dict(),
        "blocks": history,
        **trained,
    }
    _note_orders(report.model)
    if checkpoint:
        _save_checkpoint(report.model, tokenizer, output)
    write_json(output / FACTS_FILE, facts | {KEY: fingerprints(used)})
    if end_to_end is None or end_to_end.train == "data":
        save_calibration(report.model, output)
    shutil.rmtree(output / _STATE, ignore_errors=True)
    if as_json:
        common.print_json(facts)
        return
    print(report)
    if (output / DATA_FILE).exists():
        print(f"written to {output}: nm-act ppl {model} --calibration {output}")
    else:
        print(f"written to {output}, a checkpoint with its own weights: nm-act generate {output} PROMPT")


def _block_settings(options: dict[str, Any], learns: bool, recipe: str, seed: int) -> Any:
    """Settings of the training block by block; a ValueError for one of its options where nothing is trained so."""
    from ..lab.calibrate import CalibrationSettings

    given = {name: value for name, value in options.items() if value is not None}
    fields = {"--lr": "learning_rate", "--epochs": "epochs", "--loss": "loss"}
    settings = CalibrationSettings(**{fields[name]: value for name, value in given.items()}, seed=seed)
    if given and not learns:
        raise ValueError(
            f"expected {', '.join(given)} with a recipe that learns block by block (lpts, ls, ...), got {recipe!r}, "
            "which does not; leave it out"
        )
    return settings


def _distill_settings(steps: int, train: str, checkpoint: bool, seed: int) -> Any:
    """Settings of the end-to-end training; None if there is none."""
    from ..lab.calibrate.distill import DistillSettings

    if not steps:
        if train != "data":
            raise ValueError(f"expected --distill beside --train {train}, got none; add for example --distill 256")
        return None
    settings = DistillSettings(steps=steps, train=train, seed=seed)
    if train != "data" and not checkpoint:
        raise ValueError(
            f"expected a checkpoint for the weights that --train {train} changes, got --no-checkpoint; leave it out"
        )
    return settings


def _check_output(output: Path, model: str) -> None:
    """Raise a ValueError for a folder in which the result would replace files, such as those of the model."""
    from ..conversion.calibration import DATA_FILE
    from ..lab.output import RUN_FILE, check_output

    place, source = output.resolve(), Path(model).expanduser().resolve()
    if source in (place, *place.parents) and Path(model).expanduser().exists():
        raise ValueError(f"expected an output apart from the model, got {str(output)!r} in it; use another folder")
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"expected a folder for the result, but {str(nearest)!r} is a file; use another name")
    if (output / DATA_FILE).exists():
        raise ValueError(f"expected a folder without a finished calibration, got {str(output)!r}; use another")
    # A run that stopped may have left a part of its checkpoint beside its state.
    check_output(output, f"{_STATE}/{RUN_FILE}", _STATE)


def _note_orders(model: Any) -> None:
    from ..conversion.calibration import is_reordered
    from ..layers.linear import sparse_layers

    layers = [each for each in sparse_layers(model).values() if "input_order" in each.data()]
    if layers and not any(map(is_reordered, layers)):
        common.note(
            "permute reorders nothing here: only down_proj and o_proj have layers in front to fold an order into"
        )


def _save_checkpoint(model: Any, tokenizer: Any, output: Path) -> None:
    """Write into the state's folder, then move; the configuration last, so that the output is no checkpoint before."""
    from ..integrations.checkpoints import save_model

    folder = output / _STATE / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    save_model(model, tokenizer, folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
