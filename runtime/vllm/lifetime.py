"""An engine ends with its server.

vLLM's EngineCore, a process of its own, does not notice that its server was killed: 20 s after a kill -9 it and its
workers were there, with all their memory. Its workers do notice when EngineCore ends.
"""

import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.connection import wait

_ENGINE = "EngineCore"  # the name of vLLM's process, or the beginning of it
_GRACE = 15  # seconds in which vLLM takes its shared memory down itself
_watched = False


def end_with_server() -> None:
    """In a process of vLLM's engine: a thread ends it when its parent does. Elsewhere nothing happens.

    The kernel's own PR_SET_PDEATHSIG would also fire when the thread ends that started the engine.
    """
    global _watched
    if _watched or not multiprocessing.current_process().name.startswith(_ENGINE):
        return
    _watched = True

    def watch() -> None:
        while (parent := multiprocessing.parent_process()) is None:  # until the arguments are unpickled
            time.sleep(0.1)
        wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="dlr-lock-server", daemon=True).start()
