# SPDX-License-Identifier: Apache-2.0
import numpy as np
from numpy.typing import NDArray

def fill(
    hashes: NDArray[np.uint64],
    weights: NDArray[np.uint32],
    out: NDArray[np.uint32],
    claim: bool,
    /,
) -> None: ...
