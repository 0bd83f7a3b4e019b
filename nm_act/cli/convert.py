"""``nm-act convert``: a sparse checkpoint from a dense model, for Transformers, vLLM and lm-eval."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common
from . import options as opt
from .recipes import build_recipes, check_uncalibrated


def convert(
    model: opt.Model,
    output: Annotated[Path, typer.Option("--output", help="Folder for the checkpoint; new or empty.")],
    pattern: Annotated[
        str | None, typer.Option("--pattern", metavar="N:M", help="Pattern of the linear layers, e.g. 8:16 or 2:4+1.")
    ] = None,
    recipe: opt.Recipe = None,
    criterion: opt.Criterion = None,
    mitigation: opt.Mitigations = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Folder written by nm-act calibrate, recipe and data.")
    ] = None,
    dtype: opt.Dtype = "auto",
    as_json: opt.AsJson = False,
) -> None:
    """Write a model, its tokenizer and a recipe as one checkpoint that loads sparse."""
    from ..conversion.calibration import load_calibration
    from ..conversion.sparsify import sparsify
    from ..files import check_new_folder
    from ..integrations.checkpoints import save_model

    check_new_folder(output)
    variant = _variant(pattern, recipe, criterion, mitigation, calibration)
    servable = _is_servable(variant.recipe)
    network, tokenizer = common.load(model, dtype, config=_dense_config(model))
    folder = variant.folder
    report = sparsify(network, variant.recipe) if folder is None else load_calibration(network, folder)
    common.note(f"writing {output}")
    save_model(network, tokenizer, output)
    if as_json:
        common.print_json(
            {
                "model": common.model_name(model),
                "output": str(output),
                "dtype": str(network.dtype).removeprefix("torch."),
                "bytes": sum(path.stat().st_size for path in output.rglob("*")),
                "recipe": variant.recipe.to_dict(),
                "calibration": None if folder is None else str(folder),
                "sparse_layers": len(report.replaced),
                "mac_fraction": report.mac_fraction,
            }
        )
        return
    print(report)
    print(f"written to {output}; use it with one of")
    print(f"  nm-act generate {shlex.quote(str(output))} PROMPT")
    if servable:
        print(f"  python -m vllm.entrypoints.openai.api_server --model {shlex.quote(str(output))}")
    print("  nm-act run PROGRAM ...")


def _variant(pattern: Any, recipe: Any, criterion: Any, mitigation: Any, calibration: Any) -> Any:
    """The recipe and data that the options describe; nm-act calibrate puts the data beside the recipe file."""
    from ..conversion.calibration import DATA_FILE, RECIPE_FILE
    from ..lab.evaluate.calibrated import of_calibration
    from ..lab.evaluate.variants import from_recipe

    changes = {"--pattern": pattern, "--criterion": criterion, "--mitigation": mitigation}
    others = [name for name, value in changes.items() if value]
    if calibration is not None:
        others += ["--recipe"] if recipe is not None else []
        if others:
            raise ValueError(
                f"expected --calibration by itself, because its folder holds the recipe, got {others[0]} too; leave "
                "one out"
            )
        return of_calibration(calibration)
    if pattern is None and recipe is None:
        raise ValueError("expected --pattern, --recipe or --calibration, got none; add one, --pattern 8:16 for example")
    if recipe is not None and not others and recipe.name == RECIPE_FILE and (recipe.parent / DATA_FILE).is_file():
        return of_calibration(recipe.parent)
    [(name, made)] = build_recipes(recipe, None if pattern is None else [pattern], criterion, mitigation).items()
    variant = from_recipe(made, name)
    check_uncalibrated([variant], "name its folder with --calibration")
    return variant


def _is_servable(recipe: Any) -> bool:
    """Whether vLLM serves a recipe; if not, a note says why."""
    from ..integrations.vllm_plan import check_servable

    try:
        check_servable(recipe)
    except ValueError as error:
        common.note(f"vLLM will not serve this checkpoint: {error}")
        return False
    return True


def _dense_config(model: str) -> Any:
    """A model's configuration; a ValueError, before the weights are loaded, if it is sparse or quantised already."""
    from ..integrations.transformers import quantisation_of

    config = common.load_config(model)
    common.check_not_sparse(config, model)
    method = quantisation_of(config)
    if method not in (None, "gguf"):
        raise ValueError(
            f"expected a dense model, but {model!r} is quantised with {method}; name the checkpoint it was made from"
        )
    return config
