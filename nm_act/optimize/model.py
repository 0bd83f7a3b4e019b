"""Optimizes a model for inference, and undoes it."""

import sys
from typing import Any

import torch
from torch import nn

from ..layers.hooks import take_over_hooks
from ..layers.linear import NMLinear, sparse_layers
from ..layers.stale import parameter_of
from ..ops.e4m3 import check_layout
from ..ops.prepack import why_not_prepacked
from . import dense, fused, operands, static_attention
from .attention import FusedAttention, mark_attention, merged_qkv
from .changed import Changed, change
from .eligible import check_module, not_fp8, why_absent
from .families import FAMILIES, SANDWICH, Family, folder_of
from .fp8 import FP8Linear
from .head import ROWS_AT_ONCE, QuantisedHead, check_kind, head_of, store_head, why_not_8_bits
from .merged import LinearPart, MergedLinear, SharesProducts, merge, merge_key, unmerge
from .report import OptimizeReport

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def optimize(
    model: nn.Module, *, fp8: str | None = None, head: str | None = None, prepack: bool = False
) -> OptimizeReport:
    """Make a dense or sparse model faster without changing what it computes, in place.

    Projections that read the same activation and share one spec (q/k/v, gate/up) become one layer, so that the
    activation is selected and compressed once for all of them. On CUDA in 16 bits, the rotary embedding and a static
    cache's update are one kernel (with the norms of heads in Qwen3 and Gemma 3), and RMSNorm (with the residual) and
    the gated activation (SiLU, GELU with the tanh approximation) are computed with the sparse product after them: they
    write its packed or pruned operand, or, for one to four tokens, are part of its kernel. A norm between attention or
    MLP and the residual (Gemma 3) is one kernel with the addition. Llama, Mistral, Qwen2, Qwen3 and Gemma 3 of
    Transformers are supported; the layers of other models stay as they are. Checkpoints keep the stock names and
    layout.

    Parameters
    ----------
    model : nn.Module
        A Transformers model, dense or from :func:`nm_act.sparsify`; the weights of a group must be on one device.
    fp8 : {"prefill", "decode", "both"}, optional
        Store the weights of sparse layers in float8_e4m3fn. "prefill" stores [out, in] for the fp8 tensor cores: the
        sparse ones for 2:4, the dense ones over the pruned activation for other patterns. "decode" stores [in, out] for
        row skipping; prefill then gains nothing. "both" keeps both copies, together the bytes of the 16-bit weight. The
        model's outputs change by the rounding; dense layers stay in 16 bits.
    head : {"int8", "e4m3"}, optional
        Store the weight of the output head in 8 bits with one scale per word; works for dense models too. int8 rounds
        less. An embedding that is tied to the head keeps its weight, so memory grows by a byte per weight; otherwise it
        shrinks by one. The report states the bytes. One to eight tokens on CUDA are fast; for more, such as the logits
        of a whole prompt, and on a CPU, each call dequantises the weight.
    prepack : bool
        On CPUs, also keep a second copy of the weights of sparse layers, in the layout that oneDNN's product reads, for
        calls with too many tokens to skip rows (more than three at 8:16). Without it, such calls multiply the [in, out]
        weight, which is up to four times as slow in bfloat16. The report states the bytes.

    Returns
    -------
    OptimizeReport
        What was merged and fused, and why the rest was not.

    Raises
    ------
    ValueError
        If the model is already optimized, ``fp8`` or ``head`` is unknown, ``fp8`` or ``prepack`` is given for a model
        without sparse layers, "prefill" or "both" is given for a model that is not on CUDA with compute capability 9.0,
        or ``head`` for a model without an output head. The model is then unchanged.
    MemoryError
        If the device has too little memory left for the e4m3 copies of a layer or of the head beside the 16-bit weight.
        The model is then unchanged.

    Notes
    -----
    This is the last step before inference: sparsify, calibrate and search refuse an optimized model. Norms and
    activations write packed operands only while no gradient is recorded, so run the model under ``torch.no_grad()``; a
    backward pass gives the gradient of the separate layers, and is refused for e4m3 weights. Parameters of merged
    layers have different names; only ``state_dict`` has the stock ones. Layers, norms and MLPs that have hooks, a
    replaced forward, or weights split over ranks stay as they are. A hook that is registered later is called, unless it
    is on the activation of an MLP that packs its operand. Optimized models can be pickled, deep-copied and called by
    several threads, as stock ones can. :func:`deoptimize` undoes it.

    Examples
    --------
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    ...                      vocab_size=99)
    >>> len(optimize(LlamaForCausalLM(config)).merged)
    4
    """
    _check(model, fp8, head, prepack)
    report = OptimizeReport(model)
    parents = {}
    for name, parent in list(model.named_modules()):
        for group in GROUPS:
            if all(isinstance(getattr(parent, child, None), nn.Module) for child in group):
                parents[name] = (parent, group)
    for name, (parent, group) in parents.items():
        why = _unknown(parent, "Attention" if group == GROUPS[0] else "MLP")
        if why:
            report.kept.append((name, why))
        else:
            _merge_group(report, name, parent, group)
    if fp8 is not None:
        _quantise(report, fp8)
    if head is not None:
        name, stored, why = store_head(model, head)
        if stored is None:
            report.kept.append((name, f"the output head stays as it is: {why}"))
        else:
            report.head, report.head_bytes, report.head_saved = name, stored.nbytes, stored.saved
    for name, (parent, group) in parents.items():
        _fuse_mlp(report, name, parent, group)
    layers = [(name, layer) for name, layer in model.named_modules() if type(layer).__name__.endswith("DecoderLayer")]
    for name, layer in layers:
        _fuse_layer(report, name, layer)
    _link(
        report, [(name, layer) for name, layer in layers if FAMILIES.get(folder_of(layer), Family()).norms == SANDWICH]
    )
    if prepack:
        _prepack(report)
    for layer in model.modules():
        if isinstance(layer, (NMLinear, FP8Linear)):
            operands.remember(layer)
        if isinstance(layer, NMLinear):
            layer.derived_for_call()  # compares touched weights now, because a compiled layer cannot
    report.dense = dense.change_dense(model)
    if "transformers" in sys.modules:
        static_attention.register()  # for model.set_attn_implementation
    return report


