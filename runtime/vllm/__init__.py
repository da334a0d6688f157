"""The vLLM plugin: an unmodified vLLM serves a locked checkpoint as it serves the original.

vLLM calls `register` in each of its processes, by the entry point group `vllm.general_plugins`. Nothing here is
imported by the rest of the program, and nothing of vLLM before `register` is called.

quantization.py   the quantization method `dlr`: which class is built, and that doomed linear maps get no weights
models.py         for every model class of vLLM a subclass with chains in it, made when it is asked for
lifetime.py       an engine ends with its server
chains.py         the chains themselves: into the model, filled from the checkpoint, and checked
"""

import logging

from ...common.errors import typed_line

_log = logging.getLogger("vllm.dlr_lock")  # below vLLM's own, so that its handlers print it


def register() -> None:
    """Makes locked checkpoints known to vLLM, in this process. Models that are not locked are none of its business.

    What fails in here is logged, not raised: vLLM would not start any more, for no model. A locked checkpoint then ends
    in vLLM's "Unknown quantization method: dlr".
    """
    try:
        from .quantization import register as register_method  # registers its class on import, too

        register_method()
    except Exception as error:
        _log.warning("dlr-lock's plugin failed, so no locked model can be served: %s", typed_line(error))
