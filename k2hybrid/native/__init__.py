"""What the C++ extension offers: tensors are checked at the border; pointers cross it, torch does not.

`extension` alone imports it; the other modules wrap what it does, a subject each.
"""

import os

# libgomp's threads would otherwise spin for milliseconds after each torch operation, on the very cores that
# the pinned pool needs next. Must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
