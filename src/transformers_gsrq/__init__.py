"""Sub-1-bit KV cache for transformers by Gain-Shape Residual Quantization (arXiv 2607.01065).

Importing the package makes "gsrq" a cache implementation of `generate`; nothing else happens.
"""

from .compat import check_transformers

check_transformers()

from .cache import GSRQCache  # noqa: E402
from .calibration import calibrate  # noqa: E402
from .calibration.finetune import finetune  # noqa: E402
from .codebooks import GSRQCodebooks  # noqa: E402
from .config import GSRQConfig  # noqa: E402
from .hooks import attach, detach  # noqa: E402
from .memory import MemoryReport  # noqa: E402
from .quantizer import ResidualQuantizer  # noqa: E402
from .registration import register, unregister  # noqa: E402
from .support import Support, check_model  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "GSRQCache",
    "GSRQCodebooks",
    "GSRQConfig",
    "MemoryReport",
    "ResidualQuantizer",
    "Support",
    "attach",
    "calibrate",
    "check_model",
    "detach",
    "finetune",
    "register",
    "unregister",
]

register()
