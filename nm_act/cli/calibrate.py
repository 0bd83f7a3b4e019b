"""``nm-act calibrate``: the data that a recipe's mitigations need, from a text; the result is a sparse checkpoint."""

import os
import shutil
from pathlib import Path
from typing import Annotated

import typer

from .common import (
    environment,
    load,
    load_config,
    load_recipe,
    model_name,
    note,
    print_json,
    progress_bar,
    set_threads,
    to_json,
)
from .ppl import DeviceOption, DtypeOption, JsonOption, ModelArgument, ThreadsOption

_STATE = "state"


def calibrate(
    model: ModelArgument,
    recipe: Annotated[Path, typer.Option("--recipe", help="Recipe (.yaml, .yml or .json) to calibrate.")],
    data: Annotated[Path, typer.Option("--data", help='Text, .jsonl with "text" fields, or a folder of such files.')],
    output: Annotated[Path, typer.Option("--output", help="Folder for the result; a killed run is taken up there.")],
    windows: Annotated[int, typer.Option("--windows", min=1, help="Windows of text.")] = 256,
    length: Annotated[int, typer.Option("--length", min=2, help="Tokens per window.")] = 512,
    lr: Annotated[float, typer.Option("--lr", help="Learning rate of what is learned.")] = 1e-4,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the windows in each block.")] = 1.0,
    loss: Annotated[str, typer.Option("--loss", help="mse, or relative: every token alike.")] = "mse",
    seed: Annotated[int, typer.Option("--seed", help="Of the choice and the order of windows.")] = 0,
    checkpoint: Annotated[
        bool, typer.Option("--checkpoint/--no-checkpoint", help="Also write the whole model for from_pretrained.")
    ] = True,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "cpu",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Calibrate a recipe's mitigations, decoder block by decoder block."""
    from ..conversion.calibration import FACTS_FILE
    from ..integrations.checkpoints import check_device
    from ..lab.calibrate import CalibrationSettings, save_calibration
    from ..lab.calibrate import calibrate as run
    from ..lab.calibrate.data import check_seed, read_texts, windows_of
    from ..lab.calibrate.run import check_needed
    from ..lab.evaluate.study import resolved

    _check_output(output, model)
    settings = CalibrationSettings(learning_rate=lr, epochs=epochs, loss=loss, seed=seed)
    chosen = load_recipe(recipe)
    check_needed(resolved(chosen))
    check_device(device)
    set_threads(threads)
    check_seed(seed)
    texts = read_texts(data)
    _check_length(load_config(model), length)
    dense, tokenizer = load(model, dtype, "cpu")
    ids = windows_of(tokenizer, texts, data, windows=windows, length=length, seed=seed)
    if len(ids) < windows:
        note(f"the text has {len(ids)} windows of {length} tokens, fewer than {windows}: all are used")
    output.mkdir(parents=True, exist_ok=True)
    with progress_bar("calibrating") as update:
        report, history = run(
            dense, chosen, ids, settings=settings, device=device, state=output / _STATE, progress=update
        )
    facts = {
        "source": model_name(model),
        "weights": report.model.nm_act_dense_weights["weights"],
        "data": data.name,
        "windows": len(ids),
        "length": length,
        "learning_rate": lr,
        "epochs": epochs,
        "loss": loss,
        "seed": seed,
        "seconds": round(sum(block["seconds"] for block in history), 1),
        "environment": environment(),
        "recipe": chosen.to_dict(),
        "blocks": history,
    }
    _note_orders(report.model)
    if checkpoint:
        _save_checkpoint(report.model, tokenizer, output)
    from ..files import write_atomic

    write_atomic(output / FACTS_FILE, to_json(facts) + "\n")
    save_calibration(report.model, output)
    shutil.rmtree(output / _STATE)
    if as_json:
        print_json(facts)
        return
    print(report)
    print(f"written to {output}: nm-act ppl {model} --calibration {output}")


def unfinished_calibration(output: Path) -> bool:
    """Whether a stopped run left a finished block in its folder."""
    return any((output / _STATE).glob("block-*.safetensors"))


def _check_output(output: Path, model: str) -> None:
    """Refuse a folder in which the result would replace somebody's files, the model's above all."""
    from ..conversion.calibration import DATA_FILE
    from ..lab.calibrate.state import IDENTITY

    place, source = output.resolve(), Path(model).expanduser().resolve()
    if source in (place, *place.parents) and Path(model).expanduser().exists():
        raise ValueError(f"expected an output apart from the model, got {str(output)!r} in it; use another folder")
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if not nearest.is_dir():
        raise ValueError(f"expected a folder for the result, but {str(nearest)!r} is a file; use another name")
    if (output / DATA_FILE).exists():
        raise ValueError(f"expected a folder without a finished calibration, got {str(output)!r}; use another")
    # A run that stopped may have left a part of its checkpoint beside its state.
    if output.is_dir() and not (output / _STATE / IDENTITY).exists():
        other = next((path.name for path in sorted(output.iterdir()) if path.name != _STATE), None)
        if other is not None:
            raise ValueError(
                f"expected an empty folder or an unfinished calibration, but {str(output)!r} holds {other!r}; use "
                "another"
            )


def _check_length(model, length: int) -> None:
    from ..lab.evaluate.perplexity import context_length

    context = context_length(model)
    if context is not None and length > context:
        raise ValueError(f"expected --length within the model's context of {context} tokens, got {length}; shorten it")


def _note_orders(model) -> None:
    from ..conversion.calibration import is_reordered
    from ..layers.linear import NMLinear

    layers = [each for each in model.modules() if isinstance(each, NMLinear) and "permute" in each.spec.mitigation]
    if layers and not any(map(is_reordered, layers)):
        note("permute reorders nothing here: down_proj and o_proj alone have layers in front that can be folded into")


def _save_checkpoint(model, tokenizer, output: Path) -> None:
    """Write beside, then move in, the configuration last: no folder looks like a model before it is one."""
    folder = output / _STATE / "checkpoint"  # goes with the state, whatever a killed run left in it
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
        os.replace(path, output / path.name)