def deoptimize(model: nn.Module) -> nn.Module:
    """Undo :func:`optimize` in place: stock modules, with the same weights (dequantised ones after fp8).

    Raises
    ------
    ValueError
        If the model is not optimized, or the forward of a module that optimize() changed was replaced since then.
    """
    if not is_optimized(model):
        raise ValueError("expected an optimized model, got one that optimize() has not changed; nothing to undo")
    changed = {name: module for name, module in model.named_modules() if isinstance(module, Changed)}
    replaced = next((name for name, module in changed.items() if "forward" in vars(module)), None)
    if replaced is not None:
        raise ValueError(
            f"expected modules as optimize() left them, got another forward on {replaced}; undo that first (of "
            "accelerate: remove_hook_from_module)"
        )
    for _, module in list(model.named_modules()):
        for child, layer in list(module.named_children()):
            if isinstance(layer, FP8Linear):
                restored = layer.to_nm_linear()
                take_over_hooks(restored, layer)
                setattr(module, child, restored)
            elif isinstance(layer, QuantisedHead):
                head = layer.to_linear()
                take_over_hooks(head, layer)
                setattr(module, child, head)
            elif _is_prepacked(layer):
                layer.prepack = False
                layer.refresh()
    for _, module in list(model.named_modules()):
        children = [child for child, layer in module.named_children() if isinstance(layer, MergedLinear)]
        if isinstance(module, Changed):
            fused.unfuse(module)
        for child in children:
            unmerge(module, child)
    return model


def is_optimized(model: nn.Module) -> bool:
    """Whether :func:`optimize` has changed this model."""
    changed = (MergedLinear, LinearPart, FP8Linear, QuantisedHead, Changed)
    return any(isinstance(module, changed) or _is_prepacked(module) for module in model.modules())


def _is_prepacked(module: nn.Module) -> bool:
    return isinstance(module, NMLinear) and module.prepack


def refuse_optimized(model: nn.Module) -> None:
    """Raise a ValueError if :func:`optimize` has changed this model, so that its layers are not the stock ones."""
    if is_optimized(model):
        raise ValueError(
            "expected a model that is not optimized, got one that is; call nm_act.deoptimize(model) first, "
            "and optimize it as the last step"
        )


def _check(model: nn.Module, fp8: str | None, head: str | None, prepack: bool) -> None:
    check_module(model)
    refuse_optimized(model)
    if fp8 is not None:
        check_layout(fp8)
    layers = [*sparse_layers(model).values()]
    if not layers and (fp8 is not None or prepack):
        option = "fp8" if fp8 is not None else "prepack"
        raise ValueError(f"expected a sparse model for {option}, got a dense one; call sparsify(model, recipe) first")
    if head is not None:
        check_kind(head)
    output = None if head is None else head_of(model)
    if head is not None and output is None:
        raise ValueError(
            f"expected a model with an output head for head={head!r}, got {type(model).__name__}, which has none; "
            "leave head out"
        )
    if fp8 is None:
        _check_memory([], "", output)
        return
    weights = [parameter_of(layer, "weight") for layer in layers]
    if fp8 != "decode":
        for device in {weight.device for weight in weights if weight is not None and not weight.is_meta}:
            _check_prefill_device(device, fp8)
    _check_memory(layers, fp8, output)


