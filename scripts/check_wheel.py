"""Whether an installed wheel's kernels load and compute, on every level of this processor; numpy alone is needed."""

import numpy as np

from deltamerge.engine import kernels


def main() -> None:
    native = kernels.native()
    assert native is not None, "the kernels are not there"
    left, right = np.arange(6, dtype=np.float32).reshape(2, 3), np.arange(12, dtype=np.float32).reshape(3, 4)
    for level in native.levels():
        assert native.choose(level)
        out = np.empty((2, 4), np.float32)
        native.ordered_product(left, right, out, 2, 3, 4)
        assert (out == left @ right).all(), level
        print(level, "computes")


if __name__ == "__main__":
    main()
