"""Turns the garbage collector off when it is imported: a fork server can be told of modules, but not to call anything.

Its children call `prefmill.pipeline.preload.collect_from_now_on`.
"""

import gc

gc.disable()