def _check_prefill_device(device: torch.device, fp8: str) -> None:
    if device.type != "cuda":
        raise ValueError(
            f'expected a model on CUDA for fp8="{fp8}", got one on {device.type}; move it there first, or choose '
            'fp8="decode"'
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        raise ValueError(
            f'expected compute capability 9.0 for fp8="{fp8}", whose products run on its fp8 tensor cores, got '
            f'{major}.{minor}; choose fp8="decode"'
        )


def _check_memory(layers: list[NMLinear], fp8: str, head: nn.Module | None) -> None:
    """Raise a MemoryError unless each device has room for its largest layer's copies beside the 16-bit weight."""
    needed: dict[torch.device, int] = {}
    weight: Any
    if head is not None and not why_not_8_bits(head) and head.weight.is_cuda:
        weight = head.weight
        needed[weight.device] = weight.numel() + 12 * weight.shape[1] * ROWS_AT_ONCE  # in float32, scaled, in e4m3
    for layer in layers:
        weight = parameter_of(layer, "weight")
        if weight is not None and weight.is_cuda and not not_fp8(layer, fp8):
            # Also for a group that will be merged: its 16-bit parts are freed before.
            need = 3 * weight.numel() * (2 if fp8 == "both" else 1)
            needed[weight.device] = max(needed.get(weight.device, 0), need)
    for device, need in needed.items():
        free = (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
        if need > free:
            option = f'fp8="{fp8}"' if fp8 else "head"
            raise MemoryError(
                f"expected {need / 2**30:.1f} GiB free on {device} to convert its largest layer to {option}, got "
                f"{free / 2**30:.1f} GiB; free memory first, or convert on a device with more"
            )


def _unknown(module: nn.Module, kind: str) -> str:
    """Why a module is not known to be safe to change; empty if it is."""
    if folder_of(module) not in FAMILIES or not type(module).__name__.endswith(kind):
        return f"{type(module).__name__} is not of a known family ({', '.join(FAMILIES)})"
    if "forward" in vars(module):
        return "its forward is replaced already"
    return ""


def _merge_group(report: OptimizeReport, name: str, parent: nn.Module, group: tuple[str, ...]) -> None:
    groups: dict[tuple[Any, ...] | str, list[str]] = {}
    for child in group:
        groups.setdefault(merge_key(getattr(parent, child)), []).append(child)
    for key, children in groups.items():
        if isinstance(key, str):
            report.kept += [(f"{name}.{child}", key) for child in children]
        elif len(children) == 1:
            report.kept.append((f"{name}.{children[0]}", "the other projections of its group have other specs"))
        else:
            merge(parent, children)
            report.merged.append((name, tuple(children)))
    if merged_qkv(parent) is not None:
        change(parent, FusedAttention)
        mark_attention(parent, FAMILIES[folder_of(parent)])
    elif any(isinstance(child, MergedLinear) for child in parent.children()):
        change(parent, SharesProducts)


def _quantise(report: OptimizeReport, layout: str) -> None:
    # Names instead of modules, so that a layer's 16-bit weight is freed before the next one is converted.
    for name in [name for name, _ in report.model.named_modules()]:
        module = report.model.get_submodule(name)
        for child in [child for child, layer in module.named_children() if isinstance(layer, NMLinear)]:
            layer: Any = module.get_submodule(child)
            why = not_fp8(layer, layout)
            if why:
                report.kept.append((f"{name}.{child}", f"stays in 16 bits: {why}"))
                continue
            setattr(module, child, FP8Linear(layer, layout))
            report.fp8.append(f"{name}.{child}")


def _prepack(report: OptimizeReport) -> None:
    for name, layer in sparse_layers(report.model).items():
        weight: torch.Tensor = layer.weight
        why = why_absent(layer) or why_not_prepacked(weight)
        if why:
            report.kept.append((name, f"not prepacked: {why}"))
            continue
        layer.prepack = True
        layer.refresh()
        report.prepacked.append(name)
        report.prepacked_bytes += weight.nbytes


def _fuse_mlp(report: OptimizeReport, name: str, parent: nn.Module, group: tuple[str, ...]) -> None:
    child = next((child for child, layer in parent.named_children() if isinstance(layer, MergedLinear)), None)
    if group != GROUPS[1] or child is None or parent.get_submodule(child).names != group:
        return
    if fused.fuse_mlp(parent, child):
        report.fused.append(name)


def _fuse_layer(report: OptimizeReport, name: str, layer: nn.Module) -> None:
    if "forward" in vars(layer):
        return
    family = FAMILIES.get(folder_of(layer), Family())
    children = {child for child, _ in layer.named_children()}
    if not family.norms or children != {"self_attn", "mlp", *family.norms}:
        return
    report.fused += [f"{name}.{norm}" for norm in fused.fuse_layer(layer)]


def _link(report: OptimizeReport, layers: list[tuple[str, nn.Module]]) -> None:
    layers = [(name, layer) for name, layer in layers if FAMILIES.get(folder_of(layer), Family()).norms == SANDWICH]
    whys = fused.link_layers([layer for _, layer in layers])
    for (name, _), why in zip(layers[:-1], whys, strict=True):
        if why:
            report.unlinked.append((name, why))
        else:
            report.linked.append(name)
