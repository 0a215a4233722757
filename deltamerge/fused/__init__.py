"""The fused CPU backend (extra `fast`): `kernels` tile by tile, or whole passes by `stream` and `program`."""
