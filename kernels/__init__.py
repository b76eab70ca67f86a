"""The kernels of fastadam: they see arrays and scalars only, and never validate.

Floors: ``rules``, ``storage``, ``chunks`` and ``forks`` at the bottom, then ``compiling`` and ``threads``,
then one module per kind of device (``cpu``) and pass (``norms``). Nothing here imports from the thin API
above.
"""

from . import forks as forks  # must be there before a fork
