"""vLLM plug-in: ``vllm serve`` of a saved nm_act checkpoint, nothing to be written by the user.

vLLM loads :func:`register` in each of its processes through the entry point group ``vllm.general_plugins``. The classes
that plug into it are in ``vllm_linear.py``, what they decide in ``vllm_plan.py``.
"""

import logging

from ..supported import supported


def register() -> None:
    """Entry point: make vLLM know the quantisation method "nm_act"; warns in one sentence where it cannot.

    It must not raise: vLLM calls it for every model, whether that is sparse or not.
    """
    try:
        from . import vllm_linear  # noqa: F401
    except Exception as error:  # whatever it is: other models must still be served
        logging.getLogger("vllm.nm_act").warning(interface_sentence(error))


def interface_sentence(error: Exception) -> str:
    """What to tell the user of a vLLM whose interface is another."""
    try:
        from vllm import __version__ as found  # not the package's metadata: a CPU build goes by another name
    except Exception:  # this is said from register(), which must not raise
        found = "one without version"
    reason = " ".join(str(error).split())
    versions = supported("vllm")[0].versions
    return (
        f"nm_act expected the interface of vLLM {versions}, got {found} ({reason}), so sparse checkpoints cannot be "
        f"served; install vllm{versions} or another nm_act"
    )
