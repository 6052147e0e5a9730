"""How a fork server lives, set when it is imported: a fork server can be told of modules, but not to call anything.

Its children call `prefmill.pipeline.worker.collect_from_now_on`.
"""

import gc
import signal

gc.disable()
# The terminal's Ctrl-C reaches it too: in the middle of its imports it ends at once, without Python's traceback.
# Not where it is ignored, as in a script's background: prefmill goes on then, and needs it.
if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
# A terminal that is closed lets tasks save, which end with this process.
signal.signal(signal.SIGHUP, signal.SIG_IGN)
# It was started with both blocked: one that came until here is answered now.
signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGHUP})
