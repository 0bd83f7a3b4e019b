"""vLLM plug-in, with which vLLM serves a saved nm_act checkpoint without any code.

vLLM calls :func:`register` in each of its processes through the entry point group ``vllm.general_plugins``. The classes
that plug into it are in ``vllm_linear.py``, the decisions that need no vLLM in ``vllm_plan.py``.
"""

import logging

from ..supported import supported


def register() -> None:
    """Entry point: register the quantisation method "nm_act" with vLLM; warns in one sentence if that fails.

    It must not raise, because vLLM calls it for every model, sparse or not.
    """
    try:
        from . import vllm_linear  # noqa: F401
    except Exception as error:  # any error: other models must still be served
        logging.getLogger("vllm.nm_act").warning(interface_sentence(error))


def interface_sentence(error: Exception) -> str:
    """The warning for a vLLM with a different interface."""
    try:
        from vllm import __version__ as found  # instead of the package's metadata, because a CPU build has another name
    except Exception:  # called by register(), which must not raise
        found = "one without version"
    reason = " ".join(str(error).split())
    versions = supported("vllm")[0].versions
    return (
        f"nm_act expected the interface of vLLM {versions}, got {found} ({reason}), so sparse checkpoints cannot be "
        f"served; install vllm{versions} or another nm_act"
    )
