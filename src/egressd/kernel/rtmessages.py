"""pyroute2's formats of routing messages, and nothing else of it.

`import pyroute2` loads all of it, 150 modules, which took half of a warden's start. The formats need 25. So
while they are imported an empty package stands in for its __init__; who asks for pyroute2 later gets it.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["fibmsg", "ifaddrmsg", "ifinfmsg", "ndmsg", "rtmsg"]

_NAME = "pyroute2"


@contextmanager
def _bare() -> Iterator[None]:
    spec = importlib.util.find_spec(_NAME)
    if _NAME in sys.modules or spec is None:
        yield
        return
    package = types.ModuleType(_NAME)
    package.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[_NAME] = package
    try:
        yield
    finally:
        del sys.modules[_NAME]


with _bare():
    from pyroute2.netlink.rtnl.fibmsg import fibmsg
    from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
    from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
    from pyroute2.netlink.rtnl.ndmsg import ndmsg
    from pyroute2.netlink.rtnl.rtmsg import rtmsg
