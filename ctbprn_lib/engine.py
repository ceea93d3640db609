"""Papermill's engine, without the traceback that an interrupt now and then leaves.

pyproject.toml names it among papermill's engines, so papermill imports this file at its start.
"""

from jupyter_core.utils import ensure_event_loop
from papermill.engines import NBClientEngine, papermill_engines


class Engine(NBClientEngine):
    """After Ctrl-C nbclient ends the kernel but not its own wait for it. Where it looks, each second, at the wrong
    moment, asyncio later prints "Task exception was never retrieved" and a traceback: that the kernel has died.
    """

    @classmethod
    def execute_managed_notebook(cls, *args, **kwargs):
        try:
            super().execute_managed_notebook(*args, **kwargs)
        except KeyboardInterrupt:
            ensure_event_loop().set_exception_handler(lambda *_: None)  # only what was left waiting uses the loop now
            raise


papermill_engines.register(None, Engine)  # None: where the command names no engine
